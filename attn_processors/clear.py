"""CLEAR: local attention, which makes a diffusion transformer linear in its image tokens (Liu et al., arXiv 2412.16112).

An image token sees the image tokens nearer than a radius, and every text token; text tokens see everything. The cost
grows with the number of tokens instead of its square. Up to a grid of about 2K pixels there is nothing to gain. Weights
trained with full attention need a radius that covers what they rely on, or distillation (`reattend.distill`).

The mathematics is in `ops`: which keys a query sees (`patterns`), pooled keys beside them (`pool`), and several ways
to compute the same numbers (`local`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .method import AttnMethod, LayerInfo
from .ops.cost import attention_flops, dense_flops
from .ops.layout import TokenLayout
from .ops.local import Prepared, attend, choose, prepare
from .ops.patterns import Dense, Disc, Pattern, Square, TileWindow
from .ops.pool import Pool
from .ops.scale import softmax_scale
from .ops.strips import strip_attention

if TYPE_CHECKING:
    from .context import Context, Swap
    from .layer import LayerCall

__all__ = ["ClearAttnProcessor"]

NAME = "clear"
LOCAL, DENSE = 0, 1  # phases
POOL_WEIGHTS = "pool_weights"  # trained weight map of the cells, shape (pool, pool), beside a layer's own parameters
ROUNDING = 1e-6  # progress is a quotient of step numbers


@dataclass(frozen=True, kw_only=True)
class ClearAttnProcessor(AttnMethod):
    """Local attention in the self-attention of UNets and PixArt, and where pictures and text attend together.

    That is in FLUX, FLUX.2, Stable Diffusion 3, Qwen-Image and Z-Image.

    Any size, aspect ratio, batch and text length, in any order, in one process.

    Raises ValueError for a number outside its range, TypeError for a value of the wrong type.
    """

    radius: float = 16.0  # in tokens, >= 1; an image token sees those nearer than this; 8, 16, 32 are published
    pattern: Literal["disc", "square", "tile"] = "disc"  # as published; side 2 radius - 1; whole tiles
    tile: tuple[int, int] = (16, 16)  # rows and columns of a tile, for pattern="tile"
    radii: tuple[tuple[str, float], ...] = ()  # (regular expression for layer names, radius): the first that fits wins
    pool: int | None = None  # side of the cells whose mean every image token sees besides; None = no pooled keys
    pool_budget: int | None = 1024  # most pooled keys there may be, which keeps them linear; None = no limit
    # softmax scale away from the trained size, see ops.scale
    scale: Literal["none", "tokens", "tokens_x10", "visible"] | float = "none"
    trained: tuple[int, int, int] = (64, 64, 512)  # rows, columns and text tokens the weights were trained with
    start: float = 0.0  # fraction of the steps before which all tokens see each other, in [0, 1)
    until: float = 1.0  # fraction of the steps after which they do again, in (0, 1]
    backend: Literal["auto", "dense", "reference", "halo", "tile", "flex"] = "auto"  # who computes it; same numbers

    name: ClassVar[str] = NAME
    roles: ClassVar[tuple[str, ...]] = ("spatial", "joint")
    honours_padding: ClassVar[bool] = True
    any_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for radius in (self.radius, *(radius for _, radius in self.radii)):
            self.shape(radius)  # raises for a bad radius or tile
        if self.pool is not None:
            Pool(self.pool, self.pool_budget)
        for expression, _ in self.radii:
            try:
                re.compile(expression)
            except re.error as problem:
                raise ValueError(f"radii: {expression!r} is no regular expression: {problem}.") from None
        if min(self.trained[:2]) < 1 or self.trained[2] < 0:
            raise ValueError(
                f"trained is rows, columns and text tokens, got {self.trained}; FLUX at 1K: (64, 64, 512)."
            )
        if isinstance(self.scale, float) and not 0 < self.scale < float("inf"):
            raise ValueError(f"scale as a number must be finite and > 0, got {self.scale}; 1 is the layer's own.")
        if not 0 <= self.start < self.until <= 1:
            raise ValueError(
                f"start and until are fractions of the steps with 0 <= start < until <= 1, got {self.start} and "
                f"{self.until}; start=0.25 keeps the first quarter dense."
            )

    def shape(self, radius: float) -> Pattern:
        """The pattern for one radius."""
        if self.pattern == "disc":
            return Disc(radius)
        if self.pattern == "tile":
            return TileWindow(self.tile, radius)
        if radius < 1 or radius != int(radius):
            raise ValueError(f"pattern='square' needs a whole radius >= 1, got {radius}; its side is 2 radius - 1.")
        return Square(2 * int(radius) - 1)

    def pattern_of(self, layer: str) -> Pattern:
        """The pattern of the layer with this name."""
        own = (radius for expression, radius in self.radii if re.search(expression, layer))
        return self.shape(next(own, self.radius))

    @property
    def wants_tiles(self) -> bool:
        """The block-sparse kernel does."""
        return self.backend == "flex"

    @property
    def phased(self) -> bool:
        """True if some steps are dense."""
        return (self.start, self.until) != (0.0, 1.0)

    def phase(self, progress: float) -> int:
        """LOCAL from `start` to just before `until`, DENSE elsewhere."""
        begun, over = progress >= self.start - ROUNDING, self.until < 1 and progress >= self.until - ROUNDING
        return LOCAL if begun and not over else DENSE

    def outlook(self, context: Context, layers: Sequence[LayerInfo]) -> str:
        """Operations of the attention layers against dense ones: on the last grid that ran, else at usual sizes."""
        grids = list(context.grids.values()) or [(64, 64), (128, 128), (256, 256)]
        device, lines = context.device.type, []
        for height, width in grids:
            ours = stock = 0
            for layer in layers:
                others = context.text + context.references if layer.role == "joint" else 0
                layout, pattern = TokenLayout(height, width, before=others), self.pattern_of(layer.name)
                backend = choose(layout, pattern, pool=self._pool, backend=self.backend, device=device)
                ours += attention_flops(layout, pattern, backend, layer.width, pool=self._pool, device=device)
                stock += dense_flops(layout, layer.width)
            gain = stock / ours
            text = f" and {context.text} text tokens" if context.text else ""
            verdict = f"{gain:.1f} times fewer operations in these layers" if gain > 1.05 else "no gain at this size"
            lines.append(f"clear on {height} x {width}{text}: {verdict}, by {backend!r}")
        return "\n".join(lines)

    def new_parameters(self, layer: LayerInfo) -> dict[str, Tensor]:
        """The weight map of the pooled cells, which begins as their mean."""
        return {} if self.pool is None else {POOL_WEIGHTS: torch.full((self.pool, self.pool), self.pool**-2.0)}

    @property
    def _pool(self) -> Pool | None:
        return None if self.pool is None else Pool(self.pool, self.pool_budget)

    def prepare(self, context: Context) -> None:
        """Choose backends and make index tensors for all layers here: layers then only read them, also when compiled.

        Once per size: what a layer has from the call before is kept if it fits.
        """
        if context.strip is not None:
            return
        for installation in context.installations:
            if installation.method is self:
                for swap in installation.swaps:
                    held, kept = swap.ours.kept, {}
                    for grid in context.grids.values():
                        layout = layout_of(swap, context, grid)
                        kept[layout.tokens] = self._local(
                            swap.info.name, layout, context.device, context.model.dtype, held.get(layout.tokens)
                        )
                    swap.ours.kept = kept

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        """Attention of one layer, (B, N, heads * head_dim)."""
        strip = call.context.strip
        if phase == DENSE and strip is None:
            return call.softmax(call.q, call.k, call.v, mask=call.mask).flatten(2)
        settings: dict[str, Any] = {
            "pool_weights": call.extra(POOL_WEIGHTS),
            "key_valid": None if call.mask is None else call.mask[:, 0, 0],
            "softmax": None if call.native else call.softmax,
        }
        if strip is None:
            held = call.kept.get(call.layout.tokens)
            local = self._local(call.name, call.layout, call.q.device, call.q.dtype, held)
            out = attend(call.q, call.k, call.v, local.prepared, scale=call.scale * local.sharpness, **settings)
        elif phase == DENSE:
            out = strip_attention(call.q, call.k, call.v, call.whole, Dense(), strip, scale=call.scale, **settings)
        else:
            pattern = self.pattern_of(call.name)
            scale = call.scale * self._sharpness(call.whole, pattern)
            out = strip_attention(
                call.q, call.k, call.v, call.whole, pattern, strip, pool=self._pool, scale=scale, **settings
            )
        return out.flatten(2)

    def _local(
        self, layer: str, layout: TokenLayout, device: torch.device, dtype: torch.dtype, held: Local | None = None
    ) -> Local:
        """What a layer needs at this size: `held`, if it is that."""
        if held is not None and held.method is self:
            prepared = held.prepared
            if prepared.layout == layout and prepared.device == device and prepared.dtype == dtype:
                return held
        pattern = self.pattern_of(layer)
        prepared = prepare(layout, pattern, pool=self._pool, backend=self.backend, device=device, dtype=dtype)
        return Local(self, prepared, self._sharpness(layout, pattern))

    def _sharpness(self, layout: TokenLayout, pattern: Pattern) -> float:
        """The factor on the layer's own softmax scale."""
        rows, columns, text = self.trained
        trained = TokenLayout(rows, columns, before=text)
        return softmax_scale(self.scale, 1, layout, pattern, trained=trained, pool=self._pool)

    def strip_rows(self, layout: TokenLayout) -> int | None:
        """Pooled blocks must not be cut."""
        return 1 if self._pool is None else self._pool.factor * self._pool.merged(layout)


@dataclass(frozen=True, eq=False)
class Local:
    """What one layer needs at one size, by the settings of `method`."""

    method: ClearAttnProcessor
    prepared: Prepared
    sharpness: float


def layout_of(swap: Swap, context: Context, grid: tuple[int, int]) -> TokenLayout:
    """The sequence a layer of this call sees on this grid."""
    before, after = swap.ours.others(context)
    return TokenLayout(*grid, before=before, after=after, order=context.order)
