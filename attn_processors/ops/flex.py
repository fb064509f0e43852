"""Local attention by torch's block-sparse kernel, one block per tile of the picture.

The kernel works on blocks of 128 queries and 128 keys and skips blocks in which nobody sees anybody. In raster order a
block is a strip of 128 tokens, whose disc touches many others; a tile of 8 x 16 touches three to five times fewer. So
queries and keys are gathered tile by tile, whatever order they come in, between blocks of the globals before and after
them; pooled keys come last, and short blocks are filled up with masked keys. Tokens that lie so already are not gathered.

Which blocks meet is worked out from the boxes of the tiles, never from pairs of tokens::

    smallest distance^2 between two boxes > limit    skip
    largest distance^2 between two boxes <= limit    full: no mask is evaluated
    else                                             partial: every pair compares its true coordinates

and the same with intervals for squares. A tile being a product of two intervals, smallest and largest distances add up
from the axes. Box and tokens agree at the corners, so this is exact.

The kernel is compiled once per layout and pattern, which takes a while at the first call; the last eight are kept.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .layout import TILE, TokenLayout
from .patterns import Disc, Pattern, Square
from .pool import Pool, pool_bias

__all__ = [
    "BLOCK",
    "attend_blocks",
    "block_tile",
    "classify",
    "compiled_kernel",
    "visited_by_blocks",
    "why_not_flex",
]

BLOCK = 128
NOWHERE = -(1 << 14)  # coordinate of keys without a place: farther than any radius that does not cover the grid


def why_not_flex(
    layout: TokenLayout, pattern: Pattern, device: str, needs_grad: bool, dtype: torch.dtype
) -> str | None:
    """The reason why the kernel cannot run, or None."""
    if not isinstance(pattern, Disc | Square):
        return f"it knows Disc and Square, got {pattern}"
    if device not in ("cuda", "cpu"):
        return f"it needs a CUDA device, or a CPU for inference, got {device}"
    if device == "cpu" and needs_grad:
        return "on a CPU the kernel has no gradient"
    if dtype == torch.float64:
        return "it has no float64"
    if max(layout.shape) > -NOWHERE:
        return f"it takes at most {-NOWHERE} tokens per side, got {layout.height} x {layout.width}"
    return None


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    pattern: Disc | Square,
    *,
    pool: Pool | None,
    scale: float,
    hidden: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each grid query over the keys it sees.

    Args:
        q: grid queries, shape (B, N, h, d).
        k, v: [sequence | pooled], shape (B, N + T + P, h, d).
        hidden: global keys nobody sees, bool, shape (B, T).

    Returns:
        shape (B, N, h, d).
    """
    kernel = _kernel(layout, pattern, pool, hidden is not None, q.device, q.dtype, q.shape[-1])
    rows = (_gathered(x, i) for x, i in ((q, kernel.queries), (k, kernel.keys), (v, kernel.keys)))
    q_blocks, k_blocks, v_blocks = (x.transpose(1, 2) for x in rows)
    mask = kernel.mask if hidden is None else kernel.hiding(hidden)
    out = kernel.run(q_blocks, k_blocks, v_blocks, mask, kernel.score, scale)
    return _gathered(out.transpose(1, 2), kernel.back)


def _gathered(x: Tensor, index: Tensor | None) -> Tensor:
    """x[:, index], or `x` itself where all is in place."""
    return x if index is None else x.index_select(1, index)


@dataclass(frozen=True, eq=False)
class _Kernel:
    """What one layout and pattern need.

    Attributes:
        queries, keys: gather indices, into the grid tokens and into [sequence | pooled]; None = as they are.
        back: where each grid token is among the gathered queries, shape (N,); None = as they are.
        near: mask function of grid keys.
        free: keys that all queries see, bool, one per gathered key.
        globals_at: where the globals are among the gathered keys, shape (T,).
        mask, score: block mask and score function of the kernel; `score` is None where pooled keys weigh 1.
        run: the compiled kernel.
    """

    queries: Tensor | None
    keys: Tensor | None
    back: Tensor | None
    near: Callable[..., Tensor]
    free: Tensor
    globals_at: Tensor
    mask: BlockMask
    score: Callable[..., Tensor] | None
    run: Callable[..., Tensor]

    def hiding(self, hidden: Tensor) -> BlockMask:
        """The block mask with some globals hidden, which differ from sample to sample; the blocks are the same."""
        free = self.free.repeat(hidden.shape[0], 1)
        free[:, self.globals_at] = ~hidden
        near = self.near
        mask = copy.copy(self.mask)
        mask.mask_mod = lambda b, h, i, j: free[b, j] | near(b, h, i, j)
        return mask


@lru_cache(maxsize=8)
def _kernel(
    layout: TokenLayout,
    pattern: Disc | Square,
    pool: Pool | None,
    hides: bool,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
) -> _Kernel:
    # `dtype` and `width` are here for the key of the cache alone: other ones compile another kernel.
    with torch.inference_mode(False):
        place, inside = _tiles(layout)
        at = layout.positions()
        raster = place[..., 0] * layout.width + place[..., 1]
        queries = at[raster].view(-1)
        slots = inside.view(-1).nonzero().view(-1)
        back = torch.empty(layout.grid_tokens, dtype=torch.int64).scatter(0, queries[slots], slots)

        sequence = torch.arange(layout.tokens + (0 if pool is None else pool.keys(layout)))
        before, after, pooled = sequence[layout.leading], sequence[layout.trailing], sequence[layout.tokens :]
        parts = [(_filled(index), _real(index)) for index in (before, after, pooled)]
        parts.insert(1, (queries + layout.before, torch.zeros_like(queries, dtype=torch.bool)))
        keys, free = (torch.cat(columns) for columns in zip(*parts, strict=True))
        start = parts[0][0].shape[0]  # of the tiles
        end = start + queries.shape[0]
        globals_at = torch.cat([torch.arange(layout.before), end + torch.arange(layout.after)])

        key_place = place.view(-1, 2).masked_fill(~inside.view(-1, 1), NOWHERE)
        key_place = F.pad(key_place, (0, 0, start, keys.shape[0] - end), value=NOWHERE)
        near = _near(pattern, layout, place.view(-1, 2), key_place, device)
        may_hide = globals_at if hides else None
        touched, full = _block_lists(layout, pattern, inside.all(dim=1), free, start // BLOCK, may_hide)
        query_index, key_index = _gather(queries, layout.grid_tokens, device), _gather(keys, len(sequence), device)
        back_index, free = _gather(back, len(queries), device), free.to(device)
        mask = BlockMask.from_kv_blocks(
            *_listed(touched & ~full, device),
            *_listed(full, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=lambda b, h, i, j: free[j] | near(b, h, i, j),
        )
        score, bias = None, None if pool is None else pool_bias(layout, pool)
        if bias is not None and bias.any():
            filling = -len(pooled) % BLOCK
            added = F.pad(bias.float(), (len(free) - len(pooled) - filling, filling)).to(device)
            score = lambda value, b, h, i, j: value + added[j]  # noqa: E731
    return _Kernel(
        query_index, key_index, back_index, near, free, globals_at.to(device), mask, score, compiled_kernel()
    )


def _filled(index: Tensor) -> Tensor:
    """Gather indices of whole blocks; what is added repeats nothing real and is masked."""
    return F.pad(index, (0, -index.shape[0] % BLOCK))


def _real(index: Tensor) -> Tensor:
    """Which of `_filled(index)` are keys, bool."""
    return F.pad(torch.ones_like(index, dtype=torch.bool), (0, -index.shape[0] % BLOCK))


def _gather(index: Tensor, length: int, device: torch.device) -> Tensor | None:
    """The gather index, or None if it takes all of so many as they are."""
    return None if torch.equal(index, torch.arange(length)) else index.to(device)


def block_tile(layout: TokenLayout) -> tuple[int, int]:
    """Rows and columns of a tile of at most 128 tokens: 8 x 16, or longer where the grid is thin."""
    rows = min(TILE[0], layout.height)
    columns = min(BLOCK // rows, layout.width)
    return min(BLOCK // columns, layout.height), columns


def classify(layout: TokenLayout, pattern: Disc | Square) -> tuple[Tensor, Tensor]:
    """Which tiles meet: (touched, full), bool, shape (tiles, tiles) as [query, key], tiles in raster order.

    touched: some query sees some key; full: every query sees every key.
    """
    touched, full = [], []
    for size, side in zip(layout.shape, block_tile(layout), strict=True):
        first = torch.arange(0, size, side, dtype=torch.int32)
        last = (first + side).clamp_max(size) - 1
        q0, q1, k0, k1 = first[:, None], last[:, None], first[None], last[None]
        if isinstance(pattern, Disc):
            touched.append(torch.maximum(k0 - q1, q0 - k1).clamp_min(0).square())
            full.append(torch.maximum(k1 - q0, q1 - k0).square())
        else:
            (low0, low1), (high0, high1) = pattern.bounds(q0, size), pattern.bounds(q1, size)
            touched.append((k1 >= low0) & (k0 < high1))
            full.append((k0 >= high0) & (k1 < low1))
    if isinstance(pattern, Disc):
        limit = pattern.limit
        return _product(touched, torch.add) <= limit, _product(full, torch.add) <= limit
    return _product(touched, torch.logical_and), _product(full, torch.logical_and)


@lru_cache(maxsize=64)
def visited_by_blocks(layout: TokenLayout, pattern: Disc | Square) -> float:
    """Grid keys multiplied per grid query, on average."""
    touched, _ = classify(layout, pattern)
    return BLOCK * BLOCK * int(touched.sum()) / layout.grid_tokens


def _product(axes: list[Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Rows (ny, ny) and columns (nx, nx) -> tiles (ny * nx, ny * nx)."""
    rows, columns = axes
    pairs = combine(rows[:, None, :, None], columns[None, :, None, :])
    return pairs.reshape(rows.shape[0] * columns.shape[0], -1)


def _tiles(layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Coordinates of the 128 places of every tile, (tiles, 128, 2), and which of them are tokens, (tiles, 128).

    Places without a token repeat one of the tile.
    """
    rows, columns = block_tile(layout)
    inside = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    filling = torch.zeros(BLOCK - rows * columns, 2, dtype=torch.int64)
    starts = [torch.arange(0, size, side) for size, side in zip(layout.shape, (rows, columns), strict=True)]
    origin = torch.cartesian_prod(*starts)
    place = origin[:, None] + torch.cat([inside, filling])
    edge = torch.tensor(layout.shape) - 1
    real = (place <= edge).all(dim=-1) & (torch.arange(BLOCK) < rows * columns)
    return torch.minimum(place, edge), real


def _near(
    pattern: Disc | Square, layout: TokenLayout, query: Tensor, key: Tensor, device: torch.device
) -> Callable[..., Tensor]:
    """Mask function of the kernel that compares coordinates, int32."""
    height, width = layout.shape
    y, x = (key[:, axis].to(device, torch.int32).contiguous() for axis in range(2))
    if isinstance(pattern, Disc):
        limit = min(pattern.limit, (height - 1) ** 2 + (width - 1) ** 2)
        qy, qx = (query[:, axis].to(device, torch.int32).contiguous() for axis in range(2))

        def in_disc(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            dy, dx = qy[i] - y[j], qx[i] - x[j]
            return dy * dy + dx * dx <= limit

        return in_disc

    bounds = [*pattern.bounds(query[:, 0], height), *pattern.bounds(query[:, 1], width)]
    y0, y1, x0, x1 = (bound.to(device, torch.int32) for bound in bounds)

    def in_square(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (y[j] >= y0[i]) & (y[j] < y1[i]) & (x[j] >= x0[i]) & (x[j] < x1[i])

    return in_square


def _block_lists(
    layout: TokenLayout, pattern: Disc | Square, whole: Tensor, free: Tensor, start: int, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(touched, full) for all key blocks.

    Args:
        whole: tiles without filling, bool, shape (tiles,).
        free: keys that all queries see, bool.
        start: blocks before the tiles.
        hidden: keys that may be hidden, so that their blocks need the mask.
    """
    touched, full = classify(layout, pattern)
    if hidden is not None:
        free = free.index_fill(0, hidden, False)
    no_padding = free.view(-1, BLOCK).all(dim=1)
    every = torch.ones(touched.shape[0], no_padding.shape[0], dtype=torch.bool)
    tiles = slice(start, start + whole.shape[0])
    all_touched, all_full = every.clone(), every & no_padding
    all_touched[:, tiles], all_full[:, tiles] = touched, full & whole
    return all_touched, all_full


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number and indices of the key blocks of each query block, int32, shapes (1, 1, rows) and (1, 1, rows, columns)."""
    number = blocks.sum(dim=1, dtype=torch.int32)
    index = blocks.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    return number.to(device)[None, None], index.to(device, torch.int32)[None, None]


def compiled_kernel() -> Callable[..., Tensor]:
    """run(q, k, v, mask, score, scale), the kernel of (B, h, N, d), compiled at its first call.

    Compiled code is kept with a function's code object, and only so many versions of it. A copy of the code object for
    each kernel keeps them apart, and lets them go with it.
    """

    def run(q, k, v, mask, score, scale):
        return flex_attention(q, k, v, score_mod=score, block_mask=mask, scale=scale)

    own = types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(own, dynamic=False, fullgraph=True)
