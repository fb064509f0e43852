"""Mixture of heads: each token, or each picture, uses only some of the attention heads (MoH, Jin et al., arXiv 2410.11842).

The first `shared` heads are always on; of the others those `routed` with the highest scores are. For head i with query q_i::

    t_i  = a_i + b_i . q_i                   trained, zero at first
    s_i  = |q_i| / sqrt(d) + t_i             what heads are chosen by; at first by the length of the query, as in the paper's
                                             continued training
    gate_i = shared . softmax over shared heads (t)_i . w_1       for shared heads
           = routed . softmax over chosen heads (t)_i . w_2       for chosen heads
           = 0                                                    for all others
    (w_1, w_2) = 2 softmax(c + e mean q)     trained, both 1 at first; only if there are shared heads

So every gate that is open is 1 before training. `balance` is the loss that keeps the use of heads even (equation 6): 1 if it
is, at most the number of routed heads.

Shapes: B samples, N tokens, h heads of d channels; h' heads that can be chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["balance", "gates", "gates_reference", "head_scores"]


def head_scores(q: Tensor, bias: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(t, s) of queries (B, N, h, d): trained scores, and those that choose, (B, N, h) each, in fp32 or wider.

    Args:
        bias, weight: a (h,) and b (h, d), or None before there are any.
    """
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    trained = torch.zeros_like(wide[..., 0])
    if bias is not None and weight is not None:
        trained = bias.to(wide.dtype) + (wide * weight.to(wide.dtype)).sum(-1)
    return trained, wide.norm(dim=-1) * q.shape[-1] ** -0.5 + trained


def gates(trained: Tensor, scores: Tensor, shared: int, routed: int, groups: Tensor | None = None) -> Tensor:
    """How much each head counts, (..., h); 0 for heads that are off.

    Args:
        trained, scores: t and s, (..., h).
        shared: the first so many heads are always on.
        routed: how many of the others are.
        groups: logits of the two groups, (..., 2); None = both count 1.
    """
    own, others = trained[..., :shared], trained[..., shared:]
    chosen = scores[..., shared:].argsort(dim=-1, descending=True, stable=True)[..., :routed]
    closed = torch.full_like(others, -torch.inf).scatter(-1, chosen, others.gather(-1, chosen))
    first = shared * own.softmax(-1)
    second = routed * closed.softmax(-1) if routed else torch.zeros_like(others)
    if groups is not None and shared and routed:
        weights = 2 * groups.softmax(-1)
        first, second = first * weights[..., :1], second * weights[..., 1:]
    return torch.cat([first, second], -1)


def gates_reference(trained: Tensor, scores: Tensor, shared: int, routed: int, groups: Tensor | None = None) -> Tensor:
    """`gates` head by head, for one token: (h,) -> (h,). For reading and for tests."""
    heads = range(len(trained))
    chosen = sorted(heads[shared:], key=lambda i: (-float(scores[i]), i))[:routed]
    weights = [1.0, 1.0] if groups is None or not shared or not routed else (2 * groups.softmax(0)).tolist()
    out = torch.zeros_like(trained)
    for some, count, weight in ((list(heads[:shared]), shared, weights[0]), (chosen, routed, weights[1])):
        total = sum(trained[i].exp() for i in some)
        for i in some:
            out[i] = count * trained[i].exp() / total * weight
    return out


def balance(scores: Tensor, gate: Tensor, shared: int, routed: int) -> Tensor:
    """h' sum over heads of (share of the choices) (mean probability), over all tokens: a scalar, 1 if heads are used evenly.

    Args:
        scores, gate: s and the gates, (B, N, h).
    """
    chosen = (gate[..., shared:] > 0).flatten(0, -2).to(scores.dtype).mean(0) / routed
    probable = scores[..., shared:].softmax(-1).flatten(0, -2).mean(0)
    return len(chosen) * (chosen * probable).sum()
