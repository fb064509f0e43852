"""Places of frames for models that know a clip's length only: every query sees one training clip.

Motion modules add a table of places p[0], p[1], ... to the tokens before each attention, so a film longer than the table
fails and one longer than the training clips looks wrong. Here the places are those of the query's own window: frame j,
seen from frame i whose window begins at a, sits in slot j - a, and the query itself in slot i - a. The anchors before the
window are spread over the slots before the query's, those behind it over the slots after, in their order: for the query they
are a clip of the whole film in few frames. (All in the first and in the last slot, they kept things alike far worse.) A film
that the window covers has the model's own places.

Keys and values are linear in the tokens, so what a slot adds to them, W p, is one small table per layer. Keys and values
themselves carry no place: one and the same key serves queries that see it in different slots, and what travels between
ranks is free of places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..comm import Span
    from .scopes import Scopes

__all__ = ["SlotTables", "far_slots", "near_slots", "own_slots", "slot", "slot_tables"]

KEPT = 2048  # blocks of a film whose slots and masks are kept: every layer, place and step asks for the same ones


@dataclass(frozen=True, eq=False)
class SlotTables:
    """What each slot adds to a key and to a value; both of shape (L, h, d)."""

    keys: Tensor
    values: Tensor

    def score(self, q: Tensor, slots: Tensor) -> Tensor:
        """q . k of the slots' part: q (n, h, c, d), slots (c, K) -> (n, h, c, K)."""
        by_slot = q @ self.keys.permute(1, 2, 0)  # (n, h, c, L)
        return by_slot.gather(-1, slots.expand(*q.shape[:2], *slots.shape))

    def value(self, weights: Tensor, slots: Tensor) -> Tensor:
        """The slots' part of the answer: weights (n, h, c, K), slots (c, K) -> (n, h, c, d)."""
        chosen = torch.nn.functional.one_hot(slots, len(self.values)).to(weights.dtype)  # (c, K, L)
        by_slot = torch.einsum("nhck,ckl->nhcl", weights, chosen)
        return by_slot @ self.values.transpose(0, 1)


def slot_tables(positions: Tensor, to_k: Callable[[Tensor], Tensor], to_v: Callable[[Tensor], Tensor]) -> SlotTables:
    """The tables of one layer.

    Args:
        positions: the places of the window, shape (L, C).
        to_k, to_v: the layer's projections, (1, L, C) -> (1, L, h, d); their biases belong to the tokens and drop out.
    """
    places = positions.unsqueeze(0)
    nothing = torch.zeros_like(places[:, :1])
    return SlotTables((to_k(places) - to_k(nothing))[0], (to_v(places) - to_v(nothing))[0])


def slot(scopes: Scopes, i: int, j: int) -> int:
    """The slot of frame j, in the window or an anchor, as the query of frame i sees it. Written for reading."""
    first, end = scopes.window(i)
    own, last = i - first, end - first - 1
    if first <= j < end:
        return j - first
    if j < first:
        before = [anchor for anchor in scopes.anchors if anchor < first]
        return own * before.index(j) // len(before)
    after = [anchor for anchor in scopes.anchors if anchor >= end]
    return min(own + 1 + (last - own) * after.index(j) // len(after), last)


def near_slots(frames: Tensor, windows: Tensor) -> Tensor:
    """`slot` of the frames (c, K) that lie in the window [first, end) of their row, (c, 2); others get any. int64."""
    return (frames - windows[:, :1]).clamp(min=0).minimum(windows[:, 1:] - windows[:, :1] - 1)


def far_slots(anchors: Tensor, queries: Tensor, windows: Tensor) -> Tensor:
    """`slot` of all anchors (G,), ascending, for the queries (c,) with their windows (c, 2); int64, shape (c, G)."""
    first, end, own = windows[:, :1], windows[:, 1:], queries[:, None] - windows[:, :1]
    before, after = anchors < first, anchors >= end
    rank, count = torch.arange(len(anchors)), after.sum(1, keepdim=True)
    early = own * rank // before.sum(1, keepdim=True).clamp(min=1)
    late = own + 1 + (end - first - 1 - own) * (rank - (len(anchors) - count)) // count.clamp(min=1)
    slots = torch.where(before, early, torch.where(after, late, anchors - first))
    return slots.clamp(min=0).minimum(end - first - 1)


@lru_cache(maxsize=KEPT)
@torch.inference_mode(False)  # what is kept may be needed with gradients later
def own_slots(scopes: Scopes, own: Span, device: torch.device) -> Tensor:
    """The slot of each query of `own` in its own window, int64, shape (f,)."""
    return torch.tensor([i - scopes.window(i)[0] for i in range(*own)], device=device)
