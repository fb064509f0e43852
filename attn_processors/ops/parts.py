"""Softmax attention over keys in parts, put together exactly.

With lse = log sum_j exp(logit_j) of each part of the keys, the softmax over all parts is exactly::

    out = sum_p exp(lse_p - lse) out_p        lse = log sum_p exp(lse_p)

Parts are kept in fp32 (fp64 for fp64) until the last is in, so inputs of 16 bits cost one rounding, as in a fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["attend_part", "merge_parts"]

SCORE_BYTES = (
    256 * 2**20
)  # logits of one block of queries and keys, and as much for the keys and values in full precision

Part = tuple[Tensor, Tensor]


def attend_part(q: Tensor, k: Tensor, v: Tensor, *, scale: float, key_valid: Tensor | None = None) -> Part:
    """Dense attention of a few queries over one part of the keys, with what it takes to merge it with other parts.

    Args:
        q: shape (B, M, h, d). Logits are made in blocks of queries and keys, so M should be small next to the keys.
        k, v: shape (B, K, h, d).
        key_valid: False hides a key, bool, shape (B, K). Where all are hidden, out is 0 and lse -inf.

    Returns:
        out, shape (B, M, h, d), and lse, shape (B, M, h); both fp32 (fp64 for fp64).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, queries, heads, width = q.shape
    each = batch * heads * wide.itemsize
    keys = max(1, min(k.shape[1], SCORE_BYTES // (2 * each * width)))
    rows = max(1, min(queries, SCORE_BYTES // (each * keys)))
    parts = []
    for start in range(0, k.shape[1], keys):
        own = slice(start, start + keys)
        valid = None if key_valid is None else key_valid[:, own]
        some_k, some_v = k[:, own].to(wide), v[:, own].to(wide)
        blocks = [_block(some_q.to(wide), some_k, some_v, scale, valid) for some_q in q.split(rows, dim=1)]
        parts.append((torch.cat([out for out, _ in blocks], dim=1), torch.cat([lse for _, lse in blocks], dim=1)))
    return merge_parts(parts)


def merge_parts(parts: Sequence[Part]) -> Part:
    """The attention over all keys from that over each part, (out, lse); parts are added in the order given."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part for _, part in parts]).logsumexp(dim=0)
    out = torch.zeros_like(parts[0][0])
    for some, part in parts:
        out = out + some * _share(part, lse)
    return out, lse


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole), 0 where the part saw no key."""
    return (part - whole.clamp_min(torch.finfo(whole.dtype).min)).exp().unsqueeze(-1)


def _block(q: Tensor, k: Tensor, v: Tensor, scale: float, valid: Tensor | None) -> Part:
    logits = torch.einsum("bmhd,bkhd->bmhk", q, k) * scale
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
    lse = logits.logsumexp(dim=-1)
    weight = (logits - lse.clamp_min(torch.finfo(lse.dtype).min).unsqueeze(-1)).exp()
    return torch.einsum("bmhk,bkhd->bmhd", weight, v), lse
