"""Softmax attention and random tokens in fp64, for tests of tensor functions."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1e-12  # fp64: the same sums in another order
SCALE = 0.5


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    logits = torch.einsum("b q h d, b k h d -> b h q k", q, k) * SCALE
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return torch.einsum("b h q k, b k h d -> b q h d", logits.softmax(-1), v)


def tokens(length: int, batch: int = 2, seed: int = 0, heads: int = 2, width: int = 3) -> tuple[Tensor, ...]:
    """q, k, v of shape (B, length, heads, width)."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, length, heads, width, generator=draw, dtype=torch.float64) for _ in range(3))
