"""Which grid tokens a grid token sees.

Let p(i) be the (row, column) of token i and r a radius. Query i sees key j if and only if

    Disc(r)           |p(i) - p(j)|^2 < r^2                                     (CLEAR, arXiv 2412.16112)
    Square(k)         both differences are at most (k - 1) / 2; at a border the square is cut off, or moved inward
                      until it has k x k keys again (neighbourhood attention, arXiv 2403.04690)
    TileWindow(t, r)  the tile of j is nearer than r to the tile of i, measured between their nearest tokens
                      (sliding tiles, arXiv 2502.04507)
    Dense()           always

Distances are integers, so the comparison is exact: r^2 is taken as the fraction the float stands for, and `limit` is
the largest squared distance below it. r < 1 would leave a token that does not even see itself. Global tokens are not
the pattern's business: they see and are seen by all.

`visible` is the truth the backends are tested against. Coordinates have shape (..., 2), int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from .layout import TokenLayout

__all__ = ["Dense", "Disc", "Pattern", "Square", "TileWindow"]


class Pattern:
    """What the backends ask of a pattern."""

    def sees(self, query: Tensor, key: Tensor, shape: tuple[int, int]) -> Tensor:
        """Whether query sees key: (..., 2), (..., 2) -> bool (...), on a grid of `shape` (H, W)."""
        raise NotImplementedError

    def window(self, axis: int, i: int, size: int) -> tuple[int, int]:
        """[first, end) of the keys that position `i` may see along `axis`, on a grid with `size` tokens there.

        Exact or too wide, never too narrow; neither end goes back as `i` grows.
        """
        raise NotImplementedError

    def key_counts(self, layout: TokenLayout) -> Tensor:
        """Number of grid keys each grid query sees, in the layout's order, int64, shape (N,)."""
        raise NotImplementedError

    def covers(self, layout: TokenLayout) -> bool:
        """Whether every grid query sees the whole grid."""
        raise NotImplementedError

    def visible(self, layout: TokenLayout) -> Tensor:
        """Who sees whom among the grid tokens, in the layout's order, bool, shape (N, N): [query, key]."""
        place = layout.coordinates()
        return self.sees(place[:, None], place[None], layout.shape)


@dataclass(frozen=True)
class Disc(Pattern):
    """All keys nearer than `radius`, in tokens: about pi r^2 of them, 193, 793, 3205 for r = 8, 16, 32."""

    radius: float

    def __post_init__(self) -> None:
        _check_radius(self.radius)

    @property
    def limit(self) -> int:
        """Largest squared distance seen."""
        return _limit(self.radius)

    @property
    def reach(self) -> int:
        """Largest difference along one axis."""
        return math.isqrt(self.limit)

    def sees(self, query: Tensor, key: Tensor, shape: tuple[int, int]) -> Tensor:
        return (query - key).square().sum(dim=-1) <= self.limit

    def window(self, axis: int, i: int, size: int) -> tuple[int, int]:
        return max(0, i - self.reach), min(size, i + self.reach + 1)

    def key_counts(self, layout: TokenLayout) -> Tensor:
        height, width = layout.shape
        reach = min(self.reach, height - 1)
        rows, columns = torch.arange(height), torch.arange(width)
        counts = torch.zeros(height, width, dtype=torch.int64)
        for dy in range(-reach, reach + 1):  # one chord of the disc after the other
            half = math.isqrt(self.limit - dy * dy)
            chord = (columns + half).clamp_max(width - 1) - (columns - half).clamp_min(0) + 1
            counts += ((rows + dy >= 0) & (rows + dy < height))[:, None] * chord
        return counts.view(-1)[layout.raster()]

    def covers(self, layout: TokenLayout) -> bool:
        return (layout.height - 1) ** 2 + (layout.width - 1) ** 2 <= self.limit


@dataclass(frozen=True)
class Square(Pattern):
    """A square of `side` x `side` keys around each query.

    Attributes:
        side: odd number of tokens.
        border: "truncate" cuts the square off at the edge of the picture, so border tokens see fewer keys; "shift"
            moves it inward, so that each token sees side x side keys (all there are on an axis shorter than that).
    """

    side: int
    border: Literal["truncate", "shift"] = "truncate"

    def __post_init__(self) -> None:
        if self.side < 1 or self.side % 2 == 0:
            raise ValueError(f"the side of a square is an odd number of tokens >= 1, got {self.side!r}.")
        if self.border not in ("truncate", "shift"):
            raise ValueError(f"no such border rule: {self.border!r}; choose 'truncate' or 'shift'.")

    def sees(self, query: Tensor, key: Tensor, shape: tuple[int, int]) -> Tensor:
        seen = True
        for axis, size in enumerate(shape):
            first, end = self.bounds(query[..., axis], size)
            seen = seen & (key[..., axis] >= first) & (key[..., axis] < end)
        return seen

    def bounds(self, i: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """`window` for many positions at once."""
        half = self.side // 2
        if self.border == "shift":
            first = (i - half).clamp(0, max(size - self.side, 0))
            return first, first + min(self.side, size)
        return (i - half).clamp_min(0), (i + half + 1).clamp_max(size)

    def window(self, axis: int, i: int, size: int) -> tuple[int, int]:
        half = self.side // 2
        if self.border == "shift":
            first = min(max(i - half, 0), max(size - self.side, 0))
            return first, first + min(self.side, size)
        return max(0, i - half), min(size, i + half + 1)

    def key_counts(self, layout: TokenLayout) -> Tensor:
        (y0, y1), (x0, x1) = (self.bounds(torch.arange(size), size) for size in layout.shape)
        return ((y1 - y0)[:, None] * (x1 - x0)).view(-1)[layout.raster()]

    def covers(self, layout: TokenLayout) -> bool:
        if self.border == "shift":
            return self.side >= max(layout.shape)
        return self.side // 2 >= max(layout.shape) - 1


@dataclass(frozen=True)
class TileWindow(Pattern):
    """Whole tiles: a query sees all keys of the tiles whose distance to its own tile is below `radius`.

    Neighbouring tiles are at distance 1, so `radius=2` gives a window of 3 x 3 tiles. All queries of a tile see the
    same keys, so no mask is needed.

    Attributes:
        tile: rows and columns of a tile; tiles at the right and lower edge may be short.
        radius: in tokens.
    """

    tile: tuple[int, int] = (16, 16)
    radius: float = 2.0

    def __post_init__(self) -> None:
        _check_radius(self.radius)
        tile = self.tile
        if not isinstance(tile, Sequence) or len(tile) != 2 or not all(isinstance(t, int) and t >= 1 for t in tile):
            raise ValueError(f"a tile is (rows, columns), both at least 1, got {self.tile!r}.")
        object.__setattr__(self, "tile", (tile[0], tile[1]))  # a list, as JSON gives it, would not be hashable

    @property
    def limit(self) -> int:
        """Largest squared distance seen."""
        return _limit(self.radius)

    def gap(self, a: Tensor, b: Tensor, axis: int) -> Tensor:
        """Distance along one axis between the nearest tokens of the tiles with numbers `a` and `b`."""
        side = self.tile[axis]
        lower, upper = torch.minimum(a, b), torch.maximum(a, b)
        # Only the last tile can be short and it is never the lower of two, so the lower one ends at its full side.
        return torch.where(a == b, 0, upper * side - (lower * side + side - 1))

    def sees(self, query: Tensor, key: Tensor, shape: tuple[int, int]) -> Tensor:
        squared = torch.zeros((), dtype=torch.int64, device=query.device)
        for axis in range(2):
            a, b = (x[..., axis].div(self.tile[axis], rounding_mode="floor") for x in (query, key))
            squared = squared + self.gap(a, b, axis).square()
        return squared <= self.limit

    def window(self, axis: int, i: int, size: int) -> tuple[int, int]:
        side, reach = self.tile[axis], math.isqrt(self.limit)
        # Tiles n apart have a gap of (n - 1) * side + 1, so the farthest tile in reach is this many tiles away.
        rings = (reach - 1) // side + 1 if reach else 0
        own = i // side
        return max(0, own - rings) * side, min(size, (own + rings + 1) * side)

    def key_counts(self, layout: TokenLayout) -> Tensor:
        sides, gaps, numbers = [], [], []
        for axis, size in enumerate(layout.shape):
            number = torch.arange(size).div(self.tile[axis], rounding_mode="floor")
            tiles = torch.arange(int(number[-1]) + 1)
            numbers.append(number)
            sides.append(number.bincount())
            gaps.append(self.gap(tiles[:, None], tiles, axis).square())
        rows = []
        for gap in gaps[0]:  # one row of query tiles after the other: (key rows, query columns, key columns)
            seen = gap[:, None, None] + gaps[1] <= self.limit
            rows.append(torch.einsum("y,yqx,x->q", sides[0], seen.to(torch.int64), sides[1]))
        counts = torch.stack(rows)[numbers[0]][:, numbers[1]]
        return counts.reshape(-1)[layout.raster()]

    def covers(self, layout: TokenLayout) -> bool:
        squared = 0
        for axis, size in enumerate(layout.shape):
            last = (size - 1) // self.tile[axis]
            squared += ((last - 1) * self.tile[axis] + 1) ** 2 if last else 0
        return squared <= self.limit


@dataclass(frozen=True)
class Dense(Pattern):
    """Every token sees every token."""

    def sees(self, query: Tensor, key: Tensor, shape: tuple[int, int]) -> Tensor:
        return torch.ones_like((query - key)[..., 0], dtype=torch.bool)

    def window(self, axis: int, i: int, size: int) -> tuple[int, int]:
        return 0, size

    def key_counts(self, layout: TokenLayout) -> Tensor:
        return torch.full((layout.grid_tokens,), layout.grid_tokens)

    def covers(self, layout: TokenLayout) -> bool:
        return True


def _check_radius(radius: float) -> None:
    if not (math.isfinite(radius) and radius >= 1):
        raise ValueError(f"a radius is a finite number of tokens >= 1, so that a token sees itself; got {radius!r}.")


def _limit(radius: float) -> int:
    """Largest integer below radius^2, without rounding."""
    return math.ceil(Fraction(radius) ** 2) - 1
