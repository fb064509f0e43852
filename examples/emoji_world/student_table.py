"""The table of `students`: for every form how right and how near its pictures are, before and after, and what a step costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .evaluate import MEASURES
from .rates import Difference, Rate, difference, rate
from .read import Score
from .results import Results

__all__ = ["COST", "TEACHER", "TRAINED", "all_right", "arm_of", "summarize", "table"]

TEACHER, TRAINED, COST = "teacher", "trained: ", "cost: "  # arms, or beginnings of their names, in the results
DIGITS = {"latent_error": 3, "psnr": 1, "ssim": 3}  # how near pictures are, with the digits the table shows
GOAL = -0.02  # a student that attends locally is at most so much below its teacher


def arm_of(form: str, when: str) -> str:
    """The arm of a form "before" or "after" its training."""
    return f"{form}, {when}"


def all_right(score: Score) -> tuple[int, int]:
    """Whether a picture shows what its caption says, kinds, named tints and background: (right, asked)."""
    return int(score.kinds and score.background and score.tints_right == score.named), 1


def summarize(results: Results, forms: Sequence[str], samples: int) -> dict[str, Any]:
    """JSON-able: rates of the teacher; of each form before and after rates, differences to the teacher, nearness; costs."""
    counts = {"all right": all_right, **MEASURES}

    def right(arm: str) -> dict[str, np.ndarray]:
        scores = [Score(**results.entries[arm, i]["score"]) for i in range(samples)]
        return {words: np.array([measure(score) for score in scores]) for words, measure in counts.items()}

    def rates(found: dict[str, np.ndarray]) -> dict[str, Any]:
        return {words: asdict(rate(*pairs.T)) for words, pairs in found.items()}

    teacher = right(TEACHER)
    rows: dict[str, Any] = {}
    for form in forms:
        row: dict[str, Any] = {}
        seen = {when: right(arm_of(form, when)) for when in ("before", "after")}
        for when, found in seen.items():
            each = [results.entries[arm_of(form, when), i] for i in range(samples)]
            row[when] = {
                "rates": rates(found),
                "minus teacher": {
                    words: asdict(difference(pairs[:, 0], teacher[words][:, 0], pairs[:, 1]))
                    for words, pairs in found.items()
                },
                **{name: _mean([entry[name] for entry in each]) for name in DIGITS},
            }
        row["after minus before"] = {
            words: asdict(difference(pairs[:, 0], seen["before"][words][:, 0], pairs[:, 1]))
            for words, pairs in seen["after"].items()
        }
        for name, kind in (("training", TRAINED), ("cost", COST)):
            row[name] = {
                key: value for key, value in results.entries[kind + form, 0].items() if key not in ("arm", "sample")
            }
        rows[form] = row
    return {"samples": samples, "teacher": {"rates": rates(teacher)}, "forms": rows}


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown: means with 95 % intervals, differences in pairs and in points."""
    large = next(iter(summary["forms"].values()))["cost"]["large_size"][0]
    side, about, settings = summary["settings"]["side"], summary["about"], summary["settings"]
    lines = [
        f"{summary['samples']} held-out captions, {settings['denoising']} denoising steps; {settings['steps']} steps of training "
        f"for each form, batch {settings['batch']}; {about['model']}, {about['device']}, torch {about['versions']['torch']}; "
        "95 % intervals; differences in points, in pairs; ms beside those of the teacher, measured in turns with the form.",
        "",
        f"| form | all right, before → after | after - teacher | after - before | error of latents | PSNR, dB | SSIM "
        f"| GFLOP a step, of it attention | attention at {large} px | ms a step, teacher's | trained |",
        "|---" * 11 + "|",
    ]
    first = next(iter(summary["forms"].values()))["cost"]
    whole = summary["teacher"]["rates"]["all right"]
    lines.append(
        f"| teacher | {Rate(**whole)} | - | - | 0 | - | 1 | {_giga(first['teacher_flops']['model'])}, "
        f"{_giga(first['teacher_flops']['attention'])} | {_giga(first['large_teacher_flops']['attention'])} | - | - |"
    )
    for form, row in summary["forms"].items():
        before, after, cost, training = (row[name] for name in ("before", "after", "cost", "training"))
        cells = [
            form,
            f"{before['rates']['all right']['value'] * 100:.1f} → {Rate(**after['rates']['all right'])}",
            Difference(**after["minus teacher"]["all right"]),
            Difference(**row["after minus before"]["all right"]),
            *(
                f"{before[name]['mean']:.{digits}f} → {_interval(after[name], digits)}"
                for name, digits in DIGITS.items()
            ),
            f"{_giga(cost['flops']['model'])}, {_giga(cost['flops']['attention'])}",
            _giga(cost["large_flops"]["attention"]),
            f"{cost['ms']:.1f}, {cost['teacher_ms']:.1f} ({cost['times_faster']:.2f} x)",
            f"{training['seconds']:.0f} s",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    met = [
        f"{form}: {_verdict(row['after']['minus teacher']['all right'])}"
        for form, row in summary["forms"].items()
        if form.startswith("clear radius")
    ]
    return "\n".join([*lines, "", f"Operations are counted on {side} x {side} pixels unless told. " + "; ".join(met)])


def _verdict(found: dict[str, Any]) -> str:
    """Whether a difference to the teacher itself reaches GOAL, and whether its interval leaves that open."""
    value, low, high = found["value"], found["low"], found["high"]
    within = value >= GOAL
    wholly = low >= GOAL if within else high < GOAL
    return (
        f"{Difference(**found)} points against the teacher, {'within' if within else 'NOT within'} the goal of "
        f"{100 * GOAL:+g}{'' if wholly else ', but the interval reaches across it'}"
    )


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and margin of a 95 % interval, which a single value has not."""
    array = np.array(values, np.float64)
    margin = 1.96 * float(array.std(ddof=1)) / len(array) ** 0.5 if len(array) > 1 else None
    return {"mean": float(array.mean()), "margin": margin}


def _interval(found: dict[str, Any], digits: int) -> str:
    margin = "" if found["margin"] is None else f" ± {found['margin']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{margin}"


def _giga(operations: float) -> str:
    return f"{operations / 1e9:.3g}"
