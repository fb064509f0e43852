"""Places of frames for models that know a clip's length only: every query sees one training clip.

Motion modules add a table of places p[0], p[1], ... to the tokens before each attention, so a film longer than the table
fails and one longer than the training clips looks wrong. Here the places are those of the query's own window: frame j,
seen from frame i whose window begins at a, sits in slot j - a, and the query itself in slot i - a. A frame before the window
takes the first slot, one behind it the last. A film that the window covers has the model's own places.

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

__all__ = ["SlotTables", "own_slots", "slot_tables", "slots_in"]

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


def slots_in(frames: Tensor, windows: Tensor) -> Tensor:
    """The slot of each of the frames (c, K) in the window [first, end) of its row, (c, 2); int64, shape (c, K)."""
    return (frames - windows[:, :1]).clamp(min=0).minimum(windows[:, 1:] - windows[:, :1] - 1)


@lru_cache(maxsize=KEPT)
@torch.inference_mode(False)  # what is kept may be needed with gradients later
def own_slots(scopes: Scopes, own: Span, device: torch.device) -> Tensor:
    """The slot of each query of `own` in its own window, int64, shape (f,)."""
    return torch.tensor([i - scopes.window(i)[0] for i in range(*own)], device=device)
