"""Attention without a softmax over the picture's tokens, in time linear in their number.

Queries q_i, keys k_j, values v_j, i and j from 1 to N, one head. Each form is a weighted mean of the values::

    kernel   w_ij = phi(q_i).phi(k_j) / sum_l phi(q_i).phi(k_l)        phi = elu + 1    (Katharopoulos et al., 2006.16236)
    inline   w_ij = 1/N + s q_i.(k_j - mean k) / N                     may be negative  (InLine, 2412.06590, eq. 6)
    flow     phi = sigmoid. Flow conservation between sources and sinks (Flowformer, 2202.06258, section 3.2):
             I_i = phi(q_i).sum phi(k)      O_j = phi(k_j).sum phi(q)
             I'_i = phi(q_i).sum_j phi(k_j)/O_j      O'_j = phi(k_j).sum_i phi(q_i)/I_i
             out_i = sigmoid(I'_i) phi(q_i)/I_i . sum_j phi(k_j)^T (N softmax_j(O'_j) v_j)

The order of the products makes them linear: keys times values first, (d, d) per head. Sums are in fp32 (fp64 for fp64). The
`_reference` functions write the N x N weights out.

Shapes: (B, N, h, d), the layout of diffusers' attention dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "depthwise", "flow_attention", "flow_reference", "inline_attention", "inline_reference", "kernel_attention",
    "kernel_reference",
]  # fmt: skip

EPS = 1e-6
Given = ParamSpec("Given")


def _without_autocast(
    form: Callable[Concatenate[Tensor, Given], Tensor],
) -> Callable[Concatenate[Tensor, Given], Tensor]:
    """The form with its sums in fp32 under autocast too, which would take every einsum back to 16 bits."""

    @wraps(form)
    def wide(q: Tensor, *args: Given.args, **kwargs: Given.kwargs) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return form(q, *args, **kwargs)

    return wide


@_without_autocast
def kernel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Kernel-linear attention with elu + 1: (B, N, h, d) each -> (B, N, h, d)."""
    fq, fk, values = F.elu(_wide(q)) + 1, F.elu(_wide(k)) + 1, _wide(v)
    summed = torch.einsum("bnhd,bnhe->bhde", fk, values)
    total = torch.einsum("bnhd,bhd->bnh", fq, fk.sum(1))
    return (torch.einsum("bnhd,bhde->bnhe", fq, summed) / (total + EPS).unsqueeze(-1)).to(v.dtype)


def kernel_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bnhd,bmhd->bhnm", F.elu(_wide(q)) + 1, F.elu(_wide(k)) + 1)
    weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    return torch.einsum("bhnm,bmhd->bnhd", weights, _wide(v)).to(v.dtype)


@_without_autocast
def inline_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """InLine attention, an injective linear form whose weights sum to one: (B, N, h, d) each -> (B, N, h, d)."""
    queries, keys, values = scale * _wide(q), _wide(k), _wide(v)
    mean_v = values.mean(1, keepdim=True)
    centred = keys - keys.mean(1, keepdim=True)  # equals the correction by mean k, with less cancellation
    summed = torch.einsum("bnhd,bnhe->bhde", centred, values - mean_v) / k.shape[1]
    return (mean_v + torch.einsum("bnhd,bhde->bnhe", queries, summed)).to(v.dtype)


def inline_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    logits = scale * torch.einsum("bnhd,bmhd->bhnm", _wide(q), _wide(k))
    weights = (1 + logits - logits.mean(-1, keepdim=True)) / k.shape[1]
    return torch.einsum("bhnm,bmhd->bnhd", weights, _wide(v)).to(v.dtype)


@_without_autocast
def flow_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flow attention: (B, N, h, d) each -> (B, N, h, d)."""
    fq, fk, values = _wide(q).sigmoid(), _wide(k).sigmoid(), _wide(v)
    incoming = torch.einsum("bnhd,bhd->bnh", fq + EPS, fk.sum(1) + EPS)
    outgoing = torch.einsum("bnhd,bhd->bnh", fk + EPS, fq.sum(1) + EPS)
    conserved_in = torch.einsum("bnhd,bhd->bnh", fq, (fk / outgoing.unsqueeze(-1)).sum(1))
    conserved_out = torch.einsum("bnhd,bhd->bnh", fk, (fq / incoming.unsqueeze(-1)).sum(1)).clamp(-1, 1)
    competing = conserved_out.softmax(dim=1) * k.shape[1]
    summed = torch.einsum("bnhd,bnhe->bhde", fk, values * competing.unsqueeze(-1))
    out = torch.einsum("bnhd,bhde->bnhe", fq / incoming.unsqueeze(-1), summed)
    return (out * conserved_in.sigmoid().unsqueeze(-1)).to(v.dtype)


def flow_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    fq, fk = _wide(q).sigmoid(), _wide(k).sigmoid()
    flows = torch.einsum("bnhd,bmhd->bhnm", fq, fk)
    incoming = torch.einsum("bnhd,bmhd->bhn", fq + EPS, (fk.sum(1, keepdim=True) + EPS))
    outgoing = torch.einsum("bmhd,bnhd->bhm", fk + EPS, (fq.sum(1, keepdim=True) + EPS))
    conserved_in = (flows / outgoing.unsqueeze(-2)).sum(-1)
    conserved_out = (flows / incoming.unsqueeze(-1)).sum(-2).clamp(-1, 1)
    weights = flows / incoming.unsqueeze(-1) * conserved_out.softmax(-1).unsqueeze(-2) * k.shape[1]
    weights = weights * conserved_in.sigmoid().unsqueeze(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, _wide(v)).to(v.dtype)


def depthwise(v: Tensor, grid: tuple[int, int], kernels: Tensor) -> Tensor:
    """A 3 x 3 convolution of each channel on the grid, zeros beyond the edge.

    Args:
        v: shape (B, N, h, d) with N = H * W in raster order.
        grid: (H, W).
        kernels: shape (B or 1, h, d, 3, 3).
    """
    batch, _, heads, width = v.shape
    planes = v.permute(0, 2, 3, 1).reshape(1, batch * heads * width, *grid)
    weight = kernels.to(v.dtype).expand(batch, *kernels.shape[1:]).reshape(-1, 1, 3, 3)
    out = F.conv2d(planes, weight, padding=1, groups=batch * heads * width)
    return out.view(batch, heads, width, -1).permute(0, 3, 1, 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
