"""FLUX.2: double blocks as in FLUX, and single blocks whose projections are one product with the first half of the MLP.

Order of tokens: text, picture, reference pictures. The grid is in `img_ids`: column 0 tells the pictures of a call apart,
columns 1 and 2 are row and column.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layer import LayerProcessor
from . import argument
from .flux import FluxFamily, FluxJoint, FluxLayer
from .joint import JointCall

if TYPE_CHECKING:
    from ..context import Context


class SingleCall(JointCall):
    """A call of a single block: queries, keys, values and the MLP's part come out of one product."""

    _parts: tuple[Tensor, Tensor] | None = None

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Queries, keys and values side by side, (B, N, 3 h d), and what goes into the MLP's activation."""
        if self._parts is None:
            self._parts = split_product(self._attn, self.x)
        return self._parts

    def _joined(self, which: str) -> Tensor:
        return side(self._joint, self._attn, self.parts[0], which)


class Flux2SingleLayer(FluxJoint):
    """A single block of FLUX.2, around the method the same as diffusers' Flux2ParallelSelfAttnProcessor."""

    makes = SingleCall

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        """The joined sequence (B, T + N, C), text first; returns the same shape, attention and MLP together."""
        if self.method is None:
            self.refuse_blank()
        call: JointCall | None = None
        if not self.neutral:
            call = self.open(attn, hidden_states, None, attention_mask, image_rotary_emb, holds_text=True)
        if not isinstance(call, SingleCall):
            return self.stock(attn, hidden_states, attention_mask, image_rotary_emb)
        out = self.checked(call, self.attend(call))
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(call.parts[1])], dim=-1))

    def project_q(self, attn: Any, x: Tensor) -> Tensor:
        return side(self, attn, split_product(attn, x)[0], "q")

    def project_k(self, attn: Any, x: Tensor) -> Tensor:
        return side(self, attn, split_product(attn, x)[0], "k")

    def project_v(self, attn: Any, x: Tensor) -> Tensor:
        return side(self, attn, split_product(attn, x)[0], "v")


class Flux2Family(FluxFamily):
    """FLUX with other single blocks and without ControlNets."""

    residuals = ()

    def layer_of(self, module: nn.Module) -> type[LayerProcessor]:
        return Flux2SingleLayer if hasattr(module, "to_qkv_mlp_proj") else FluxLayer

    def why_not(self, module: nn.Module) -> str | None:
        name = type(module.processor).__name__
        if name in ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"):
            return None
        remedy = "put the stock processor there first, or leave the layer out with layers=..."
        if "KV" in name:
            remedy = (
                "the pipeline that keeps keys and values of reference pictures sets it; use the plain Flux2 pipeline"
            )
        return f"it carries {name}, which we would not know how to imitate; {remedy}"

    def read(self, context: Context, args: tuple, kwargs: dict) -> None:
        if argument(context.model, args, kwargs, "kv_cache_mode") is not None:
            raise ValueError(
                "the model was called with kv_cache_mode, which our attention does not know; use a pipeline that does not "
                "keep keys and values between steps, or remove our attention first."
            )
        super().read(context, args, kwargs)


def split_product(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, C) -> queries, keys and values side by side, (B, N, 3 h d), and the MLP's part.

    By their shares of the product: under tensor parallelism each rank has a part of both.
    """
    product = attn.to_qkv_mlp_proj(x)
    ours, others = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
    width = product.shape[-1] * ours // (ours + others)
    return product.split([width, product.shape[-1] - width], dim=-1)


def side(layer: Any, attn: Any, qkv: Tensor, which: str) -> Tensor:
    """Queries ("q"), keys ("k") or values ("v") of what lies side by side, normalised: (B, N, h, d)."""
    x = layer.split(attn, qkv.chunk(3, dim=-1)["qkv".index(which)])
    return x if which == "v" else getattr(attn, f"norm_{which}")(x)


FAMILY = Flux2Family()
