"""Pooled keys: a coarse view of the whole picture next to a sharp view of the surroundings.

Keys and values of the grid, after rotary embedding, are averaged over cells of f x f tokens with one weight map w, shared
by K, V, heads and channels::

    cell = sum(w x) * sum(w) / sum(w where there are tokens)

The last factor is 1 for whole cells and makes up for what a cell at a ragged edge lacks. Every grid query sees all
pooled keys, N / f^2 of them, which grows with the picture: at 8192 pixels it would be the most expensive part of the
layer. So a budget holds their number: with the smallest m for which ceil(H / fm) * ceil(W / fm) <= budget, blocks of
m x m cells are averaged to one key, whose logit gets + log(number of cells in the block), so that it weighs as much
in the softmax as the cells it stands for. While the cells fit the budget, m = 1 and nothing changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import TokenLayout

__all__ = ["Pool", "pool_bias", "pool_grid", "pool_grid_reference"]


@dataclass(frozen=True)
class Pool:
    """How the grid is pooled.

    Attributes:
        factor: side of a cell in tokens; larger = coarser and cheaper.
        budget: most pooled keys there may be; None = no limit, and a cost that grows with the square of the tokens.
    """

    factor: int
    budget: int | None = 1024

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"a pooling factor is a side in tokens, at least 1, got {self.factor}.")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"a pooling budget is at least 1 key, got {self.budget}; None means no limit.")

    def merged(self, layout: TokenLayout) -> int:
        """m, the side in cells of the block that one pooled key stands for."""
        m = 1
        if self.budget is not None:
            while _blocks(layout, self.factor * m) > self.budget:
                m += 1
        return m

    def keys(self, layout: TokenLayout) -> int:
        """P, the number of pooled keys."""
        return _blocks(layout, self.factor * self.merged(layout))


def pool_grid(
    x: Tensor, layout: TokenLayout, pool: Pool, weights: Tensor | None = None, *, part_of: TokenLayout | None = None
) -> Tensor:
    """Pool the grid tokens of a sequence; differentiable in `x` and `weights`.

    Args:
        x: keys or values of the whole sequence, shape (B, tokens, h, d).
        layout: where its grid tokens are.
        weights: w, shape (f, f); None = the mean.
        part_of: the whole picture, if `layout` is a strip of its rows that cuts no block: its blocks are pooled.

    Returns:
        Pooled tokens, blocks in raster order, shape (B, P, h, d).
    """
    f, m = pool.factor, pool.merged(part_of or layout)
    w = _weights(x, pool, weights)
    rows, columns = (math.ceil(size / f) for size in layout.shape)
    grid = x[:, layout.grid]
    if layout.order != "raster":
        grid = grid.index_select(1, layout.positions(x.device))
    plane = grid.reshape(x.shape[0], layout.height, layout.width, -1)
    bottom, right = rows * f - layout.height, columns * f - layout.width
    plane = F.pad(plane, (0, 0, 0, right, 0, bottom)).view(x.shape[0], rows, f, columns, f, -1)
    cells = torch.einsum("bryscz,yc->brsz", plane, w.to(x.dtype))  # s: columns of cells, z: heads and channels

    there = F.pad(w.new_ones(layout.shape), (0, right, 0, bottom)).view(rows, f, columns, f)
    share = torch.einsum("rysc,yc->rs", there, w)
    cells = cells * (w.sum() / share).to(x.dtype).unsqueeze(-1)
    if m > 1:
        bottom, right = -rows % m, -columns % m
        blocks = F.pad(cells, (0, 0, 0, right, 0, bottom))
        blocks = blocks.view(x.shape[0], (rows + bottom) // m, m, (columns + right) // m, m, -1).sum(dim=(2, 4))
        cells = blocks / _cells_per_block(layout, f, m, x.device).to(x.dtype).unsqueeze(-1)
    return cells.reshape(x.shape[0], -1, *x.shape[2:])


def pool_bias(layout: TokenLayout, pool: Pool, device: torch.device | None = None) -> Tensor | None:
    """What to add to the logits of the pooled keys, fp64, shape (P,); None if nothing (m = 1)."""
    if pool.merged(layout) == 1:
        return None
    return _cells_per_block(layout, pool.factor, pool.merged(layout), device).to(torch.float64).log().view(-1)


def pool_grid_reference(x: Tensor, layout: TokenLayout, pool: Pool, weights: Tensor | None = None) -> Tensor:
    """`pool_grid`, one cell at a time. For reading and for tests."""
    f, m = pool.factor, pool.merged(layout)
    w = _weights(x, pool, weights).to(x.dtype)
    (height, width), grid = layout.shape, x[:, layout.grid]
    at = layout.positions(x.device).view(height, width)
    blocks: dict[tuple[int, int], list[Tensor]] = {}
    for top in range(0, height, f):
        for left in range(0, width, f):
            inside = [(y, c) for y in range(f) for c in range(f) if top + y < height and left + c < width]
            total = sum(w[y, c] * grid[:, at[top + y, left + c]] for y, c in inside)
            cell = total * w.sum() / sum(w[y, c] for y, c in inside)
            blocks.setdefault((top // (f * m), left // (f * m)), []).append(cell)
    return torch.stack([torch.stack(cells).mean(dim=0) for _, cells in sorted(blocks.items())], dim=1)


def _blocks(layout: TokenLayout, side: int) -> int:
    return math.ceil(layout.height / side) * math.ceil(layout.width / side)


def _cells_per_block(layout: TokenLayout, factor: int, m: int, device: torch.device | None) -> Tensor:
    """Number of cells in each block, int64, shape (rows of blocks, columns of blocks)."""
    sides = []
    for size in layout.shape:
        cells = math.ceil(size / factor)
        sides.append(torch.tensor([min(m, cells - start) for start in range(0, cells, m)], device=device))
    return sides[0][:, None] * sides[1]


def _weights(x: Tensor, pool: Pool, weights: Tensor | None) -> Tensor:
    f = pool.factor
    if weights is None:
        return torch.full((f, f), 1 / f**2, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    if weights.shape != (f, f):
        raise ValueError(f"the weight map of a pool of factor {f} has shape ({f}, {f}), got {tuple(weights.shape)}.")
    return weights
