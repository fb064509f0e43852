"""Local attention on a CPU in two parts: near keys tile by tile, all others at once, put together exactly.

All queries see the same global and pooled keys. Gathered for each tile again they would be half of what is copied and
multiplied at 512 text tokens and radius 8. So they get one fused softmax of their own, and both are put together by their
log-sum-exp, as any parts are (`parts`); for two of them that is one pass over the output::

    out = near + sigmoid(lse_far - lse_near) (far - near)

torch tells the log-sum-exp of its fused kernel on a CPU without a gradient; where one is wanted, and elsewhere, `halo`
gathers all keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .halo import Plan, attend_tiles, global_index, plan_tiles
from .layout import TokenLayout
from .patterns import Pattern
from .pool import Pool, pool_bias

__all__ = ["NearFar", "attend_near_far", "plan_near_far"]

LEAST = 256  # global and pooled keys; to gather fewer takes no longer than to merge them in


@dataclass(frozen=True, eq=False)
class NearFar:
    """What one layout and pattern need.

    Attributes:
        layout: the whole one.
        near: plan for the grid alone.
        far: index of the global and pooled keys in [sequence | pooled], int64, shape (F,).
        bias: what the pooled keys' weights add to their logits, shape (1, 1, 1, F); None = nothing.
    """

    layout: TokenLayout
    near: Plan
    far: Tensor
    bias: Tensor | None


def plan_near_far(
    layout: TokenLayout, pattern: Pattern, side: int, pool: Pool | None, device: torch.device, dtype: torch.dtype
) -> NearFar | None:
    """None where one gather of all keys is the better or the only way; 16 bits would be rounded once more in between."""
    pooled = 0 if pool is None else pool.keys(layout)
    if device.type != "cpu" or dtype.itemsize < 4 or layout.global_tokens + pooled < LEAST:
        return None
    near = plan_tiles(replace(layout, before=0, after=0), pattern, (side, side), None, device, dtype)
    far = torch.cat([global_index(layout), torch.arange(layout.tokens, layout.tokens + pooled)])
    weight, bias = pool_bias(layout, pool) if pool is not None else None, None
    if weight is not None:
        bias = torch.cat([torch.zeros(layout.global_tokens), weight]).to(dtype)[None, None, None]
    return NearFar(layout, near, far, bias)


def attend_near_far(
    q: Tensor, k: Tensor, v: Tensor, plan: NearFar, *, scale: float, hidden: Tensor | None = None
) -> Tensor:
    """Softmax attention of each grid query over its near keys and all global and pooled ones; no gradient.

    Args:
        q: grid queries, shape (B, N, h, d).
        k, v: [sequence | pooled], shape (B, N + T + P, h, d).
        hidden: global keys nobody sees, bool, shape (B, T).

    Returns:
        shape (B, N, h, d).
    """
    grid, mask = plan.layout.grid, plan.bias
    if hidden is not None:
        row = q.new_zeros(len(hidden), 1, 1, len(plan.far))
        row[..., : hidden.shape[1]] = hidden[:, None, None].to(q.dtype) * torch.finfo(q.dtype).min
        mask = row if mask is None else row + mask  # no column has both
    far, far_lse = _fused(q.contiguous(), k.index_select(1, plan.far), v.index_select(1, plan.far), scale, mask)
    near = attend_tiles(q, k[:, grid], v[:, grid], plan.near, scale=scale, softmax=_with_lse)
    near, near_lse = near[..., :-1], near[..., -1]
    return near.lerp_(far, torch.sigmoid(far_lse - near_lse).unsqueeze(-1))


def _with_lse(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """As `attend_tiles` wants its softmax, with the log-sum-exp as one more channel: (B, M, h, d + 1)."""
    out, lse = _fused(q, k, v, scale, mask)
    return torch.cat([out, lse.unsqueeze(-1)], dim=-1)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch's fused attention of contiguous (B, M, h, d), and the log-sum-exp of its logits, (B, M, h)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)
