"""What a run tells while it goes on: losses, pace and memory, told to whoever listens and kept in a log."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..pipelines.files import written_whole
from .losses import Losses
from .ranks import Ranks

__all__ = ["Meter", "RunLog", "TrainEvent", "plain"]


@dataclass(frozen=True)
class TrainEvent:
    """Some steps have ended. Told on the first process only.

    Attributes:
        step, steps: done so far, and in all.
        numbers: the line of the log: losses, gradient norm, learning rate, samples per second, MiB of memory, and the
            seconds trained, in all sessions of the run. Losses are means over the steps since the line before, without
            those whose gradients were no numbers, which are counted as `skipped`; nan if there was no other.
        eta: estimated seconds until the end.
    """

    step: int
    steps: int
    numbers: dict[str, Any]
    eta: float


class RunLog:
    """The log of a run, `log.jsonl` in its folder: a JSON line each time something is told. One process writes it."""

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"

    def add(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as lines:
            lines.write(json.dumps(plain(line)) + "\n")

    def cut(self, step: int) -> None:
        """Take out lines after the step a run goes on from."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line may have been cut off
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        with written_whole(self.path) as (aside,):
            aside.write_text("".join(f"{line}\n" for line in kept))


class Meter:
    """Sums of the losses on the device, read only for the log, and the pace without pauses."""

    def __init__(self, step: int, ranks: Ranks, before: float = 0.0):
        """`before`: seconds trained in earlier sessions."""
        self.ranks, self.before = ranks, before
        self.sums: dict[str, Tensor] = {}
        self.steps, self.seconds = 0, 0.0
        self._step: dict[str, Tensor] = {}  # of the step that goes on
        self._good = self._skipped = 0
        self.rest(step)

    @property
    def total(self) -> float:
        """Seconds trained in all sessions, up to the last count."""
        return self.before + self.seconds

    def count(self, step: int) -> None:
        """Count the time up to here: something else begins."""
        self.seconds += time.monotonic() - self._clock
        self.steps += step - self._from
        self.rest(step)

    def rest(self, step: int) -> None:
        """Something else took the time since the last count: leave it out."""
        self._clock, self._from = time.monotonic(), step

    def add(self, losses: Losses, count: int) -> None:
        """Add one of `count` micro batches of a step."""
        names = {"loss": losses.total, "flow": losses.flow, "output": losses.output, "attention": losses.attention}
        if losses.own is not None:
            names["own"] = losses.own
        names |= {f"layer {name}": value for name, value in losses.layers.items()}
        for name, value in names.items():
            self._step[name] = self._step.get(name, 0) + value.detach() / count

    def end(self, good: bool) -> None:
        """A step has ended; one that is not good changed nothing, and its losses are left out."""
        for name, value in self._step.items():
            self.sums[name] = self.sums.get(name, 0) + (value if good else torch.zeros_like(value))
        self._step = {}
        self._good, self._skipped = self._good + good, self._skipped + (not good)

    def read(self, step: int, batch: int) -> dict[str, Any]:
        """Means since the last reading, over all processes, and the pace."""
        means = self.ranks.mean(torch.stack(list(self.sums.values())) / self._good).tolist()
        numbers: dict[str, Any] = dict(zip(self.sums, means, strict=True))
        layers = {name.removeprefix("layer "): numbers.pop(name) for name in list(numbers) if name.startswith("layer ")}
        self.count(step)
        pace = self.steps / self.seconds if self.seconds else 0.0
        told = {"samples_per_second": pace * batch, "memory_mib": self.ranks.memory(), "seconds": self.total}
        if self._skipped:
            told["skipped"] = self._skipped
        self.sums, self._good, self._skipped = {}, 0, 0
        return {**numbers, "layers": layers, **told}

    def eta(self, steps: int) -> float:
        return steps * self.seconds / self.steps if self.steps else 0.0


def plain(numbers: Any) -> Any:
    """A line of the log as JSON knows it: None in place of what is no number."""
    if isinstance(numbers, Mapping):
        return {key: plain(value) for key, value in numbers.items()}
    if isinstance(numbers, list):
        return [plain(value) for value in numbers]
    return None if isinstance(numbers, float) and not math.isfinite(numbers) else numbers
