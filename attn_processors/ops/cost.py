"""What a layer of local attention costs, before it is run.

Counted are the two matrix products of softmax attention, 4 C operations for each pair of query and key, with C = h d::

    FLOPs = 4 C [N (K + T + P) + T (N + T)]

N grid tokens, T globals, P pooled keys. K is the number of grid keys a query is multiplied with: all that a backend touches,
masked ones among them, so more than the pattern asks for.
"""

from __future__ import annotations

from .flex import visited_by_blocks
from .halo import default_side, visited
from .layout import TokenLayout
from .patterns import Disc, Pattern, Square, TileWindow
from .pool import Pool

__all__ = ["attention_flops", "dense_flops", "visited_keys"]


def visited_keys(layout: TokenLayout, pattern: Pattern, backend: str, device: str = "cpu") -> float:
    """K, the grid keys a backend multiplies with each grid query, on average.

    Args:
        backend: "dense", "reference", "halo", "tile" or "flex"; "pattern" counts the visible keys only.
        device: type of the device; tiles may be smaller on a CPU.
    """
    if backend in ("dense", "reference"):
        return float(layout.grid_tokens)
    if backend == "pattern":
        return float(pattern.key_counts(layout).double().mean())
    if backend == "halo":
        side = default_side(layout, pattern, device)
        return visited(layout, pattern, (side, side))
    if backend == "tile" and isinstance(pattern, TileWindow):
        return visited(layout, pattern, pattern.tile)
    if backend == "flex" and isinstance(pattern, Disc | Square):
        return visited_by_blocks(layout, pattern)
    raise ValueError(f"backend {backend!r} does not compute {pattern}; ask `choose` for one that does.")


def attention_flops(
    layout: TokenLayout,
    pattern: Pattern,
    backend: str,
    channels: int,
    *,
    pool: Pool | None = None,
    device: str = "cpu",
) -> int:
    """Operations of one layer for one sample; `channels` is C = h d."""
    n, t = layout.grid_tokens, layout.global_tokens
    p = pool.keys(layout) if pool else 0
    keys = visited_keys(layout, pattern, backend, device)
    return round(4 * channels * (n * (keys + t + p) + t * (n + t)))


def dense_flops(layout: TokenLayout, channels: int) -> int:
    """Operations of the stock layer, where all tokens see all tokens."""
    return 4 * channels * layout.tokens**2
