"""Every benchmark has one shape of result and of a goal, one page for people, and a time limit."""

from __future__ import annotations

import json

import pytest
import torch

from reattend.bench import agent, clear, distill, story, video
from reattend.bench.frame import Conditions, Found, arms_grid, cell, goal, grid, page, run_benchmark

GOALS = [
    goal("times faster", 1.2345678, "at_least", 1.35),
    goal("overhead", 0.15, "at_most", 0.15),
    goal("growth", None, "at_most", 0.05),
]


def measure(conditions: Conditions) -> Found:
    assert conditions.device.type == "cpu" and 0 < conditions.seconds_left() <= 60 * conditions.minutes
    return Found(
        torch.float32, cases=[{"what": "a case"}], goals=GOALS, left_out={"b": "no time left"}, more={"more": 1}
    )


def table(result: dict) -> str:
    return page(result, ["first block"], [], ["second", "block"])


def test_a_result_has_one_shape_in_the_file_in_json_and_returned(tmp_path, capsys):
    path = tmp_path / "new" / "a.json"
    result = run_benchmark("a", measure, table, json=True, out=path, device="cpu")
    assert json.loads(path.read_text()) == json.loads(capsys.readouterr().out) == result
    assert list(result) == [
        "benchmark", "command", "device", "threads", "system", "versions", "dtype", "cases", "more", "left_out", "goals",
        "minutes",
    ]  # fmt: skip
    assert (result["benchmark"], result["command"], result["dtype"]) == ("a", "reattend bench a", "float32")
    assert 0 <= result["minutes"] < 1


def test_a_page_tells_where_it_is_from_what_was_left_out_and_the_goals(capsys):
    result = run_benchmark("a", measure, table, quick=True, device="cpu")
    printed = capsys.readouterr().out
    assert printed == table(result) + "\n"
    top, first, second, last = printed.rstrip("\n").split("\n\n")
    assert top.startswith(f"{result['device']}, {result['threads']} threads, float32, python ")
    assert f"torch {torch.__version__}" in top and f"`reattend bench a --quick`, {result['minutes']} minutes" in top
    assert top.endswith("\nQuick: sizes too small to say anything about speed.")
    assert (first, second) == ("first block", "second\nblock")
    assert last.splitlines() == [
        "b: left out, no time left",
        "times faster: 1.235 (goal: at least 1.35), MISSED",
        "overhead: 0.15 (goal: at most 0.15), met",
        "growth: not measured (goal: at most 0.05)",
    ]
    run_benchmark("a", measure, table, device="cpu")
    assert "Quick" not in capsys.readouterr().out


def test_a_goal_is_met_at_its_bound_and_neither_met_nor_missed_without_a_value():
    for side, far in (("at_least", 0.5), ("at_most", 2.0)):
        assert goal("a", 1.0, side, 1.0) == {"goal": "a", "value": 1.0, side: 1.0, "met": True}
        assert goal("a", far, side, 1.0)["met"] is False
        assert goal("a", None, side, 1.0)["met"] is None


def test_the_table_has_a_line_for_each_arm_and_for_each_that_could_not_run():
    arms = {"stock": {"seconds": 1.23456, "faster": 1.0, "peak_mib": 7.6},
            "ours": {"seconds": 0.5, "faster": None, "peak_mib": None}}  # fmt: skip
    cases = [{"pixels": 64, "rounds": 3, "arms": arms, "left_out": {"theirs": "no compiler"}},
             {"pixels": 128, "rounds": 0, "arms": {}}]  # fmt: skip
    assert arms_grid(cases, {"pixels": lambda case: case["pixels"]}, {"times faster": ("faster", ".2f")}) == [
        "| pixels | arm | seconds | times faster | extra memory at peak, MiB | rounds |",
        "|---|---|---|---|---|---|",
        "| 64 | stock | 1.23 | 1.00 | 8 | 3 |",
        "| 64 | ours | 0.5 | – | – | 3 |",
        "| 64 | theirs | no compiler | – | – | – |",
    ]
    assert grid(["", "a"], [[1, ""]]) == ["| | a |", "|---|---|", "| 1 | |"]
    assert (cell(None, ".1f"), cell(0.0, ".1f")) == ("–", "0.0")


@pytest.mark.parametrize("benchmark", [agent, clear, distill, story, video], ids=lambda module: module.__name__)
@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_a_time_limit_must_be_positive(benchmark, minutes):
    with pytest.raises(ValueError, match=f"minutes must be positive, got {minutes}. It is the time limit"):
        benchmark.run(minutes=minutes, device="cpu")
