"""Bi-level routed attention (BiFormer, Zhu et al., arXiv 2303.08810): each tile of the picture looks at the tiles that fit it.

In contrast to local attention they may lie anywhere. Image tokens see all text tokens besides, text tokens see everything.
As published, a 3 x 3 convolution of the values is added ("local context enhancement"); it is zero until trained. A model that
was not trained for it loses much of its order. The mathematics is in `ops.routed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .method import AttnMethod, LayerInfo
from .ops.linear import depthwise
from .ops.routed import routed_attention

if TYPE_CHECKING:
    from .layer import LayerCall

__all__ = ["RoutedAttnProcessor"]

CONV = "conv"  # (h, d, 3, 3)


@dataclass(frozen=True, kw_only=True)
class RoutedAttnProcessor(AttnMethod):
    """Bi-level routed attention in self-attention and in the joint layers of FLUX and SD3; for training.

    Raises ValueError for a number outside its range, TypeError for a value of the wrong type.
    """

    tile: tuple[int, int] = (8, 8)  # rows and columns of a tile, in tokens
    topk: int = 4  # tiles that each tile sees; more = closer to the model as made, and slower

    name: ClassVar[str] = "routed"
    roles: ClassVar[tuple[str, ...]] = ("spatial", "joint")
    honours_padding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tile) < 1:
            raise ValueError(f"tile is (rows, columns), both at least 1, got {self.tile}; (8, 8) is usual.")
        if self.topk < 1:
            raise ValueError(
                f"topk must be at least 1, got {self.topk}; it counts the tiles each tile sees, 4 is usual."
            )

    def new_parameters(self, layer: LayerInfo) -> dict[str, Tensor]:
        """The convolution of the values, which is zero."""
        return {CONV: torch.zeros(layer.heads, layer.width // layer.heads, 3, 3)}

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        """Attention of one layer, (B, N, heads * head_dim)."""
        layout, q, k, v = call.layout, call.q, call.k, call.v
        grid_q, grid_k, grid_v = (x[:, layout.grid] for x in (q, k, v))
        others = (layout.globals_of(k), layout.globals_of(v)) if layout.global_tokens else None
        seen = None if call.mask is None or others is None else layout.globals_of(call.mask[:, 0, 0])
        grid = routed_attention(
            grid_q, grid_k, grid_v, others, call.grid, tile=self.tile, topk=self.topk, scale=call.scale, softmax=call.softmax,
            seen=seen,
        )  # fmt: skip
        if (kernels := call.extra(CONV)) is not None:
            grid = grid + depthwise(grid_v, call.grid, kernels[None])
        if others is None:
            return grid.flatten(2)
        return layout.assemble(grid, call.softmax(layout.globals_of(q), k, v, mask=call.mask)).flatten(2)
