"""Local attention of a picture whose rows lie on several ranks: the same numbers as on one.

A rank holds a strip of rows of the token grid and a copy of all global tokens. Per layer it needs

- the keys and values of the rows its queries reach: its own and a halo, which is about R rows per neighbour, more ranks'
  where strips are thinner than that;
- pooled keys: every rank pools the cells of its own strip, whose edges are multiples of a block, and all share them;
- for the global queries, which see everything: each rank attends to its own grid keys (the first one to the global keys,
  too) and the parts are merged by their log-sum-exp, which is exact. All ranks add them up in the same order, so their
  copies of the global tokens stay equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import Comm, Span
from .halo import Softmax, attend_tiles, default_side, plan_tiles
from .layout import TokenLayout
from .local import sdpa
from .parts import attend_part, merge_parts
from .patterns import Pattern
from .pool import Pool, pool_grid

__all__ = ["Strip", "strip_attention"]


@dataclass(frozen=True, eq=False)
class Strip:
    """This rank's part of the grid.

    Attributes:
        comm: the ranks.
        parts: rows of the whole token grid on each rank, [first, end).
    """

    comm: Comm
    parts: tuple[Span, ...]

    @property
    def rows(self) -> Span:
        return self.parts[self.comm.rank]

    def layout(self, whole: TokenLayout) -> TokenLayout:
        """What this rank's sequence looks like."""
        first, end = self.rows
        return TokenLayout(end - first, whole.width, before=whole.before, after=whole.after)


def strip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    whole: TokenLayout,
    pattern: Pattern,
    strip: Strip,
    *,
    pool: Pool | None = None,
    pool_weights: Tensor | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    softmax: Softmax | None = None,
) -> Tensor:
    """`local_attention` of one rank; every rank of the strip calls it.

    Args:
        q, k, v: this rank's sequence, globals and own grid rows, shape (B, tokens of the strip, h, d).
        whole: the layout of the picture on all ranks together, in raster order.
        key_valid: False hides a global key, bool, shape (B, tokens of the strip).
        The rest as for `local_attention`.

    Returns:
        shape (B, tokens of the strip, h, d).

    Raises:
        ValueError: for a pool whose blocks the strips cut.
        RankLost: another rank is gone.
    """
    softmax, scale = softmax or sdpa, q.shape[-1] ** -0.5 if scale is None else scale
    comm, width, own = strip.comm, whole.width, strip.layout(whole)
    reached = [_reached(pattern, rows, whole.height) for rows in strip.parts]
    first, end = reached[comm.rank]
    both = torch.stack([k[:, own.grid], v[:, own.grid]])  # keys and values in one message
    owned, wanted = ([(a * width, b * width) for a, b in spans] for spans in (strip.parts, reached))
    grid_k, grid_v = comm.collect(both, owned, wanted, dim=2)

    near = TokenLayout(end - first, width, before=whole.before, after=whole.after)
    keys, values = (near.assemble(grid, own.globals_of(x)) for grid, x in ((grid_k, k), (grid_v, v)))
    if pool is not None:
        pooled = _pooled(torch.cat([k, v], dim=0), whole, own, strip, pool, pool_weights).chunk(2)
        keys, values = (torch.cat([x, more], dim=1) for x, more in zip((keys, values), pooled, strict=True))
    hidden = None if key_valid is None or not whole.global_tokens else ~own.globals_of(key_valid)
    side = default_side(whole, pattern, q.device.type)
    rows = (strip.rows[0] - first, strip.rows[1] - first)
    plan = plan_tiles(near, pattern, (side, side), pool, q.device, q.dtype, rows=rows, pooled_from=whole)
    grid = attend_tiles(q[:, own.grid], keys, values, plan, scale=scale, softmax=softmax, hidden=hidden)
    if not whole.global_tokens:
        return grid
    return own.assemble(grid, _global_rows(q, k, v, own, comm, key_valid, scale))


def _reached(pattern: Pattern, rows: Span, height: int) -> Span:
    """The rows whose keys queries of these rows may see."""
    return pattern.window(0, rows[0], height)[0], pattern.window(0, rows[1] - 1, height)[1]


def _pooled(
    x: Tensor, whole: TokenLayout, own: TokenLayout, strip: Strip, pool: Pool, weights: Tensor | None
) -> Tensor:
    """The pooled tokens of the whole picture from those of every strip, (B, tokens, h, d) -> (B, P, h, d)."""
    block = pool.factor * pool.merged(whole)
    if any(first % block for first, _ in strip.parts):
        raise ValueError(
            f"strips begin at rows {[first for first, _ in strip.parts]}, but pooled blocks have {block} rows; split "
            "the rows at multiples of that."
        )
    mine = pool_grid(x, own, pool, weights, part_of=whole)
    wide = -(-whole.width // block)
    parts = [(first // block * wide, -(-end // block) * wide) for first, end in strip.parts]
    return strip.comm.collect(mine, parts, [(0, parts[-1][1])] * strip.comm.size)


def _global_rows(
    q: Tensor, k: Tensor, v: Tensor, own: TokenLayout, comm: Comm, key_valid: Tensor | None, scale: float
) -> Tensor:
    """Attention of the global queries over the keys of all ranks, (B, T, h, d)."""
    rows = slice(0, own.tokens) if comm.rank == 0 else own.grid
    valid = None if key_valid is None else key_valid[:, rows].clone()
    if valid is not None:
        valid[:, own.grid if comm.rank == 0 else slice(None)] = True  # grid keys always are
    out, lse = attend_part(own.globals_of(q), k[:, rows], v[:, rows], scale=scale, key_valid=valid)
    everyones = comm.everyones(torch.cat([out, lse.unsqueeze(-1)], dim=-1))
    merged, _ = merge_parts([(part[..., :-1], part[..., -1]) for part in everyones])
    return merged.to(q.dtype)
