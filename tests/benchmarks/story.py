"""What does it cost a denoising step to keep subjects apart and like their references?

A step of the Stable Diffusion 1.5 UNet with random weights and guidance (two rows a picture), one panel, every subject
in a box of its own. The arms are stock, stock once more (the noise of the measurement), isolation of two and three
subjects, and what a story does with two subjects: their references as further rows of the call, references that only the
guided rows see, and a share of the subjects' own text. References are two more pictures in the call, so that arm is
compared with the stock panel (what a story costs) and with stock on as many rows (what our attention costs).

All arms run in every round, in alternating order, and are compared within the round: medians over the rounds. Rounds
that do not fit the time limit are left out, and the result says how many there were.
"""

from __future__ import annotations

import json as json_text
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from ..attn_processors import IsolationRepositionAttnProcessor, Place, installed
from ..pipelines.files import written_whole
from ..pipelines.stories import USUAL, USUAL_UNET
from .agent import LATENT_FACTOR, SD15, TINY, TOKENS_OF_TEXT, random_unet
from .measure import Run, measured, surroundings

__all__ = ["run", "table"]

ROUNDS = 7
STOCK, AGAIN, STOCK_ROWS = "stock", "stock again", "stock, 3 pictures"
ISOLATION_2, ISOLATION_3, STORY = "isolation, 2 subjects", "isolation, 3 subjects", "story, 2 subjects"
PICTURES = {STOCK: 1, AGAIN: 1, STOCK_ROWS: 3, ISOLATION_2: 1, ISOLATION_3: 1, STORY: 3}
BESIDE = {AGAIN: STOCK, ISOLATION_2: STOCK, ISOLATION_3: STOCK, STORY: STOCK_ROWS}  # arm -> what its attention adds to
BRANCHES = 2
MOST_OVERHEAD = 0.15  # of isolation alone, what the project wants


@dataclass
class Case:
    """One size of the picture, and the runs so far: arm -> one run per round."""

    pixels: int
    runs: dict[str, list[Run]] = field(default_factory=dict)
    round_seconds: float = 0.0  # of the last round

    @property
    def rounds(self) -> int:
        return len(self.runs.get(STOCK, []))


def run(
    *,
    minutes: float = 20.0,
    quick: bool = False,
    json: bool = False,
    out: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure, print a table (or with `json` one JSON object), and return what was measured.

    Args:
        minutes: time limit; rounds that would not fit are left out.
        quick: a tiny UNet at a tiny size: tries everything in seconds and says nothing about speed.
        json: print JSON instead of the table.
        out: JSON file to write as well.
        device: "cpu", "cuda", ...; None takes CUDA if there is one.

    Raises ValueError for a time limit that is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}. It is the time limit; give for example 20.")
    began = time.monotonic()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(random_unet(TINY if quick else SD15, where), where)
    cases = [Case(64)] if quick else [Case(512), Case(768)]
    for i in range(1 if quick else ROUNDS):
        for case in cases:
            left = minutes * 60 - (time.monotonic() - began)
            if (case.round_seconds or _likely(case, cases)) <= left:
                bench.round(case, i)
    result = {
        "benchmark": "story",
        "command": "reattend bench story" + (" --quick" if quick else ""),
        **surroundings(where),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "cases": [_summary(case) for case in cases],
        "minutes": round((time.monotonic() - began) / 60, 2),
    }
    if not quick:
        result["goals"] = _goals(result)
    if out is not None:
        with written_whole(out) as (aside,):
            aside.write_text(json_text.dumps(result, indent=2) + "\n")
    print(json_text.dumps(result) if json else table(result))
    return result


class Bench:
    """The model, the arms, and one round of all of them."""

    def __init__(self, unet: nn.Module, device: torch.device):
        self.unet, self.device = unet, device
        self.dtype = next(unet.parameters()).dtype

    def method(self, arm: str) -> IsolationRepositionAttnProcessor | None:
        """What the arm installs; None for stock."""
        if arm in (STOCK, AGAIN, STOCK_ROWS):
            return None
        count = 3 if arm == ISOLATION_3 else 2
        panel = tuple(Place(subject=str(i), box=(i / count, 0.2, (i + 1) / count, 0.8)) for i in range(count))
        if arm != STORY:
            return IsolationRepositionAttnProcessor(panels=(panel,))
        references = tuple(Place(subject=str(i), box=(0.2, 0.2, 0.8, 0.8)) for i in range(count))
        return IsolationRepositionAttnProcessor.from_settings(
            {**USUAL, **USUAL_UNET, "panels": (panel,), "references": references}
        )

    def round(self, case: Case, number: int) -> None:
        """Every arm once, each after a call that is not timed; every other round in reverse."""
        start = time.monotonic()
        for arm in PICTURES if number % 2 == 0 else reversed(PICTURES):
            method = self.method(arm)
            with nullcontext() if method is None else installed(self.unet, method):
                step = self.step(case, arm)
                measured(partial(step, 800.0), self.device)  # finds who is where, once for all steps
                result = measured(partial(step, 600.0), self.device)
            case.runs.setdefault(arm, []).append(result)
        case.round_seconds = time.monotonic() - start

    def step(self, case: Case, arm: str) -> Callable[[float], Any]:
        """A call of the UNet at a timestep."""
        generator = torch.Generator().manual_seed(case.pixels)
        side, rows = case.pixels // LATENT_FACTOR, BRANCHES * PICTURES[arm]
        latents = torch.randn(rows, self.unet.config.in_channels, side, side, generator=generator)
        text = torch.randn(rows, TOKENS_OF_TEXT, self.unet.config.cross_attention_dim, generator=generator)
        latents, text = (x.to(self.device, self.dtype) for x in (latents, text))
        return lambda t: self.unet(latents, t, text)


def _likely(case: Case, cases: list[Case]) -> float:
    """Seconds of a first round, from that of a smaller size: attention grows with the fourth power of the side."""
    done = [other for other in cases if other.round_seconds and other.pixels < case.pixels]
    return max((other.round_seconds * (case.pixels / other.pixels) ** 4 for other in done), default=0.0)


def _summary(case: Case) -> dict[str, Any]:
    """Medians over rounds; an overhead is the median of the overheads within a round."""
    seconds = {arm: [run.seconds for run in runs] for arm, runs in case.runs.items()}

    def over(arm: str, base: str) -> float:
        return median(mine / other - 1 for mine, other in zip(seconds[arm], seconds[base], strict=True))

    arms = {}
    for arm in PICTURES if case.rounds else ():
        peaks = [run.peak_mib for run in case.runs[arm] if run.peak_mib is not None]
        arms[arm] = {
            "seconds": median(seconds[arm]),
            "over_stock": over(arm, STOCK),
            "over_as_many_rows": over(arm, BESIDE[arm]) if arm in BESIDE else None,
            "peak_mib": median(peaks) if peaks else None,
            "all_seconds": seconds[arm],
        }
    return {"pixels": case.pixels, "rounds": case.rounds, "arms": arms}


def _goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project wants of these numbers; value None = not measured."""
    goals = []
    for arm in (ISOLATION_2, ISOLATION_3):
        for case in result["cases"]:
            value = case["arms"].get(arm, {}).get("over_stock")
            goals.append({
                "goal": f"{arm} at {case['pixels']} pixels: overhead of a step", "value": value, "at_most": MOST_OVERHEAD,
                "met": None if value is None else value <= MOST_OVERHEAD,
            })  # fmt: skip
    return goals


def table(result: dict[str, Any]) -> str:
    """The result for people, as a Markdown table."""
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, torch {result['versions']['torch']}, "
        f"diffusers {result['versions']['diffusers']}; `{result['command']}`, {result['minutes']} minutes",
        "",
        "| pixels | arm | seconds a step | over stock | over stock on as many rows | extra memory at peak, MiB | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        for arm, row in case["arms"].items():
            peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            beside = "–" if row["over_as_many_rows"] is None else f"{row['over_as_many_rows']:+.1%}"
            lines.append(
                f"| {case['pixels']} | {arm} | {row['seconds']:.3g} | {row['over_stock']:+.1%} | {beside} | {peak} | "
                f"{case['rounds']} |"
            )
        if not case["rounds"]:
            lines.append(f"| {case['pixels']} | no time left | – | – | – | – | 0 |")
    for goal in result.get("goals", []):
        value = "not measured" if goal["value"] is None else f"{goal['value']:+.1%}"
        verdict = {True: "met", False: "MISSED", None: ""}[goal["met"]]
        lines.append(f"{goal['goal']}: {value} (goal {goal['at_most']:.0%}) {verdict}")
    return "\n".join(lines)
