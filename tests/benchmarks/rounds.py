"""Timing several ways of doing one thing against each other, in rounds.

A case is the thing, its arms are the ways. Every round runs each arm once, every other round in reverse, so that drift of
the machine hits all alike. Ratios are taken within a round, and the median over the rounds is told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar, TypeVar

import torch

from .frame import Conditions
from .measure import Run, measured, timed

__all__ = ["Timed", "one_round", "one_run", "repeat", "untimed"]

ROUNDS_IF_SLOW = 3


@dataclass(kw_only=True)
class Timed:
    """A case and its runs so far, one per round; a benchmark derives its own from it and says in `str` what it is."""

    ROUNDS: ClassVar[int] = 5
    SLOW_SECONDS: ClassVar[float] = math.inf  # if a run takes longer, ROUNDS_IF_SLOW are enough

    arms: Sequence[Any] = ()
    runs: dict[Any, list[Run]] = field(default_factory=dict)
    round_seconds: float = 0.0  # of the last round

    @property
    def rounds(self) -> int:
        return max(map(len, self.runs.values()), default=0)

    @property
    def wanted(self) -> int:
        slow = any(run.seconds > self.SLOW_SECONDS for runs in self.runs.values() for run in runs)
        return min(self.ROUNDS, ROUNDS_IF_SLOW) if slow else self.ROUNDS

    def guess(self, cases: Sequence[Any]) -> float:
        """Seconds that the first round takes at most, from what other cases took; 0 if nothing tells."""
        return 0.0

    def ratio(self, arm: Any, other: Any) -> float | None:
        """How many times as long as `other` an arm takes; None if no round has both."""
        pairs = zip(self.runs.get(arm, []), self.runs.get(other, []), strict=False)  # one may have failed in the end
        ratios = [mine.seconds / theirs.seconds for mine, theirs in pairs]
        return median(ratios) if ratios else None

    def told(self, about: dict[str, Any], each: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """The case as JSON: what it is (`about`), and for each arm its medians and what `each` says of it."""
        arms = {}
        for arm, runs in self.runs.items():
            seconds, peaks = [run.seconds for run in runs], [run.peak_mib for run in runs if run.peak_mib is not None]
            peak = median(peaks) if peaks else None
            arms[str(arm)] = {"seconds": median(seconds), **each(arm), "peak_mib": peak, "all_seconds": seconds}
        return {**about, "rounds": self.rounds, "arms": arms}


AnyCase = TypeVar("AnyCase", bound=Timed)


def repeat(cases: Sequence[AnyCase], time_one: Callable[[AnyCase, Any], Run | None], conditions: Conditions) -> None:
    """Rounds of all cases in turn, one of each in a quick run; those that do not fit the time limit are left out.

    time_one: runs an arm of a case; None where it could not.
    """
    for _ in range(1 if conditions.quick else max(case.ROUNDS for case in cases)):
        for case in cases:
            if case.rounds < case.wanted and (case.round_seconds or case.guess(cases)) <= conditions.seconds_left():
                one_round(case, time_one)


def one_round(case: AnyCase, time_one: Callable[[AnyCase, Any], Run | None]) -> None:
    """Every arm once, in reverse if an odd number of rounds was before."""
    start = time.monotonic()
    for arm in list(case.arms)[:: -1 if case.rounds % 2 else 1]:
        if (run := time_one(case, arm)) is not None:
            case.runs.setdefault(arm, []).append(run)
    case.round_seconds = time.monotonic() - start


def one_run(case: Timed, arm: Any, work: Callable[[], Any], device: torch.device) -> Run:
    """A timed run of an arm; before the first one it is run to be weighed."""
    peak = None if arm in case.runs else measured(work, device).peak_mib
    return Run(timed(work, device), peak)


def untimed(cases: Sequence[Timed]) -> dict[str, str]:
    """The cases that no round was run of, as `left_out` tells them."""
    return {str(case): "no time left" for case in cases if not case.rounds}
