"""Agent attention for diffusion transformers, to be trained (after Han et al., arXiv 2312.08874).

Agents are the picture's queries averaged over a coarse grid, before the rotary embedding, and then rotated to the centre of their
cell. They attend to all tokens; then each token of the picture reads from the agents and from the text in one softmax, so that
the text stays exact::

    gathered = softmax(s A K^T) V                                   A: g x g agents
    out      = softmax(s Q [s^(p-1) A ; K_text]^T) [gathered ; V_text] + c V + conv(V)

Text tokens see everything by softmax, as before. The cost is linear in the picture's tokens. conv is 3 x 3 for each channel
and zero until trained; a model that was not trained for it makes blurred pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .agent import check_not_negative
from .method import AttnMethod, LayerInfo
from .ops.linear import depthwise

if TYPE_CHECKING:
    from .layer import LayerCall

__all__ = ["AgentJointAttnProcessor"]

CONV = "conv"  # (h, d, 3, 3)


@dataclass(frozen=True, kw_only=True)
class AgentJointAttnProcessor(AttnMethod):
    """Agent attention in the joint layers of FLUX and SD3 and in plain self-attention; for training.

    Raises ValueError for a number outside its range, TypeError for a value of the wrong type.
    """

    agents: int = 8  # agents along each side of the picture; more = finer and slower
    p: float = 0.3  # exponent of the second softmax scale; smaller = sharper choice of agent
    c: float = 0.075  # how much of its own value a token keeps; more = more detail

    name: ClassVar[str] = "agent-joint"
    roles: ClassVar[tuple[str, ...]] = ("spatial", "joint")
    honours_padding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.agents < 1:
            raise ValueError(f"agents must be at least 1, got {self.agents}; it counts them along a side, 8 is usual.")
        check_not_negative("p", self.p)
        check_not_negative("c", self.c)

    def new_parameters(self, layer: LayerInfo) -> dict[str, Tensor]:
        """The convolution of the values, which is zero."""
        return {CONV: torch.zeros(layer.heads, layer.width // layer.heads, 3, 3)}

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        """Attention of one layer, (B, N, heads * head_dim)."""
        layout, q, k, v = call.layout, call.q, call.k, call.v
        pooled, centres = pool_queries(call.unrotated_q[:, layout.grid], call.grid, self.agents)
        agents = call.rotated(pooled, centres + layout.before)
        gathered = call.softmax(agents, k, v, mask=call.mask)
        keys = torch.cat([agents * call.scale ** (self.p - 1), layout.globals_of(k)], dim=1)
        values = torch.cat([gathered, layout.globals_of(v)], dim=1)
        mask = None
        if call.mask is not None:
            shown = call.mask.new_ones(call.mask.shape[0], agents.shape[1])
            mask = torch.cat([shown, layout.globals_of(call.mask[:, 0, 0])], dim=1)[:, None, None]
        own = v[:, layout.grid]
        grid = call.softmax(q[:, layout.grid], keys, values, mask=mask) + self.c * own
        if (kernels := call.extra(CONV)) is not None:
            grid = grid + depthwise(own, call.grid, kernels[None])
        if not layout.global_tokens:
            return grid.flatten(2)
        others = call.softmax(layout.globals_of(q), k, v, mask=call.mask)
        return layout.assemble(grid, others).flatten(2)


def pool_queries(q: Tensor, grid: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """Mean queries of the cells of a coarse grid, and the token at the centre of each cell.

    Args:
        q: shape (B, N, h, d), N = H * W in raster order.
        grid: (H, W).
        side: cells along each side; fewer where the grid has fewer tokens.

    Returns:
        agents (B, A, h, d) and raster indices (A,), int64.
    """
    rows, columns = min(side, grid[0]), min(side, grid[1])
    planes = q.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, grid)
    pooled = torch.nn.functional.adaptive_avg_pool2d(planes, (rows, columns)).flatten(2)
    agents = pooled.unflatten(0, q.shape[:1] + q.shape[2:3]).permute(0, 3, 1, 2)
    y, x = (
        torch.tensor([(i * n // cells + -(-(i + 1) * n // cells) - 1) // 2 for i in range(cells)], device=q.device)
        for n, cells in ((grid[0], rows), (grid[1], columns))
    )
    return agents, (y[:, None] * grid[1] + x).flatten()
