"""The softmax scale when a picture is larger than those a model was trained on.

More keys flatten a softmax. A scale that grows with log(keys) keeps its entropy about where it was in training::

    "none"        d^-1/2
    "tokens"      d^-1/2 sqrt(log n / log n_train)       n: all tokens of the sequence
    "tokens_x10"  d^-1/2 sqrt(log 10 n / log n_train)    what published weights with pooled keys were trained with
    "visible"     as "tokens", n: mean number of keys that a grid query sees
    a number      d^-1/2 times the number

With a disc, "visible" stays at 1 but for the smaller share of border tokens: a query sees as many keys in a large picture
as in a small one. With n = n_train all but "tokens_x10" are "none".
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

from .layout import TokenLayout
from .patterns import Pattern
from .pool import Pool

__all__ = ["ScaleRule", "mean_keys", "softmax_scale"]

ScaleRule = Literal["none", "tokens", "tokens_x10", "visible"] | float


def softmax_scale(
    rule: ScaleRule,
    width: int,
    layout: TokenLayout,
    pattern: Pattern,
    *,
    trained: TokenLayout | None = None,
    pool: Pool | None = None,
) -> float:
    """What logits are multiplied with.

    Args:
        rule: see above.
        width: d, channels of a head.
        layout, pattern, pool: of this call.
        trained: layout the weights were trained with; needed by the rules that compare with it.
    """
    if isinstance(rule, int | float):
        return rule * width**-0.5
    if rule not in ("none", "tokens", "tokens_x10", "visible"):
        raise ValueError(f"no such scale rule: {rule!r}; choose 'none', 'tokens', 'tokens_x10', 'visible' or a number.")
    if rule == "none":
        return width**-0.5
    if trained is None:
        raise ValueError(f"scale rule {rule!r} compares with the training size and got none; pass `trained`.")
    if rule == "visible":
        now, then = (mean_keys(where, pattern, pool) for where in (layout, trained))
    else:
        now, then = layout.tokens * (10 if rule == "tokens_x10" else 1), trained.tokens
    if min(now, then) <= 1:
        raise ValueError(f"scale rule {rule!r} needs more than one key, got {now:g} now and {then:g} in training.")
    return math.sqrt(math.log(now) / math.log(then)) * width**-0.5


@lru_cache(maxsize=64)
def mean_keys(layout: TokenLayout, pattern: Pattern, pool: Pool | None = None) -> float:
    """Mean number of keys a grid query sees: those of its pattern, the globals and the pooled ones."""
    seen = float(pattern.key_counts(layout).double().mean())
    return seen + layout.global_tokens + (pool.keys(layout) if pool else 0)
