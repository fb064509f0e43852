"""Isolation: subjects of one picture do not see each other, and each may see a reference of its own.

Query q with owners o(q), key k of the same picture with owners o(k): k is hidden iff both have owners and share none.
The background is open both ways. A query of subject i also sees reference keys of i, and no others:

    O_q = softmax([q K~_i^T s + beta_i, q K_allowed^T s]) [V~_i; V_allowed]

Queries with the same owners see the same keys. So one plain attention call for each distinct set of owners gives the
same numbers as a masked softmax, without a mask. Isolation as in IR-Diffusion (arXiv 2411.19261); that it acts within
one call only is its limit: background tokens carry something from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Extra", "Group", "dense_reference", "grouped_attention", "isolation_groups"]


@dataclass(frozen=True, eq=False)
class Extra:
    """Keys and values that one subject's queries see besides those of their picture.

    Attributes:
        k, v: shape (B, n, h, d).
        bias: added to their logits; 0 lets every key count as one of the picture's own.
    """

    k: Tensor
    v: Tensor
    bias: float = 0.0


@dataclass(frozen=True, eq=False)
class Group:
    """Queries that see the same keys.

    Attributes:
        queries: places in the sequence, int64.
        keys: places in the sequence, int64; None = all of them.
        subjects: whose extra keys are seen as well.
        told: whose own text is read.
    """

    queries: Tensor
    keys: Tensor | None
    subjects: tuple[int, ...] = ()
    told: tuple[int, ...] = ()


def isolation_groups(
    owner: Tensor, *, isolate: bool = True, reading: Tensor | None = None, referred: int = 0, told: int = 0
) -> list[Group]:
    """Sort the tokens of a sequence into groups.

    Args:
        owner: int64, shape (L,): bit i for subject i, 0 for the background and for text.
        isolate: False: every token sees the whole picture, and only the references differ.
        reading: bool, shape (L,): which tokens may see their references; None = all.
        referred: bits of the subjects that have extra keys.
        told: bits of the subjects that read text of their own.

    Returns:
        Groups whose queries are disjoint and together the whole sequence; none is empty.
    """
    groups: list[Group] = []
    for code in owner.unique().tolist():
        mine = owner == code
        keys = ((owner == 0) | (owner & code != 0)) if isolate and code else None
        seen = None if keys is None or bool(keys.all()) else keys.nonzero().flatten()
        subjects, hears = (
            tuple(i for i in range(code.bit_length()) if code & bits & (1 << i)) for bits in (referred, told)
        )
        parts = [(mine, subjects)]
        if subjects and reading is not None:
            parts = [(mine & reading, subjects), (mine & ~reading, ())]
        groups += [Group(part.nonzero().flatten(), seen, reads, hears) for part, reads in parts if bool(part.any())]
    return groups


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Sequence[Group],
    extra: Mapping[int, Sequence[Extra]],
    softmax: Callable[..., Tensor],
    valid: Tensor | None = None,
) -> Tensor:
    """Attention of every group among its own keys.

    Args:
        q, k, v: shape (B, L, h, d).
        groups: as `isolation_groups` makes them.
        extra: keys and values by subject.
        softmax: (q, k, v, mask=None or additive (1, 1, 1, K) or bool (B, 1, 1, K)) -> (B, M, h, d).
        valid: bool, shape (B, L): keys that may be seen at all (padded text is not); None = all.

    Returns:
        shape (B, L, h, d). It equals `dense_reference` up to rounding.
    """
    if len(groups) == 1 and groups[0].keys is None and not groups[0].subjects:
        return softmax(q, k, v, mask=None if valid is None else valid[:, None, None])
    out = torch.empty_like(q)
    for group in groups:
        keys, values = (k, v) if group.keys is None else (k[:, group.keys], v[:, group.keys])
        seen = valid if valid is None or group.keys is None else valid[:, group.keys]
        more = [one for subject in group.subjects for one in extra.get(subject, ())]
        if more:
            keys = torch.cat([*(one.k for one in more), keys], dim=1)
            values = torch.cat([*(one.v for one in more), values], dim=1)
        # torch.compile and flash kernels want no mask where none is needed
        mask = _mask(more, seen, keys) if any(one.bias for one in more) or seen is not None else None
        out[:, group.queries] = softmax(q[:, group.queries], keys, values, mask=mask)
    return out


def dense_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    owner: Tensor,
    extra: Mapping[int, Sequence[Extra]],
    *,
    scale: float,
    isolate: bool = True,
    reading: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The same as one masked softmax over all keys there are, written for reading. Shapes as `grouped_attention`."""
    length, parts = q.shape[1], [(subject, one) for subject, several in extra.items() for one in several]
    keys = torch.cat([k, *(one.k for _, one in parts)], dim=1)
    values = torch.cat([v, *(one.v for _, one in parts)], dim=1)
    allowed = torch.ones(length, length, dtype=torch.bool)
    if isolate:
        allowed = (owner[:, None] == 0) | (owner[None] == 0) | (owner[:, None] & owner[None] != 0)
    logits = torch.einsum("b q h d, b k h d -> b h q k", q, keys) * scale
    columns = [torch.zeros(length, length, dtype=q.dtype).masked_fill(~allowed, float("-inf"))]
    for subject, one in parts:
        reads = owner & (1 << subject) != 0
        if reading is not None:
            reads = reads & reading
        bias = torch.full((length, one.k.shape[1]), one.bias, dtype=q.dtype)
        columns.append(bias.masked_fill(~reads[:, None], float("-inf")))
    logits = logits + torch.cat(columns, dim=1)
    if valid is not None:
        hidden = torch.nn.functional.pad(~valid, (0, keys.shape[1] - length))
        logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
    return torch.einsum("b h q k, b k h d -> b q h d", logits.softmax(-1), values)


def _mask(more: Sequence[Extra], seen: Tensor | None, keys: Tensor) -> Tensor:
    """Additive mask (1 or B, 1, 1, K): the biases of the extra keys, which come first, and no key that is not valid."""
    bias = keys.new_zeros(1 if seen is None else len(seen), keys.shape[1])
    start = 0
    for one in more:
        bias[:, start : start + one.k.shape[1]] = one.bias
        start += one.k.shape[1]
    if seen is not None:
        bias[:, start:].masked_fill_(~seen, float("-inf"))
    return bias[:, None, None]
