"""What does it cost a denoising step to keep subjects apart and like their references?

A step of the Stable Diffusion 1.5 UNet with random weights and guidance (two rows a picture), one panel, every subject
in a box of its own. The arms are stock, stock once more (the noise of the measurement), isolation of two and three
subjects, and what a story does with two subjects: captions of their own, and references, which are further rows of the
call and which only the guided rows see. References are two more pictures in the call, so that arm is
compared with the stock panel (what a story costs) and with stock on as many rows (what our attention costs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from ..attn_processors import IsolationRepositionAttnProcessor, Place, installed
from ..pipelines.stories import USUAL, USUAL_UNET
from .agent import LATENT_FACTOR, SD15, TINY, TOKENS_OF_TEXT, random_unet
from .frame import Conditions, Found, arms_grid, goal, page, run_benchmark
from .measure import Run, measured, timed
from .rounds import Timed, repeat, untimed

__all__ = ["run", "table"]

STOCK, AGAIN, STOCK_ROWS = "stock", "stock again", "stock, 3 pictures"
ISOLATION_2, ISOLATION_3, STORY = "isolation, 2 subjects", "isolation, 3 subjects", "story, 2 subjects"
PICTURES = {STOCK: 1, AGAIN: 1, STOCK_ROWS: 3, ISOLATION_2: 1, ISOLATION_3: 1, STORY: 3}
BESIDE = {AGAIN: STOCK, ISOLATION_2: STOCK, ISOLATION_3: STOCK, STORY: STOCK_ROWS}  # arm -> what its attention adds to
BRANCHES = 2
MOST_OVERHEAD = 0.15  # of isolation alone, what the project wants


@dataclass
class Case(Timed):
    """One size of the picture."""

    pixels: int
    ROUNDS = 7

    def __str__(self) -> str:
        return f"{self.pixels} pixels"

    def guess(self, cases: Sequence[Case]) -> float:
        """From a smaller size: attention grows with the fourth power of the side."""
        done = [case for case in cases if case.round_seconds and case.pixels < self.pixels]
        return max((case.round_seconds * (self.pixels / case.pixels) ** 4 for case in done), default=0.0)

    def overhead(self, arm: str, base: str) -> float | None:
        """What an arm takes beyond another, as a part of it."""
        ratio = self.ratio(arm, base)
        return None if ratio is None else ratio - 1


def measure(conditions: Conditions) -> Found:
    """A step at two sizes; of a tiny UNet at a tiny size in a quick run."""
    quick, place = conditions.quick, conditions.device
    bench = Bench(random_unet(TINY if quick else SD15, place), place)
    cases = [Case(pixels, arms=list(PICTURES)) for pixels in ((64,) if quick else (512, 768))]
    repeat(cases, bench.time, conditions)
    told, goals = [_told(case) for case in cases], [] if quick else _goals(cases)
    return Found(bench.dtype, cases=told, goals=goals, left_out=untimed(cases))


class Bench:
    """The model and the arms."""

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
        panel = tuple(replace(place, caption=place.subject) for place in panel)
        references = tuple(Place(subject=str(i), box=(0.2, 0.2, 0.8, 0.8)) for i in range(count))
        return IsolationRepositionAttnProcessor.from_settings(
            {**USUAL, **USUAL_UNET, "panels": (panel,), "references": references}
        )

    @contextmanager
    def applied(self, arm: str) -> Iterator[None]:
        """The UNet as this arm has it."""
        method = self.method(arm)
        if method is None:
            yield
            return
        width = self.unet.config.cross_attention_dim
        with installed(self.unet, method) as handle:
            for context, _ in handle.parts:
                for *_, caption in method.captions:
                    text = torch.randn(TOKENS_OF_TEXT, width, generator=torch.Generator().manual_seed(int(caption)))
                    method.cast(context).captions[caption] = text.to(self.device, self.dtype)
            yield

    def time(self, case: Case, arm: str) -> Run:
        """One run of an arm, after a call that is weighed."""
        with self.applied(arm):
            step = self.step(case, arm)
            peak = measured(partial(step, 800.0), self.device).peak_mib  # finds who is where, once for all steps
            return Run(timed(partial(step, 600.0), self.device), peak)

    def step(self, case: Case, arm: str) -> Callable[[float], Any]:
        """A call of the UNet at a timestep."""
        generator = torch.Generator().manual_seed(case.pixels)
        side, rows = case.pixels // LATENT_FACTOR, BRANCHES * PICTURES[arm]
        latents = torch.randn(rows, self.unet.config.in_channels, side, side, generator=generator)
        text = torch.randn(rows, TOKENS_OF_TEXT, self.unet.config.cross_attention_dim, generator=generator)
        latents, text = (x.to(self.device, self.dtype) for x in (latents, text))
        return lambda t: self.unet(latents, t, text)


def _told(case: Case) -> dict[str, Any]:
    def overheads(arm: str) -> dict[str, Any]:
        beside = case.overhead(arm, BESIDE[arm]) if arm in BESIDE else None
        return {"over_stock": case.overhead(arm, STOCK), "over_as_many_rows": beside}

    return case.told({"pixels": case.pixels}, overheads)


def _goals(cases: list[Case]) -> list[dict[str, Any]]:
    """What the project wants of these numbers."""
    return [
        goal(f"{arm} at {case.pixels} pixels: overhead of a step", case.overhead(arm, STOCK), "at_most", MOST_OVERHEAD)
        for arm in (ISOLATION_2, ISOLATION_3) for case in cases
    ]  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result for people, as a Markdown table."""
    numbers = {"over stock": ("over_stock", "+.1%"), "over stock on as many rows": ("over_as_many_rows", "+.1%")}
    return page(result, arms_grid(result["cases"], {"pixels": itemgetter("pixels")}, numbers))


run = partial(run_benchmark, "story", measure, table)
