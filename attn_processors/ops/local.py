"""Local attention with global tokens: the one entry, and the choice of how it is computed.

A *grid* query sees the grid keys of its pattern (`patterns.py`), all global keys and all pooled keys (`pool.py`), in one
softmax. A *global* query sees all keys but the pooled ones. Global keys may be hidden per sample (padded prompts). With
a fixed pattern the cost grows linearly with the picture (CLEAR, arXiv 2412.16112).

Global queries are few: one dense softmax. Grid queries have these backends, which compute the same numbers:

    dense       one softmax without a mask; where the pattern covers the grid
    reference   one softmax with the N x N mask written out: the truth for tests, and the fastest way on a small grid
    tile        gathered whole tiles, no mask; TileWindow only
    halo        gathered surroundings of each tile of queries; any pattern, device and dtype, with gradients. Without
                them, on a CPU, global and pooled keys are not gathered but merged in (`near_far.py`)
    flex        torch's block-sparse kernel; compiled at first use, so only on request

"auto" takes the first that can run and pays off. A backend asked for by name runs or says why it cannot.

Shapes: queries, keys and values are (B, tokens, h, d), the layout of diffusers' attention dispatcher.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .cost import visited_keys
from .flex import attend_blocks, why_not_flex
from .halo import Plan, Softmax, attend_tiles, default_side, global_index, plan_tiles
from .layout import TokenLayout
from .near_far import NearFar, attend_near_far, plan_near_far
from .patterns import Disc, Pattern, Square, TileWindow
from .pool import Pool, pool_bias, pool_grid
from .tile import plan_window, why_not_tile

__all__ = [
    "BACKENDS", "PatternUnavailable", "Prepared",
    "attend", "choose", "explain", "local_attention", "prepare", "sdpa",
]  # fmt: skip

log = logging.getLogger(__name__)

BACKENDS = ("dense", "reference", "tile", "halo", "flex")
KEPT_TOKENS = 2048  # up to here an N x N mask is kept for the next call, 16 MiB at most in fp32
REFERENCE_TOKENS = 16_384  # above, the N x N mask alone takes more than a gigabyte
GATHER_COST = 1.5  # a gathered key costs about this many keys of one big softmax: copies, masks, smaller products


class PatternUnavailable(ValueError):
    """The backend asked for by name cannot compute this pattern here."""


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    pattern: Pattern,
    *,
    pool: Pool | None = None,
    pool_weights: Tensor | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    softmax: Softmax | None = None,
) -> Tensor:
    """Softmax attention in which a grid token sees its surroundings and the global tokens.

    Args:
        q, k, v: the whole sequence after rotary embedding, shape (B, tokens, h, d). Keys and values may have fewer
            heads, each for a group of query heads.
        layout: where the tokens are, `tokens` of them.
        pattern: which grid keys a grid query sees.
        pool: a coarse view of the whole grid besides; `pool_weights` is its weight map, shape (f, f), None = mean.
        key_valid: False hides a global key from all queries, bool, shape (B, tokens); grid keys are always valid.
        scale: what logits are multiplied with; d^-1/2 by default, see `scale.py`.
        backend: "auto" or one of BACKENDS.
        softmax: fused attention to compute with, called as softmax(q, k, v, scale=..., mask=...) on (B, M, h, d) with
            an additive mask that broadcasts to (B, h, M, K), or None. Default torch's. "flex" does not use it.

    Returns:
        shape (B, tokens, h, d).

    Raises:
        PatternUnavailable: `backend` cannot run; the message says why.
    """
    _check(q, k, v, layout, key_valid)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    prepared = prepare(
        layout, pattern, pool=pool, backend=backend, device=q.device, dtype=q.dtype, needs_grad=needs_grad
    )
    return attend(q, k, v, prepared, pool_weights=pool_weights, key_valid=key_valid, scale=scale, softmax=softmax)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What does not depend on the numbers: the choice of the backend, index and mask tensors.

    Made outside compiled regions, read inside them.
    """

    layout: TokenLayout
    pattern: Pattern
    pool: Pool | None
    backend: str
    device: torch.device
    dtype: torch.dtype
    globals_at: Tensor  # index of the global tokens in the sequence, shape (T,)
    plan: Plan | None  # of "halo" and "tile"
    split: NearFar | None  # of "halo", where it pays
    mask: Tensor | None  # of "reference" and "dense", over [sequence | pooled]


def prepare(
    layout: TokenLayout,
    pattern: Pattern,
    *,
    pool: Pool | None = None,
    backend: str = "auto",
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool = False,
) -> Prepared:
    """Choose and make index and mask tensors for `attend`; the last few are kept, so asking again is cheap.

    Raises:
        PatternUnavailable: `backend` cannot run.
    """
    taken = choose(layout, pattern, pool=pool, backend=backend, device=device.type, needs_grad=needs_grad, dtype=dtype)
    plan, split, mask = None, None, None
    if taken == "tile" and isinstance(pattern, TileWindow):
        plan = plan_window(layout, pattern, pool, device, dtype)
    elif taken == "halo":
        side = default_side(layout, pattern, device.type)
        plan = plan_tiles(layout, pattern, (side, side), pool, device, dtype)
        split = None if needs_grad else plan_near_far(layout, pattern, side, pool, device, dtype)
    elif taken in ("dense", "reference"):
        make = _reference_mask if layout.grid_tokens <= KEPT_TOKENS else _reference_mask.__wrapped__
        mask = make(layout, None if taken == "dense" else pattern, pool, device, dtype)
    return Prepared(layout, pattern, pool, taken, device, dtype, global_index(layout).to(device), plan, split, mask)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prepared: Prepared,
    *,
    pool_weights: Tensor | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    softmax: Softmax | None = None,
) -> Tensor:
    """`local_attention` with all choices made; the arguments mean what they mean there."""
    layout, pool, backend = prepared.layout, prepared.pool, prepared.backend
    k, v = (_same_heads(x, q.shape[2]) for x in (k, v))
    own, softmax = softmax is None, softmax or sdpa
    if scale is None:
        scale = q.shape[-1] ** -0.5
    hidden = None if key_valid is None or not layout.global_tokens else ~layout.globals_of(key_valid)
    if backend == "dense" and pool is None:
        return softmax(q, k, v, scale=scale, mask=_hidden_mask(prepared, hidden, q, layout.tokens))

    grid_q = q[:, layout.grid]
    keys, values = k, v
    if pool is not None:
        keys, values = (torch.cat([x, pool_grid(x, layout, pool, pool_weights)], dim=1) for x in (k, v))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values))
    if backend == "flex":
        assert isinstance(prepared.pattern, Disc | Square)  # else `choose` had refused
        if reason := why_not_flex(layout, prepared.pattern, q.device.type, needs_grad, q.dtype):
            raise PatternUnavailable(f"backend 'flex': {reason}. backend='auto' takes one that runs.")
        grid = attend_blocks(grid_q, keys, values, layout, prepared.pattern, pool=pool, scale=scale, hidden=hidden)
    elif prepared.split is not None and own and not (needs_grad or _converted()):
        grid = attend_near_far(grid_q, keys, values, prepared.split, scale=scale, hidden=hidden)
    elif prepared.plan is not None:
        grid = attend_tiles(grid_q, keys, values, prepared.plan, scale=scale, softmax=softmax, hidden=hidden)
    else:
        mask = _merge_masks(prepared.mask, _hidden_mask(prepared, hidden, q, keys.shape[1]))
        grid = softmax(grid_q, keys, values, scale=scale, mask=mask)
    if not layout.global_tokens:
        return grid
    mask = _hidden_mask(prepared, hidden, q, layout.tokens)
    return layout.assemble(grid, softmax(layout.globals_of(q), k, v, scale=scale, mask=mask))


def choose(
    layout: TokenLayout,
    pattern: Pattern,
    *,
    pool: Pool | None = None,
    backend: str = "auto",
    device: str = "cpu",
    needs_grad: bool = False,
    dtype: torch.dtype = torch.float32,
) -> str:
    """The backend for the grid queries.

    Args:
        backend: "auto", or the one that must be taken.
        device: type of the device, "cpu", "cuda", "mps".

    Raises:
        PatternUnavailable: the one asked for cannot run.
    """
    if backend == "auto":
        return _automatic(layout, pattern, pool, device)
    if backend not in BACKENDS:
        raise ValueError(f"no such backend: {backend!r}; choose 'auto' or one of {', '.join(BACKENDS)}.")
    reason = _why_not(backend, layout, pattern, device, needs_grad, dtype)
    if reason:
        raise PatternUnavailable(f"backend {backend!r}: {reason}. backend='auto' takes one that runs.")
    return backend


def explain(
    layout: TokenLayout,
    pattern: Pattern,
    *,
    pool: Pool | None = None,
    device: str = "cpu",
    needs_grad: bool = False,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Which backend "auto" takes and what speaks against each of the others, a line each."""
    taken = choose(layout, pattern, pool=pool, device=device, needs_grad=needs_grad, dtype=dtype)
    useful = visited_keys(layout, pattern, "pattern")
    lines = [f"{pattern} on {layout.height} x {layout.width} tokens, {device}: {useful:.0f} grid keys per query"]
    for name in BACKENDS:
        reason = _why_not(name, layout, pattern, device, needs_grad, dtype)
        if reason is None:
            reason = f"multiplies {visited_keys(layout, pattern, name, device):.0f} grid keys per query"
            if name == "flex":
                reason += "; compiles at its first call, so only if asked for by name"
        lines.append(f"{'->' if name == taken else '  '} {name}: {reason}")
    return "\n".join(lines)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """torch's fused attention on (B, M, h, d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _converted() -> bool:
    """Whether a compiler, or autocast, changes what is called."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


@lru_cache(maxsize=64)
def _automatic(layout: TokenLayout, pattern: Pattern, pool: Pool | None, device: str) -> str:
    if pattern.covers(layout):
        log.debug("dense: %s covers the %d x %d grid", pattern, layout.height, layout.width)
        return "dense"
    gathered = "tile" if isinstance(pattern, TileWindow) else "halo"
    others = layout.global_tokens + (pool.keys(layout) if pool else 0)
    dense = layout.grid_tokens + others
    local = GATHER_COST * (visited_keys(layout, pattern, gathered, device) + others)
    taken = "reference" if dense <= local and layout.grid_tokens <= REFERENCE_TOKENS else gathered
    log.debug("%s: %.0f keys per query gathered (with overhead), %d dense", taken, local, dense)
    return taken


def _why_not(
    backend: str, layout: TokenLayout, pattern: Pattern, device: str, needs_grad: bool, dtype: torch.dtype
) -> str | None:
    if backend == "dense" and not pattern.covers(layout):
        return f"{pattern} does not cover the {layout.height} x {layout.width} grid"
    if backend == "reference" and layout.grid_tokens > REFERENCE_TOKENS:
        return f"its mask has the square of {layout.grid_tokens} grid tokens, at most {REFERENCE_TOKENS} are allowed"
    if backend == "tile":
        return why_not_tile(pattern)
    if backend == "flex":
        return why_not_flex(layout, pattern, device, needs_grad, dtype)
    return None


@lru_cache(maxsize=8)
def _reference_mask(
    layout: TokenLayout, pattern: Pattern | None, pool: Pool | None, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """What is added to the logits of grid queries over [sequence | pooled]; without a pattern they see all.

    Returns:
        shape (1, 1, N or 1, N + T + P), or None if there is nothing to add.
    """
    weight = pool_bias(layout, pool) if pool is not None else None
    if pattern is None and weight is None:
        return None
    with torch.inference_mode(False):
        pooled = pool.keys(layout) if pool is not None else 0
        mask = torch.zeros(1 if pattern is None else layout.grid_tokens, layout.tokens + pooled, dtype=dtype)
        if pattern is not None:
            mask[:, layout.grid].masked_fill_(~pattern.visible(layout), torch.finfo(dtype).min)
        if weight is not None:
            mask[:, layout.tokens :] = weight.to(dtype)
        return mask.to(device)[None, None]


def _hidden_mask(prepared: Prepared, hidden: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """The hidden globals as a mask over the first `keys` of [sequence | pooled], shape (B, 1, 1, keys)."""
    if hidden is None:
        return None
    row = q.new_zeros(hidden.shape[0], keys)
    row[:, prepared.globals_at] = hidden.to(q.dtype) * torch.finfo(q.dtype).min
    return row[:, None, None]


def _merge_masks(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b  # they hide different keys, so the smallest number is never added to itself


def _same_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, key_valid: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[1] != layout.tokens:
            raise ValueError(
                f"{name} must have shape (B, {layout.tokens}, h, d) for {layout}, got {tuple(x.shape)}; "
                "pass the whole sequence and its layout."
            )
    if k.shape != v.shape or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k and v must have one shape and a number of heads that divides that of q, "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}."
        )
    if key_valid is not None and (key_valid.shape != q.shape[:2] or key_valid.dtype != torch.bool):
        raise ValueError(
            f"key_valid must be bool of shape {tuple(q.shape[:2])}, "
            f"got {key_valid.dtype} of shape {tuple(key_valid.shape)}."
        )
