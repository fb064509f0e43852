"""Rates of right answers with their uncertainty, and differences between two arms that answered the same questions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Difference", "Rate", "difference", "rate"]

Z = 1.959964  # two-sided 95 % of a normal distribution
RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval; all three are None where nothing was asked."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    def _text(self, pattern: str, number: str) -> str:
        """The three in hundredths: each as `number` formats it, then put into `pattern`."""
        if self.value is None or self.low is None or self.high is None:
            return "-"
        return pattern.format(*(format(100 * x, number) for x in (self.value, self.low, self.high)))


@dataclass(frozen=True, kw_only=True)
class Rate(Estimate):
    """A share of right answers, with Wilson's interval."""

    right: int
    asked: int

    def __str__(self) -> str:
        return self._text("{} % [{}, {}]", ".1f")


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """How much higher a rate is than the first arm's."""

    def __str__(self) -> str:
        return self._text("{} [{}, {}]", "+.1f")


def rate(right: ArrayLike, asked: ArrayLike) -> Rate:
    """Wilson's score interval (1927): inside [0, 1], and not empty at 0 or 100 %.

    Answers about one picture or one story depend on each other, so `asked` is divided by the design effect: how much the
    variance between groups, of the ratio estimator, is above that of independent answers (Korn and Graubard 1998).

    Args:
        right: right answers, a number or one per group, shape (n,).
        asked: questions, as `right`. Those of a single number count as independent.
    """
    per_group = np.atleast_1d(np.asarray(right, np.float64)), np.atleast_1d(np.asarray(asked, np.float64))
    total, n = per_group[0].sum(), per_group[1].sum()
    if not n:
        return Rate(right=0, asked=0)
    p = total / n
    k = max(1.0, n / _design_effect(*per_group))  # as many independent answers would tell as much
    z2 = Z * Z
    middle = (p + z2 / (2 * k)) / (1 + z2 / k)
    reach = Z / (1 + z2 / k) * math.sqrt(p * (1 - p) / k + z2 / (4 * k**2))
    low, high = max(0.0, float(middle - reach)), min(1.0, float(middle + reach))
    return Rate(right=int(total), asked=int(n), value=float(p), low=low, high=high)


def _design_effect(right: np.ndarray, asked: np.ndarray) -> float:
    """At least 1, which is also the answer where one group, or only right or only wrong answers, tell nothing."""
    groups, p = int((asked > 0).sum()), right.sum() / asked.sum()
    if groups < 2 or p in (0, 1):
        return 1.0
    between = groups / (groups - 1) * ((right - p * asked) ** 2).sum() / asked.sum() ** 2
    return max(1.0, float(between / (p * (1 - p) / asked.sum())))


def difference(right: np.ndarray, base: np.ndarray, asked: np.ndarray) -> Difference:
    """The difference of two rates over the same pictures, with the percentile interval of a paired bootstrap.

    Whole pictures are drawn again, both arms together, so neither the sprites of a picture nor its two readings need to
    be independent. The draws are fixed: the same numbers give the same interval.

    Args:
        right: right answers of the arm per picture, shape (n,).
        base: right answers of the arm it is compared with, shape (n,).
        asked: questions per picture, shape (n,).
    """
    right, base, asked = (np.asarray(counts, np.float64) for counts in (right, base, asked))
    if not asked.sum():
        return Difference()
    n = len(asked)
    rng = np.random.default_rng(0)
    # how often each picture comes up in each resample
    times = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    questions = times @ asked
    drawn = (times @ (right - base))[questions > 0] / questions[questions > 0]
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Difference(value=float((right - base).sum() / asked.sum()), low=float(low), high=float(high))
