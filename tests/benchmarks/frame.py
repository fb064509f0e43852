"""What every benchmark has around what it measures: options, time limit, one shape of result and of a goal, and its page.

The `run` of a benchmark is `run_benchmark` with its name, a function that measures and one that makes a table for people.
The result is one JSON object: benchmark, command, surroundings, dtype, cases, what else there is, left_out, goals, minutes.
"""

from __future__ import annotations

import json as json_text
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..pipelines.files import written_whole
from .measure import surroundings

__all__ = ["Conditions", "Found", "arms_grid", "cell", "goal", "grid", "page", "run_benchmark", "where"]


@dataclass(frozen=True)
class Conditions:
    """What a benchmark has to keep to; the clock runs from the start. Raises ValueError for a bad time limit."""

    device: torch.device
    quick: bool
    minutes: float
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(
                f"minutes must be positive, got {self.minutes}. It is the time limit; give for example 20."
            )

    def seconds_left(self) -> float:
        """Until the time limit; negative after it."""
        return self.minutes * 60 - self.seconds_spent()

    def seconds_spent(self) -> float:
        return time.monotonic() - self.began


@dataclass(frozen=True)
class Found:
    """What a benchmark found out; all but `dtype` is JSON-able.

    Attributes:
        dtype: numbers it computed in.
        cases: rows of the result.
        goals: each made by `goal`.
        left_out: what was not measured, and why.
        more: further entries of the result.
    """

    dtype: torch.dtype
    cases: list[dict[str, Any]]
    goals: list[dict[str, Any]]
    left_out: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


def run_benchmark(
    name: str,
    measure: Callable[[Conditions], Found],
    table: Callable[[dict[str, Any]], str],
    *,
    minutes: float = 20.0,
    quick: bool = False,
    json: bool = False,
    out: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure, print a table (or with `json` one JSON object), and return what was measured.

    Args:
        name: of the benchmark, as `reattend bench` knows it.
        measure: does the work.
        table: the result for people.
        minutes: time limit; what would not fit is left out, and the result says so.
        quick: tiny sizes: tries everything in seconds and says nothing about speed.
        json: print JSON instead of the table.
        out: JSON file to write as well.
        device: "cpu", "cuda", ...; None takes CUDA if there is one.

    Raises ValueError for a time limit that is not positive.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    conditions = Conditions(place, quick, minutes)
    found = measure(conditions)
    result = {
        "benchmark": name,
        "command": f"reattend bench {name}" + (" --quick" if quick else ""),
        **surroundings(place),
        "dtype": str(found.dtype).removeprefix("torch."),
        "cases": found.cases,
        **found.more,
        "left_out": found.left_out,
        "goals": found.goals,
        "minutes": round(conditions.seconds_spent() / 60, 2),
    }
    if out is not None:
        with written_whole(out) as (aside,):
            aside.write_text(json_text.dumps(result, indent=2) + "\n")
    print(json_text.dumps(result) if json else table(result))
    return result


def goal(what: str, value: float | None, side: Literal["at_least", "at_most"], bound: float) -> dict[str, Any]:
    """What the project wants of a number; a value of None was not measured, and is neither met nor missed."""
    met = None if value is None else value >= bound if side == "at_least" else value <= bound
    return {"goal": what, "value": value, side: bound, "met": met}


def where(result: dict[str, Any]) -> str:
    """On what a result was measured."""
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items() if value)
    return f"{result['device']}, {result['threads']} threads, {result['dtype']}, {versions}"


def page(result: dict[str, Any], *blocks: Sequence[str]) -> str:
    """A result for people, as Markdown: where it is from, the lines of each block, what was left out, and the goals."""
    top = [f"{where(result)}; `{result['command']}`, {result['minutes']} minutes"]
    if result["command"].endswith(" --quick"):
        top.append("Quick: sizes too small to say anything about speed.")
    left_out = [f"{what}: left out, {why}" for what, why in result["left_out"].items()]
    blocks = (top, *blocks, [*left_out, *map(_goal_line, result["goals"])])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def grid(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    return [_row(columns), "|---" * len(columns) + "|", *map(_row, rows)]


def arms_grid(
    cases: Iterable[dict[str, Any]],
    about: Mapping[str, Callable[[dict[str, Any]], Any]],
    numbers: Mapping[str, tuple[str, str]],
) -> list[str]:
    """A line for each arm of each case, as `rounds.Timed.told` gives them, and for each that could not run.

    Args:
        about: title of a column: what it tells of the case.
        numbers: title of a column: which number of the arm, and how `format` writes it.
    """
    numbers = {"seconds": ("seconds", ".3g"), **numbers, "extra memory at peak, MiB": ("peak_mib", ".0f")}
    rows: list[Sequence[Any]] = []
    for case in cases:
        what = [tell(case) for tell in about.values()]
        for arm, row in case["arms"].items():
            rows.append([*what, arm, *(cell(row[key], form) for key, form in numbers.values()), case["rounds"]])
        failed = case.get("left_out", {}).items()
        rows += [[*what, arm, why, *["–"] * len(numbers)] for arm, why in failed]
    return grid([*about, "arm", *numbers, "rounds"], rows)


def cell(value: float | None, form: str) -> str:
    """A number as `format` writes it, or a dash where there is none."""
    return "–" if value is None else format(value, form)


def _row(cells: Sequence[Any]) -> str:
    return "|" + "".join(f" {text} |" if text else " |" for text in map(str, cells))


def _goal_line(goal: dict[str, Any]) -> str:
    side = "at_least" if "at_least" in goal else "at_most"
    value = "not measured" if goal["value"] is None else f"{goal['value']:.4g}"
    verdict = {True: ", met", False: ", MISSED", None: ""}[goal["met"]]
    return f"{goal['goal']}: {value} (goal: {side.replace('_', ' ')} {goal[side]:g}){verdict}"
