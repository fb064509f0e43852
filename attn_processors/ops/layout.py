"""Where the tokens of a sequence lie in the picture.

A sequence is [globals | grid | globals]. *Grid* tokens are the H x W tokens of the picture, each with a coordinate
(row, column). *Global* tokens (text, reference pictures, registers) have none; they are seen by all and see all.
Flux puts the text before the grid, Stable Diffusion 3 after it.

Grid tokens lie in raster order or in tile order: the grid is cut into tiles of 8 x 16 tokens, tiles follow each other
in raster order and so do the tokens inside each. A tile at the right or lower edge may be short; nothing is padded, so
tile order is a permutation of the same N tokens. 128 tokens in a row are then neighbours in both directions, which is
what kernels that work on blocks of keys want. Attention is the only operator of a transformer that mixes tokens, so any
order gives the same numbers; it only has to be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["TILE", "Order", "TokenLayout", "inverse", "tile_order"]

TILE = (8, 16)  # rows, columns; 128 tokens, the block of block-sparse kernels

Order = Literal["raster", "tile"]


@dataclass(frozen=True)
class TokenLayout:
    """The places of the tokens in a sequence of `tokens` = before + height * width + after.

    Attributes:
        height, width: the token grid.
        before, after: number of global tokens before and after the grid tokens.
        order: how the grid tokens follow each other, "raster" or "tile".
    """

    height: int
    width: int
    before: int = 0
    after: int = 0
    order: Order = "raster"

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a token grid needs at least one row and one column, got {self.height} x {self.width}.")
        if self.before < 0 or self.after < 0:
            raise ValueError(f"numbers of global tokens are not negative, got {self.before=} and {self.after=}.")
        if self.order not in ("raster", "tile"):
            raise ValueError(f"no such token order: {self.order!r}; choose 'raster' or 'tile'.")

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)"""
        return self.height, self.width

    @property
    def grid_tokens(self) -> int:
        """N = H * W."""
        return self.height * self.width

    @property
    def global_tokens(self) -> int:
        """T, all tokens without a place in the picture."""
        return self.before + self.after

    @property
    def tokens(self) -> int:
        """N + T, the length of the sequence."""
        return self.grid_tokens + self.global_tokens

    @property
    def grid(self) -> slice:
        """The grid tokens in the sequence."""
        return slice(self.before, self.before + self.grid_tokens)

    @property
    def leading(self) -> slice:
        """The global tokens before the grid."""
        return slice(0, self.before)

    @property
    def trailing(self) -> slice:
        """The global tokens after the grid."""
        return slice(self.before + self.grid_tokens, self.tokens)

    def raster(self, device: torch.device | None = None) -> Tensor:
        """Raster index of each grid token as they lie in the sequence, int64, shape (N,)."""
        if self.order == "tile":
            return tile_order(self.height, self.width, device=device)
        return torch.arange(self.grid_tokens, device=device)

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Where each raster index lies among the grid tokens: the inverse of `raster`, int64, shape (N,)."""
        return inverse(self.raster(device))

    def coordinates(self, device: torch.device | None = None) -> Tensor:
        """(row, column) of each grid token as they lie in the sequence, int64, shape (N, 2)."""
        raster = self.raster(device)
        return torch.stack([raster.div(self.width, rounding_mode="floor"), raster % self.width], dim=1)

    def globals_of(self, x: Tensor) -> Tensor:
        """The global tokens of a sequence, first to last: (B, tokens, ...) -> (B, T, ...)."""
        if not self.after:
            return x[:, self.leading]
        if not self.before:
            return x[:, self.trailing]
        return torch.cat([x[:, self.leading], x[:, self.trailing]], dim=1)

    def assemble(self, grid: Tensor, others: Tensor) -> Tensor:
        """Put a sequence together: grid (B, N, ...) and globals (B, T, ...) -> (B, tokens, ...)."""
        if not self.global_tokens:
            return grid
        return torch.cat([others[:, : self.before], grid, others[:, self.before :]], dim=1)


def tile_order(height: int, width: int, tile: tuple[int, int] = TILE, *, device: torch.device | None = None) -> Tensor:
    """Raster indices in tile order: macro raster of tiles, raster inside, short tiles at ragged edges.

    x[:, tile_order(...)] goes from raster to tile order; `inverse` of it goes back.

    Returns:
        int64, shape (height * width,).
    """
    rows, columns = tile
    if rows < 1 or columns < 1:
        raise ValueError(f"a tile needs at least one row and one column, got {rows} x {columns}.")
    raster = torch.arange(height * width, device=device).view(height, width)
    strips = raster.split(rows, dim=0)
    return torch.cat([part.reshape(-1) for strip in strips for part in _tiles(strip, columns)])


def inverse(permutation: Tensor) -> Tensor:
    """The permutation that undoes a permutation, shape (N,) -> (N,)."""
    index = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(permutation).scatter(0, permutation, index)


def _tiles(strip: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Whole tiles of a strip in one copy, then the short one: (rows, W) -> (tiles, rows, columns), (rows, rest)."""
    rows, width = strip.shape
    whole = width // columns * columns
    return strip[:, :whole].reshape(rows, -1, columns).transpose(0, 1), strip[:, whole:]
