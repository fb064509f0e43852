"""Exact local attention by gathering, for each tile of queries, the keys around it.

The grid is cut into tiles of t x t queries. A tile and its *halo* of R tokens on each side hold all keys that its
queries may see, less those off the picture; of these, keys no query of the tile sees are left out. That leaves about
t^2 + 4 t R + pi R^2 keys of (t + 2 R)^2 for a disc, and for them one fused softmax with an additive mask of shape
(t^2, keys). A mask depends on the pattern and on the borders in reach only, so all tiles inside the picture share one:
they form a *group*, folded into the batch; each kind of border tile is another, short tiles at ragged edges among them.
Every query is computed once.

Global and pooled keys come after the window keys of each tile, and the keys are padded with masked ones to a multiple of
eight, which fused kernels want. Masked logits get the smallest finite number rather than -inf; as each query sees at
least itself, their weight is exactly 0.

Tiles are gathered in chunks, so memory beyond q, k, v and the output is bounded. For gradients nothing but q, k and v is
kept: backward gathers each chunk again and adds its share to one gradient of k and of v. (Checkpointing chunks one by
one would write a full-size gradient per chunk: a cost that grows with the square of the tokens.) Gradients are
deterministic on CPU; CUDA adds in the order its threads arrive.

Shapes: N grid tokens, T globals, P pooled keys, n tiles of a group, Q queries of a tile, M keys of a tile with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import TokenLayout
from .patterns import Pattern
from .pool import Pool, pool_bias

__all__ = ["Group", "Plan", "Softmax", "attend_tiles", "default_side", "global_index", "plan_tiles", "visited"]

Softmax = Callable[..., Tensor]  # softmax(q, k, v, scale=..., mask=...): (B, M, h, d), mask additive or None

ALIGN = 8  # keys per tile are a multiple of this wherever there is a mask
# Gathered queries, keys and values held at once; on a CPU more than this gains nothing clear.
CHUNK_BYTES = {"cpu": 16 * 2**20, "other": 256 * 2**20}


@dataclass(frozen=True, eq=False)
class Group:
    """Tiles with the same mask.

    Attributes:
        queries: index of their queries among the grid tokens, int64, shape (n, Q).
        keys: index of their keys in [sequence | pooled], int64, shape (n, M): window, globals, pooled, padding.
        window: how many of the M are window keys.
        bias: added to the logits, shape (1, 1, Q, M); None = every query sees all keys.
    """

    queries: Tensor
    keys: Tensor
    window: int
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class Plan:
    """All groups, and `back`, shape (N,): where each grid token is in the concatenated outputs of the groups."""

    groups: tuple[Group, ...]
    back: Tensor


def default_side(layout: TokenLayout, pattern: Pattern, device: str) -> int:
    """Side of a tile: small tiles multiply fewer keys in vain, large ones copy each key less often."""
    if device != "cpu":
        return 16
    reach = max(pattern.window(axis, size // 2, size)[1] - size // 2 for axis, size in enumerate(layout.shape))
    return 8 if reach <= 16 else 16  # at 128 x 128 tokens 8 is faster for radius 8 and 16


@lru_cache(maxsize=16)
def plan_tiles(
    layout: TokenLayout,
    pattern: Pattern,
    side: tuple[int, int],
    pool: Pool | None,
    device: torch.device,
    dtype: torch.dtype,
    rows: tuple[int, int] | None = None,
    pooled_from: TokenLayout | None = None,
) -> Plan:
    """Index and mask tensors for a layout; the last sixteen are kept.

    Args:
        side: rows and columns of a tile.
        device, dtype: of the queries.
        rows: [first, end) of the grid rows that have queries, and no others do, in raster order; None = all.
        pooled_from: the layout whose grid is pooled, if `layout` is a part of it.
    """
    if rows is not None and layout.order != "raster":
        raise ValueError("queries of some rows only are in raster order; bring the tokens into it first.")
    with torch.inference_mode(False):  # tensors born in inference mode could never be used for training
        at = layout.positions()
        extra = [global_index(layout)]
        tail = [torch.zeros(layout.global_tokens, dtype=torch.float64)]
        if pool is not None:
            pooled = pool.keys(pooled_from or layout)
            extra.append(torch.arange(layout.tokens, layout.tokens + pooled))
            bias = pool_bias(pooled_from or layout, pool)
            tail.append(torch.zeros(pooled, dtype=torch.float64) if bias is None else bias)
        others, weight = torch.cat(extra), torch.cat(tail)

        groups = []
        above = 0 if rows is None else rows[0] * layout.width  # grid tokens before the first query
        for tall, wide in _kinds(layout, pattern, side, rows):
            origin = torch.cartesian_prod(torch.tensor(tall.starts), torch.tensor(wide.starts))  # (n, 2)
            query = torch.cartesian_prod(torch.arange(tall.length), torch.arange(wide.length))
            key = _reached(layout, pattern, tall, wide)
            seen = pattern.sees((origin[0] + query)[:, None], (origin[0] + key)[None], layout.shape)

            queries, keys = (
                at[((origin[:, None] + place) * torch.tensor([layout.width, 1])).sum(dim=-1)] for place in (query, key)
            )
            parts = [keys + layout.before, others.expand(len(origin), -1)]
            mask = None
            if not seen.all() or weight.any():
                padding = -(len(key) + len(others)) % ALIGN
                parts.append(torch.zeros(len(origin), padding, dtype=torch.int64))
                mask = torch.zeros(len(query), len(key) + len(others) + padding, dtype=torch.float64)
                mask[:, : len(key)].masked_fill_(~seen, float("-inf"))
                mask[:, len(key) : len(key) + len(others)] = weight
                mask[:, len(key) + len(others) :] = float("-inf")
                mask = mask.clamp_min(torch.finfo(dtype).min).to(device, dtype)[None, None]
            groups.append(Group((queries - above).to(device), torch.cat(parts, dim=1).to(device), len(key), mask))
        order = torch.cat([group.queries.view(-1) for group in groups])
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device))
    return Plan(tuple(groups), back)


@lru_cache(maxsize=64)
def visited(layout: TokenLayout, pattern: Pattern, side: tuple[int, int]) -> float:
    """Grid keys multiplied per grid query, on average: what the plan costs, without making its tensors."""
    total = 0
    for rows, columns in _kinds(layout, pattern, side):
        tiles, queries = len(rows.starts) * len(columns.starts), rows.length * columns.length
        total += tiles * queries * len(_reached(layout, pattern, rows, columns))
    return total / layout.grid_tokens


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, scale: float, softmax: Softmax, hidden: Tensor | None = None
) -> Tensor:
    """Softmax attention of each grid query over its gathered keys; differentiable in q, k and v.

    Args:
        q: grid queries, shape (B, N, h, d).
        k, v: [sequence | pooled], shape (B, N + T + P, h, d).
        hidden: global keys nobody sees, bool, shape (B, T).

    Returns:
        shape (B, N, h, d).
    """
    learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if learning and not torch.compiler.is_compiling():  # a compiler decides itself what to keep and what to recompute
        return _Recomputed.apply(q, k, v, plan, scale, softmax, hidden)
    return _forward(q, k, v, plan, scale, softmax, hidden)


@dataclass(frozen=True)
class _Chunk:
    """Some tiles of a group, of some samples."""

    samples: slice
    queries: Tensor  # (n * Q,)
    keys: Tensor  # (n * M,)
    tiles: int
    mask: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, softmax: Softmax) -> Tensor:
        """(b, n * Q, h, d) and (b, n * M, h, d) -> (b, n * Q, h, d), one softmax per tile."""
        folded = [x.reshape(x.shape[0] * self.tiles, -1, *x.shape[2:]) for x in (q, k, v)]
        return softmax(*folded, scale=scale, mask=self.mask).reshape(*q.shape[:-1], -1)


def _chunks(q: Tensor, plan: Plan, hidden: Tensor | None) -> Iterator[_Chunk]:
    batch, _, heads, width = q.shape
    budget = CHUNK_BYTES["cpu" if q.device.type == "cpu" else "other"]
    # Where samples hide different keys each gets its own mask, else they share one.
    samples = [slice(0, batch)] if hidden is None else [slice(b, b + 1) for b in range(batch)]
    for group in plan.groups:
        tile_rows = 2 * (group.queries.shape[1] + group.keys.shape[1])
        tile_bytes = tile_rows * heads * width * q.element_size() * (batch if hidden is None else 1)
        tiles = max(1, budget // tile_bytes)
        for sample in samples:
            mask = group.bias if hidden is None else _hide(group, hidden[sample], q.dtype)
            for queries, keys in zip(group.queries.split(tiles), group.keys.split(tiles), strict=True):
                yield _Chunk(sample, queries.reshape(-1), keys.reshape(-1), queries.shape[0], mask)


def _hide(group: Group, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The group's mask with one sample's hidden globals masked as well, shape (1, 1, Q or 1, M)."""
    row = torch.zeros(1, 1, 1, group.keys.shape[1], dtype=dtype, device=hidden.device)
    end = group.window + hidden.shape[1]
    row[..., group.window : end] = hidden.to(dtype) * torch.finfo(dtype).min
    return row if group.bias is None else group.bias + row  # no column is masked in both


def _forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softmax: Softmax, hidden: Tensor | None
) -> Tensor:
    outputs: list[list[Tensor]] = [[] for _ in range(1 if hidden is None else q.shape[0])]
    for chunk in _chunks(q, plan, hidden):
        own = (x[chunk.samples] for x in (q, k, v))
        at = (chunk.queries, chunk.keys, chunk.keys)
        q_rows, k_rows, v_rows = (x.index_select(1, i) for x, i in zip(own, at, strict=True))
        outputs[chunk.samples.start].append(chunk.attend(q_rows, k_rows, v_rows, scale, softmax))
    samples = [torch.cat(parts, dim=1).index_select(1, plan.back) for parts in outputs]
    return samples[0] if hidden is None else torch.cat(samples)


class _Recomputed(torch.autograd.Function):
    """`_forward`, keeping q, k and v only."""

    @staticmethod
    def forward(ctx, q, k, v, plan, scale, softmax, hidden):
        ctx.save_for_backward(q, k, v, hidden)
        ctx.settings = plan, scale, softmax
        return _forward(q, k, v, plan, scale, softmax, hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, hidden = ctx.saved_tensors
        plan, scale, softmax = ctx.settings
        wide = torch.promote_types(k.dtype, torch.float32)  # a key gets several shares, 16 bits would round each
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        dq = torch.empty_like(q)
        for chunk in _chunks(q, plan, hidden):
            sample = chunk.samples
            leaves = [
                x[sample].index_select(1, i).requires_grad_()
                for x, i in ((q, chunk.queries), (k, chunk.keys), (v, chunk.keys))
            ]
            with torch.enable_grad():
                out = chunk.attend(leaves[0], leaves[1], leaves[2], scale, softmax)
            share = torch.autograd.grad(out, leaves, grad[sample].index_select(1, chunk.queries))
            dq[sample].index_copy_(1, chunk.queries, share[0])  # each query is in one tile
            dk[sample].index_add_(1, chunk.keys, share[1].to(wide))
            dv[sample].index_add_(1, chunk.keys, share[2].to(wide))
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


@dataclass(frozen=True)
class _Spans:
    """Stretches of one axis with the same surroundings: where they start, their length, their window from there on."""

    starts: list[int]
    length: int
    window: tuple[int, int]


def _spans(pattern: Pattern, axis: int, size: int, side: int, part: tuple[int, int] | None = None) -> list[_Spans]:
    kinds: dict[tuple[tuple[int, int], ...], list[int]] = {}
    begin, stop = part or (0, size)
    for start in range(begin, stop, side):
        windows = (pattern.window(axis, i, size) for i in range(start, min(start + side, stop)))
        kinds.setdefault(tuple((first - start, end - start) for first, end in windows), []).append(start)
    return [_Spans(starts, len(windows), (windows[0][0], windows[-1][1])) for windows, starts in kinds.items()]


def _kinds(
    layout: TokenLayout, pattern: Pattern, side: tuple[int, int], rows: tuple[int, int] | None = None
) -> Iterator[tuple[_Spans, _Spans]]:
    tall, wide = (
        _spans(pattern, axis, layout.shape[axis], side[axis], rows if axis == 0 else None) for axis in range(2)
    )
    return ((r, c) for r in tall for c in wide)


def _reached(layout: TokenLayout, pattern: Pattern, rows: _Spans, columns: _Spans) -> Tensor:
    """The keys that some query of such a tile sees, relative to its first token, int64, shape (keys, 2).

    A key that any of them sees is seen by the nearest one, so only that is asked.
    """
    key = torch.cartesian_prod(torch.arange(*rows.window), torch.arange(*columns.window))
    nearest = torch.minimum(key.clamp_min(0), torch.tensor([rows.length - 1, columns.length - 1]))
    origin = torch.tensor([rows.starts[0], columns.starts[0]])
    return key[pattern.sees(origin + nearest, origin + key, layout.shape)]


def global_index(layout: TokenLayout) -> Tensor:
    """Index of the global tokens in the sequence, shape (T,)."""
    leading, trailing = layout.leading, layout.trailing
    return torch.cat([torch.arange(leading.start, leading.stop), torch.arange(trailing.start, trailing.stop)])
