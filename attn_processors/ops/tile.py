"""Attention to whole tiles, without a mask.

With `TileWindow` all queries of a tile see the same keys: a few whole tiles. So the gathering of `halo` with the pattern's
own tile needs no mask, and every fused kernel applies, those that take no mask among them. In tile order a gathered tile
is one piece of memory. Only pooled keys with a log(count), and hidden global keys, bring a mask back.
"""

from __future__ import annotations

import torch

from .halo import Plan, plan_tiles
from .layout import TokenLayout
from .patterns import Pattern, TileWindow
from .pool import Pool

__all__ = ["plan_window", "why_not_tile"]


def why_not_tile(pattern: Pattern) -> str | None:
    """The reason why this pattern is not a union of whole tiles, or None."""
    if not isinstance(pattern, TileWindow):
        return f"it needs whole tiles (TileWindow), got {pattern}"
    return None


def plan_window(
    layout: TokenLayout, pattern: TileWindow, pool: Pool | None, device: torch.device, dtype: torch.dtype
) -> Plan:
    """Query tiles and the tiles they see, for `halo.attend_tiles`."""
    return plan_tiles(layout, pattern, pattern.tile, pool, device, dtype)
