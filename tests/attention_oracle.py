"""Local attention written out, from what patterns and pools say alone: the judge of every backend."""

from __future__ import annotations

import math

import torch

from reattend.attn_processors.ops.pool import pool_bias, pool_grid


def qkv(layout, batch=1, heads=2, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, layout.tokens, heads, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def some_valid(layout, batch):
    """Hides some globals, other ones in each sample."""
    valid = torch.rand(batch, layout.tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[:, layout.grid] = True
    return valid


def oracle(q, k, v, layout, pattern, pool=None, weights=None, valid=None):
    """Softmax over the visible keys, from `visible` and `pool_grid` alone: no code of the backends."""
    rows = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    rows[layout.grid, layout.grid] = pattern.visible(layout)
    rows = rows.expand(q.shape[0], -1, -1).clone()
    if valid is not None:
        rows &= valid[:, None]
    bias = torch.zeros(rows.shape, dtype=q.dtype).masked_fill(~rows, -math.inf)
    if pool is not None:
        k, v = (torch.cat([x, pool_grid(x, layout, pool, weights)], dim=1) for x in (k, v))
        weight = pool_bias(layout, pool)
        extra = torch.full((*rows.shape[:2], pool.keys(layout)), -math.inf, dtype=q.dtype)
        extra[:, layout.grid] = 0 if weight is None else weight.to(q.dtype)
        bias = torch.cat([bias, extra], dim=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + bias[:, None]
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=-1), v)
