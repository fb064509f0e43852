"""Agent attention: queries ask a few agents, which have asked all keys.

Softmax attention with n agent tokens A between queries and keys (Han et al., arXiv 2312.08874)::

    S1  = softmax(s A K^T)          (n, N_k)   every agent gathers
    S2  = softmax(s^p Q A^T)        (N_q, n)   every query reads from the agents
    out = S2 (S1 V) + c V

with s the layer's scale, d^-1/2, so that the second scale is d^(-p/2). It costs 4 n (N_q + N_k) d operations per head
where softmax attention costs 4 N_q N_k d: linear in the image tokens for a fixed number of agents. p < 1 sharpens the
second softmax; c V keeps each token's own value, which few agents would blur.

Shapes: queries, keys, values and agents are (B, tokens, h, d), the layout of diffusers' attention dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["agent_attention", "agent_attention_reference", "agents_pay_off"]

Softmax = Callable[..., Tensor]


def agents_pay_off(agents: int, queries: int) -> bool:
    """Whether two passes through the agents cost less than ordinary attention (2 n < N_q, with N_q = N_k)."""
    return 2 * agents < queries


def agent_attention(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, p: float, c: float, scale: float, softmax: Softmax
) -> Tensor:
    """Agent attention by two fused softmax attentions.

    Args:
        q, k, v: shape (B, N, h, d); c != 0 needs as many queries as values, token by token.
        agents: agent queries, shape (B, n, h, d).
        p: exponent of the second scale; 1 = the layer's own scale, smaller = sharper.
        c: weight of the value shortcut; 0 = none.
        scale: the layer's softmax scale, d^-1/2 as a rule.
        softmax: fused attention, called as softmax(q, k, v, scale=...).

    Returns:
        shape (B, N, h, d).
    """
    gathered = softmax(agents, k, v, scale=scale)
    out = softmax(q, agents, gathered, scale=scale**p)
    return torch.add(out, v, alpha=c) if c else out


def agent_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *, p: float, c: float, scale: float
) -> Tensor:
    """`agent_attention` with both softmax matrices written out. For reading and for tests."""
    s1 = (scale * torch.einsum("bnhd,bkhd->bhnk", agents, k)).softmax(dim=-1)
    s2 = (scale**p * torch.einsum("bqhd,bnhd->bhqn", q, agents)).softmax(dim=-1)
    gathered = torch.einsum("bhnk,bkhd->bhnd", s1, v)
    return torch.einsum("bhqn,bhnd->bqhd", s2, gathered) + c * v
