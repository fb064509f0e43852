"""Rounds go forth and back, keep to the time limit, and are compared within themselves."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from reattend.bench import rounds
from reattend.bench.frame import Conditions
from reattend.bench.measure import Run
from reattend.bench.rounds import Timed, one_round, repeat, untimed


@dataclass
class Case(Timed):
    name: str
    takes: float = 1.0  # seconds of a run
    first: float = 0.0
    ROUNDS = 4
    SLOW_SECONDS = 10.0

    def __str__(self) -> str:
        return self.name

    def guess(self, cases: list[Case]) -> float:
        return self.first


class Clock:
    """Stands in for the clock; every run moves it on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.seen = 0.0, []
        monkeypatch.setattr(rounds.time, "monotonic", lambda: self.now)

    def conditions(self, seconds: float, quick: bool = False) -> Conditions:
        return Conditions(torch.device("cpu"), quick, seconds / 60, began=self.now)

    def time_one(self, case: Case, arm: str) -> Run:
        self.seen.append((case.name, arm))
        self.now += case.takes
        return Run(case.takes, None)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def test_every_other_round_goes_in_reverse_and_cases_take_turns(clock):
    cases = [Case("a", arms="xyz"), Case("b", arms="uv")]
    repeat(cases, clock.time_one, clock.conditions(1000))
    forth = [*(("a", arm) for arm in "xyz"), *(("b", arm) for arm in "uv")]
    back = [*(("a", arm) for arm in "zyx"), *(("b", arm) for arm in "vu")]
    assert clock.seen == [*forth, *back] * 2
    assert [case.rounds for case in cases] == [4, 4] and cases[0].round_seconds == 3.0
    assert list(cases[0].runs) == ["x", "y", "z"] and untimed(cases) == {}


def test_a_quick_run_has_one_round_and_slow_runs_are_repeated_less(clock):
    quick, slow = [Case("a", arms="xy")], [Case("a", arms="xy", takes=11.0)]
    repeat(quick, clock.time_one, clock.conditions(1000, quick=True))
    repeat(slow, clock.time_one, clock.conditions(1000))
    assert (quick[0].rounds, slow[0].rounds) == (1, 3)


def test_a_round_that_would_not_fit_the_time_limit_is_left_out(clock):
    small, large = Case("small", arms="xy"), Case("large", arms="xy", takes=4.0)
    repeat([small, large], clock.time_one, clock.conditions(14.5))
    # After two rounds of the small one and one of the large one 2.5 s are left: enough for one more small one.
    assert (small.rounds, large.rounds) == (3, 1)
    guessed = Case("guessed", arms="xy", first=3.0)
    repeat([guessed], clock.time_one, clock.conditions(2.5))
    assert guessed.rounds == 0 and untimed([small, guessed]) == {"guessed": "no time left"}


def test_ratios_are_taken_within_a_round_and_the_median_is_told():
    times = {"x": [8.0, 80.0, 9.0], "y": [1.0, 20.0, 1.0], "failed later": [2.0]}
    case = Case("a", runs={arm: [Run(seconds, None) for seconds in row] for arm, row in times.items()})
    assert case.ratio("x", "y") == 8.0  # of 8, 4 and 9; medians alone would give 9
    assert case.ratio("x", "failed later") == 4.0 and case.ratio("x", "x") == 1.0
    assert case.ratio("x", "never ran") is None


def test_what_is_told_of_a_case_are_medians_and_all_seconds():
    runs = {"x": [Run(1.0, 10.0), Run(3.0, None), Run(9.0, 20.0)], "y": [Run(1.0, None)]}
    assert Case("a", runs=runs).told({"what": "a"}, lambda arm: {"of": arm}) == {
        "what": "a",
        "rounds": 3,
        "arms": {
            "x": {"seconds": 3.0, "of": "x", "peak_mib": 15.0, "all_seconds": [1.0, 3.0, 9.0]},
            "y": {"seconds": 1.0, "of": "y", "peak_mib": None, "all_seconds": [1.0]},
        },
    }


def test_an_arm_that_could_not_run_leaves_the_others_alone(clock):
    case = Case("a", arms="xy")
    one_round(case, lambda case, arm: None if arm == "x" else clock.time_one(case, arm))
    assert list(case.runs) == ["y"] and case.rounds == 1
