"""Merge similar image tokens before attention, and give every token its answer back afterwards.

Bipartite matching in the manner of token merging for diffusion (Bolya & Hoffman, arXiv 2303.17604). The token grid is
cut into cells; one token of each cell is a *destination*, all others are *sources*. Every source finds the destination
it resembles most (cosine). Merging the m sources that resemble theirs best leaves M = N - m tokens: the sources that
stay, then the destinations, each the mean of itself and what joined it. Written with the one-hot matrix P of shape
(M, N) that says which merged token each token went to::

    merge(x) = diag(1 / P 1) P x          unmerge(y) = P^T y

so one ranking serves any number of merges of different strength. `merge_matrix` and `match_reference` spell this out
with loops; everything else must agree with them. Matching has no gradient, merging and unmerging have the exact one.

Shapes: B batch, N = H * W tokens in raster order, C channels, D destinations, S = N - D sources.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Groups", "Matching", "cell_grid", "match", "match_reference", "merge_matrix", "split_tokens"]

MIN_NORM = 1e-6  # shorter tokens are not blown up to unit length
# Similarities held at once. A CPU is fastest when a block stays in its cache; a GPU wants blocks that fill it.
BLOCK_BYTES = {"cpu": 4 * 2**20, "other": 256 * 2**20}


@dataclass(frozen=True)
class Groups:
    """Which tokens have become one: the result of merging the m best ranked sources.

    Attributes:
        slot: merged token of every token, int64 in [0, M), shape (B, N).
        kept: raster index of the sources that stay alone, most willing to merge first, shape (B, S - m).
        joined: raster index of the sources that were merged, shape (B, m).
        target: destination (in [0, D)) each of `joined` went to, shape (B, m).
        destination: raster index of the destinations, shape (D,).
    """

    slot: Tensor
    kept: Tensor
    joined: Tensor
    target: Tensor
    destination: Tensor

    @property
    def tokens(self) -> int:
        """M, the number of tokens after merging."""
        return self.kept.shape[1] + self.destination.shape[0]

    @property
    def sizes(self) -> Tensor:
        """Tokens in each merged token, int64, shape (B, M); sums to N."""
        ones = torch.ones_like(self.slot)
        return torch.zeros_like(self.slot[:, : self.tokens]).scatter_add(1, self.slot, ones)

    def merge(self, x: Tensor) -> Tensor:
        """Mean of each group, shape (B, N, C) -> (B, M, C).

        16-bit inputs are summed in fp32. Sums are deterministic on CPU; CUDA adds in the order its threads arrive, so
        there the last bit may differ between runs.
        """
        if not self.joined.shape[1]:
            return torch.cat([_rows(x, self.kept), x.index_select(1, self.destination)], dim=1)
        wide = torch.promote_types(x.dtype, torch.float32)
        batch, _, channels = x.shape
        cells = self.destination.shape[0]
        sums = x.index_select(1, self.destination).to(wide).reshape(batch * cells, channels)
        joined = _rows(x, self.joined).to(wide).reshape(-1, channels)
        sums = sums.index_add(0, _flat(self.target, cells), joined).view(batch, cells, channels)
        count = self.sizes[:, self.kept.shape[1] :].to(wide).unsqueeze(-1)
        return torch.cat([_rows(x, self.kept), (sums / count).to(x.dtype)], dim=1)

    def unmerge(self, y: Tensor) -> Tensor:
        """Every token takes the value of the group it is in, shape (B, M, C) -> (B, N, C)."""
        return _rows(y, self.slot)


@dataclass(frozen=True)
class Matching:
    """The ranking of sources: who would join whom, best first.

    Attributes:
        source: raster index of the sources, shape (S,).
        destination: raster index of the destinations, shape (D,).
        best: most similar destination (in [0, D)) of each source, shape (B, S).
        order: sources (in [0, S)) by similarity to their destination, highest first, shape (B, S).
    """

    source: Tensor
    destination: Tensor
    best: Tensor
    order: Tensor

    def groups(self, m: int) -> Groups:
        """Merge the `m` best ranked sources; m outside [0, S] is clipped to it."""
        sources, cells = self.source.shape[0], self.destination.shape[0]
        m = max(0, min(m, sources))
        device = self.source.device
        joined, kept = self.order[:, :m], self.order[:, m:]
        target = self.best.gather(1, joined)

        # Slots: kept sources by rank, then destinations. Filled in (sources, destinations) order, then put in raster.
        slot = torch.empty_like(self.best).scatter(1, joined, target + (sources - m))
        slot = slot.scatter(1, kept, torch.arange(sources - m, device=device).expand_as(kept))
        alone = torch.arange(sources - m, sources - m + cells, device=device).expand(slot.shape[0], cells)
        raster = _inverse(torch.cat([self.source, self.destination]))
        slot = torch.cat([slot, alone], dim=1).index_select(1, raster)
        return Groups(slot, self.source[kept], self.source[joined], target, self.destination)


def match(x: Tensor, source: Tensor, destination: Tensor, *, block_bytes: int | None = None) -> Matching:
    """Rank the sources of `x` by their likeness to a destination, without gradient and in fp32 (fp64 for fp64).

    The S x D similarities are made in blocks, so memory stays bounded at any image size (2048 px: 61440 x 4096).

    Args:
        x: tokens, shape (B, N, C).
        source, destination: raster indices from `split_tokens`.
        block_bytes: similarities held at once, in bytes; None chooses by device.
    """
    if block_bytes is None:
        block_bytes = BLOCK_BYTES["cpu" if x.device.type == "cpu" else "other"]
    with torch.no_grad():
        unit = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)
        sources = unit.index_select(1, source)
        cells = unit.index_select(1, destination).transpose(1, 2)
        bytes_per_row = cells.shape[0] * cells.shape[2] * cells.element_size()
        rows = max(1, block_bytes // bytes_per_row)
        blocks = [torch.bmm(part, cells).max(dim=-1) for part in sources.split(rows, dim=1)]
        likeness = torch.cat([values for values, _ in blocks], dim=1)
        best = torch.cat([index for _, index in blocks], dim=1)
        order = likeness.sort(dim=1, descending=True, stable=True).indices
    return Matching(source, destination, best, order)


def cell_grid(grid: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int, int, int]:
    """(sy, sx, rows, columns): the cell, shrunk where the grid is smaller, and how many whole cells fit."""
    (height, width), (sy, sx) = grid, (min(cell[0], grid[0]), min(cell[1], grid[1]))
    return sy, sx, height // sy, width // sx


def split_tokens(
    grid: tuple[int, int], cell: tuple[int, int], picks: Tensor | None = None, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Raster indices of sources and destinations.

    Pure index arithmetic: no sort and no data-dependent shape, so it traces into one graph.

    Args:
        grid: (H, W) in tokens.
        cell: (sy, sx) in tokens, one destination in each; leftover rows and columns at the edges are sources.
        picks: which token of its cell is the destination, int64 in [0, sy * sx), one per cell, shape (rows * columns,)
            for the numbers of `cell_grid`; None takes the centre.

    Returns:
        source, shape (S,), cell by cell and then the edges; destination, shape (D,), cells in raster order.
    """
    height, width = grid
    sy, sx, rows, columns = cell_grid(grid, cell)
    if picks is None:
        picks = torch.full((rows * columns,), (sy // 2) * sx + sx // 2, device=device)
    device = picks.device
    corner = (torch.arange(rows, device=device) * (sy * width))[:, None] + torch.arange(columns, device=device) * sx
    corner = corner.reshape(-1, 1)

    def raster(inside: Tensor) -> Tensor:  # (D, k) positions in the cell -> raster indices
        return corner + inside.div(sx, rounding_mode="floor") * width + inside % sx

    picks = picks.reshape(-1, 1)
    others = torch.arange(sy * sx - 1, device=device).expand(rows * columns, -1)
    others = others + (others >= picks)  # skip the destination
    right = torch.arange(rows * sy, device=device)[:, None] * width + torch.arange(columns * sx, width, device=device)
    below = torch.arange(rows * sy * width, height * width, device=device)
    source = torch.cat([raster(others).reshape(-1), right.reshape(-1), below])
    return source, raster(picks).reshape(-1)


def match_reference(x: Tensor, source: Tensor, destination: Tensor) -> Matching:
    """`match`, one source at a time. For reading and for tests."""
    tokens = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    best, order = [], []
    for sample in tokens:
        unit = torch.stack([token / max(float(token.norm()), MIN_NORM) for token in sample])
        likeness = [[float(unit[i] @ unit[j]) for j in destination.tolist()] for i in source.tolist()]
        nearest = [max(range(len(row)), key=row.__getitem__) for row in likeness]
        value = [row[index] for row, index in zip(likeness, nearest, strict=True)]
        best.append(nearest)
        order.append(sorted(range(len(value)), key=value.__getitem__, reverse=True))
    shape = (x.shape[0], source.shape[0])
    as_index = {"dtype": torch.int64, "device": x.device}
    return Matching(
        source, destination, torch.tensor(best, **as_index).view(shape), torch.tensor(order, **as_index).view(shape)
    )


def merge_matrix(matching: Matching, m: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """One-hot P of shape (B, M, N): P[b, i, j] = 1 where token j went to merged token i. For reading and for tests."""
    batch, sources = matching.best.shape
    cells = matching.destination.shape[0]
    kept = sources - m
    matrix = torch.zeros(batch, kept + cells, sources + cells, dtype=dtype, device=matching.best.device)
    for b in range(batch):
        for rank, s in enumerate(matching.order[b].tolist()):
            row = kept + int(matching.best[b, s]) if rank < m else rank - m
            matrix[b, row, matching.source[s]] = 1
        for d, token in enumerate(matching.destination.tolist()):
            matrix[b, kept + d, token] = 1
    return matrix


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]] for every b, i: (B, N, C), (B, M) -> (B, M, C); whole rows, fast and with a cheap gradient."""
    batch, tokens, channels = x.shape
    return x.reshape(batch * tokens, channels).index_select(0, _flat(index, tokens)).view(batch, -1, channels)


def _flat(index: Tensor, tokens: int) -> Tensor:
    """Indices into `tokens` rows per sample -> indices into the rows of all samples, shape (B * M,)."""
    start = torch.arange(index.shape[0], device=index.device).unsqueeze(1) * tokens
    return (index + start).reshape(-1)


def _inverse(permutation: Tensor) -> Tensor:
    index = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(permutation).scatter(0, permutation, index)
