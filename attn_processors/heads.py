"""Mixture of heads (MoH, Jin et al., arXiv 2410.11842) on local attention: each token uses only the heads it needs.

Image tokens see what they see in CLEAR, each by the heads that its queries choose; text tokens use all heads. With
route="token" all heads are computed and only weighted: that is the published form, and saves nothing here. With
route="sample" a picture has one choice in each layer, and heads that are off are not computed for it.

The mathematics is in `ops.heads`. While it is trained, a layer tells how unevenly heads are used, and the trainer adds that
to its losses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from .clear import DENSE, ClearAttnProcessor, Local
from .method import LayerInfo
from .ops.heads import balance, gates, head_scores
from .ops.layout import TokenLayout
from .ops.local import attend

if TYPE_CHECKING:
    from .layer import LayerCall

__all__ = ["MixtureOfHeadsAttnProcessor"]

ROUTER, ROUTER_WEIGHT = "router", "router_weight"  # (h,) and (h, d)
GROUPS, GROUPS_WEIGHT = "groups", "groups_weight"  # (2,) and (2, d)


@dataclass(frozen=True, kw_only=True)
class MixtureOfHeadsAttnProcessor(ClearAttnProcessor):
    """Local attention in which image tokens choose among the heads; for training."""

    shared: float = 0.25  # share of the heads that is always on, rounded down
    active: float = 0.75  # share of the heads that is on for a token, with those, rounded up; less = faster, coarser
    route: Literal["token", "sample"] = "token"  # who chooses: each token, or a picture at once, which saves time
    balance: float = 0.01  # weight of the loss that keeps the use of heads even

    name: ClassVar[str] = "mixture-of-heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.shared < 1 or not self.shared <= self.active <= 1 or not self.active > 0:
            raise ValueError(
                f"shared and active are shares of the heads with 0 <= shared <= active <= 1, shared < 1 and active > 0, got "
                f"{self.shared} and {self.active}; 0.25 and 0.75 are usual."
            )
        if not 0 <= self.balance < math.inf:
            raise ValueError(f"balance is a weight >= 0, got {self.balance}; 0.01 is usual, 0 leaves the loss out.")

    def counts(self, heads: int) -> tuple[int, int]:
        """(heads always on, heads on among the others) of a layer with so many."""
        shared = math.floor(self.shared * heads)
        return shared, max(math.ceil(self.active * heads) - shared, 1)

    def new_parameters(self, layer: LayerInfo) -> dict[str, Tensor]:
        """Scores of the heads, and the weights between the two groups where there are two; all zero."""
        width = layer.width // layer.heads
        added = {ROUTER: torch.zeros(layer.heads), ROUTER_WEIGHT: torch.zeros(layer.heads, width)}
        if self.counts(layer.heads)[0]:
            added |= {GROUPS: torch.zeros(2), GROUPS_WEIGHT: torch.zeros(2, width)}
        return super().new_parameters(layer) | added

    def strip_rows(self, layout: TokenLayout) -> int | None:
        return None  # a picture's choice would need all of its rows

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        """Attention of one layer, (B, N, heads * head_dim)."""
        if phase == DENSE:
            return super().attend(call, phase)
        layout, gate = call.layout, self._gates(call)
        if self.route == "token":
            out = super().attend(call, phase).unflatten(-1, (call.heads, -1))
            grid, others = out[:, layout.grid] * gate.unsqueeze(-1).to(out.dtype), layout.globals_of(out)
        else:
            local = self._local(call.name, layout, call.q.device, call.q.dtype, call.kept.get(layout.tokens))
            scale = call.scale * local.sharpness
            grid = self._chosen(call, gate, local, scale)
            others = (
                call.softmax(layout.globals_of(call.q), call.k, call.v, scale=scale, mask=call.mask)
                if layout.global_tokens
                else grid
            )
        return layout.assemble(grid, others).flatten(2)

    def _gates(self, call: LayerCall) -> Tensor:
        """(B, N, h), or (B, 1, h) if pictures choose; tells how uneven they are."""
        q = call.q[:, call.layout.grid]
        shared, routed = self.counts(call.heads)
        trained, scores = head_scores(q, call.extra(ROUTER), call.extra(ROUTER_WEIGHT))
        logits, weight = call.extra(GROUPS), call.extra(GROUPS_WEIGHT)
        groups = None
        if logits is not None and weight is not None:
            groups = logits.to(scores.dtype) + q.mean(2).to(scores.dtype) @ weight.to(scores.dtype).T
        if self.route == "sample":
            trained, scores = trained.mean(1, keepdim=True), scores.mean(1, keepdim=True)
            groups = None if groups is None else groups.mean(1, keepdim=True)
        gate = gates(trained, scores, shared, routed, groups)
        if self.balance and torch.is_grad_enabled():  # also when backward recomputes: it has to do what was done before
            call.tell("balance", self.balance * balance(scores, gate, shared, routed))
        return gate

    def _chosen(self, call: LayerCall, gate: Tensor, local: Local, scale: float) -> Tensor:
        """Grid tokens' output of the heads that are on in each sample, and 0 of the others: (B, N, h, d)."""
        layout, heads = call.layout, call.heads
        count = sum(self.counts(heads))
        index = gate[:, 0].argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values  # (B, on)

        def on(x: Tensor) -> Tensor:
            return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        valid = None if call.mask is None else call.mask[:, 0, 0]
        out = attend(
            on(call.q), on(call.k), on(call.v), local.prepared, scale=scale, key_valid=valid,
            pool_weights=call.extra("pool_weights"), softmax=call.softmax,
        )[:, layout.grid]  # fmt: skip
        out = out * gate.gather(2, index[:, None]).unsqueeze(-1).to(out.dtype)
        into = index[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])
        return out.new_zeros(*out.shape[:2], heads, out.shape[3]).scatter(2, into, out)
