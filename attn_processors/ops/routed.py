"""Bi-level routing: every tile of queries attends to the few tiles of keys that fit it best (BiFormer, arXiv 2303.08810).

With the mean query and key of each tile, all heads side by side (section 3.2)::

    A     = mean q  mean k^T                          (n, n) for n tiles
    R(t)  = the `topk` tiles u with the largest A_tu
    out_i = softmax over the keys in the tiles R(tile of i), and over all global keys

What is chosen is the same for all heads and all queries of a tile, so the keys are gathered as whole tiles and the softmax
needs no mask, but for short tiles at ragged edges, which are filled up. The choice itself has no gradient. The softmax costs
4 C operations for each of N (topk tile + T) pairs, which is linear in the N tokens of the picture; the choice another
2 C n^2, little for tiles of 8 x 8 tokens up to pictures of 8K pixels.

Shapes: (B, N, h, d), the layout of diffusers' attention dispatcher; N grid tokens in raster order, Q tokens in a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["routed_attention", "routed_reference", "routes"]

Softmax = Callable[..., Tensor]  # softmax(q, k, v, scale=..., mask=...)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: tuple[Tensor, Tensor] | None,
    grid: tuple[int, int],
    *,
    tile: tuple[int, int],
    topk: int,
    scale: float,
    softmax: Softmax,
    seen: Tensor | None = None,
) -> Tensor:
    """Attention of grid tokens to the tiles they are routed to, and to global tokens.

    Args:
        q, k, v: grid tokens, shape (B, N, h, d).
        others: keys and values of the global tokens, (B, T, h, d) each.
        grid: (H, W), H * W == N.
        tile: rows and columns of a tile.
        topk: tiles each tile sees; all there are if there are fewer.
        scale: what logits are multiplied with.
        softmax: fused attention on (B, M, h, d), with a bool mask that broadcasts to (B, h, M, K), or None.
        seen: False hides a global token, bool, shape (B, T).

    Returns:
        shape (B, N, h, d).
    """
    batch = q.shape[0]
    members, real = _members(grid, tile, q.device)
    tiles, per_tile = members.shape
    chosen = routes(q, k, grid, tile, topk)  # (B, n, K)
    offsets = torch.arange(batch, device=q.device).view(-1, 1) * q.shape[1]

    def rows(x: Tensor, index: Tensor) -> Tensor:
        """Tokens of each sample by index (B, n, M), as (B * n, M, h, d)."""
        found = x.flatten(0, 1).index_select(0, (index.flatten(1) + offsets).flatten())
        return found.view(batch * tiles, -1, *x.shape[2:])

    queries = rows(q, members.expand(batch, -1, -1))
    keys, values = (rows(x, members[chosen].flatten(2)) for x in (k, v))
    visible = None if _whole(grid, tile) else real[chosen].flatten(2).flatten(0, 1)  # (B * n, K * Q)
    if others is not None:
        keys, values = (
            torch.cat([x, other.repeat_interleave(tiles, dim=0)], 1)
            for x, other in zip((keys, values), others, strict=True)
        )
        if visible is not None or seen is not None:
            window = chosen.shape[-1] * per_tile
            near = q.new_ones(batch * tiles, window, dtype=torch.bool) if visible is None else visible
            far = near.new_ones(batch, others[0].shape[1]) if seen is None else seen
            visible = torch.cat([near, far.repeat_interleave(tiles, dim=0)], 1)
    out = softmax(queries, keys, values, scale=scale, mask=None if visible is None else visible[:, None, None])
    return out.reshape(batch, tiles * per_tile, *q.shape[2:]).index_select(1, _places(grid, tile, q.device))


def routes(q: Tensor, k: Tensor, grid: tuple[int, int], tile: tuple[int, int], topk: int) -> Tensor:
    """The tiles each tile of queries sees: int64 (B, n, min(topk, n)), n tiles in raster order."""
    with torch.no_grad():
        members, real = _members(grid, tile, q.device)
        weight = (real / real.sum(1, keepdim=True)).to(torch.promote_types(q.dtype, torch.float32))
        mean_q, mean_k = (
            torch.einsum("bnqc,nq->bnc", x.flatten(2)[:, members].to(weight.dtype), weight) for x in (q, k)
        )
        scores = mean_q @ mean_k.transpose(1, 2)
        return scores.topk(min(topk, len(members)), dim=-1).indices


def routed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: tuple[Tensor, Tensor] | None,
    grid: tuple[int, int],
    *,
    tile: tuple[int, int],
    topk: int,
    scale: float,
    seen: Tensor | None = None,
) -> Tensor:
    """`routed_attention` with the N x (N + T) mask written out. For reading and for tests."""
    batch, tokens = q.shape[:2]
    columns = -(-grid[1] // tile[1])
    own = torch.tensor([i // grid[1] // tile[0] * columns + i % grid[1] // tile[1] for i in range(tokens)])
    count = int(own.max()) + 1
    mask = torch.zeros(batch, tokens, tokens, dtype=torch.bool)
    for b in range(batch):
        means = [torch.stack([x[b, own == t].flatten(1).mean(0) for t in range(count)]) for x in (q, k)]
        for t, scores in enumerate(means[0] @ means[1].T):
            for u in scores.argsort(descending=True)[:topk]:
                mask[b] |= (own == t)[:, None] & (own == u)
    if others is not None:
        k, v = (torch.cat([x, other], 1) for x, other in zip((k, v), others, strict=True))
        far = torch.ones(batch, others[0].shape[1], dtype=torch.bool) if seen is None else seen
        mask = torch.cat([mask, far[:, None].expand(-1, tokens, -1)], 2)
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1), v)


def _members(grid: tuple[int, int], tile: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Raster indices of each tile's tokens, int64 (n, Q), and which are real, bool (n, Q): short tiles are filled up."""
    lines = []
    for size, side in zip(grid, tile, strict=True):
        lines.append(torch.arange(-(-size // side) * side, device=device).view(-1, side))
    rows, columns = lines[0][:, None, :, None], lines[1][None, :, None, :]
    index = rows.clamp_max(grid[0] - 1) * grid[1] + columns.clamp_max(grid[1] - 1)
    real = (rows < grid[0]) & (columns < grid[1])
    return index.flatten(2).flatten(0, 1), real.flatten(2).flatten(0, 1)


def _places(grid: tuple[int, int], tile: tuple[int, int], device: torch.device) -> Tensor:
    """Where each grid token is among the tokens of all tiles, (N,)."""
    rows, columns = torch.arange(grid[0], device=device)[:, None], torch.arange(grid[1], device=device)
    across = -(-grid[1] // tile[1])
    number = rows // tile[0] * across + columns // tile[1]
    return (number * (tile[0] * tile[1]) + rows % tile[0] * tile[1] + columns % tile[1]).flatten()


def _whole(grid: tuple[int, int], tile: tuple[int, int]) -> bool:
    return not (grid[0] % tile[0] or grid[1] % tile[1])
