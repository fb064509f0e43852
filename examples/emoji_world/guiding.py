"""How tiny-flux learns guidance by heart: on the pictures that it is about to draw, at the steps of the sampler.

A model that follows the guided velocity, v(empty) + guidance * (v(caption) - v(empty)), needs one call per step instead of
two (Meng et al. 2023). Noised pictures of the world are the wrong place to learn it: a guided sampler does not visit them,
its pictures are further from the mean. So the model learns on its own path, as in on-policy distillation (Ross et al. 2011,
DAgger): every training step takes a batch of pictures in the making, learns there, and moves each one sampler step on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .training import Batch

__all__ = ["SHIFT", "STEPS", "Drawing", "guided_mean", "sampler_times"]

STEPS = 10  # of the sampler on whose path the model learns; it is as good with more of them
SHIFT = 3.0  # of the sampler's steps towards the noisy side (Esser et al. 2024, section 5.3.2)


def sampler_times(steps: int) -> Tensor:
    """Where FluxPipeline's scheduler stands before, between and after its steps, (steps + 1,) from 1, all noise, to 0."""
    even = torch.linspace(1, 0, steps + 1)
    return SHIFT * even / (1 + (SHIFT - 1) * even)


class Drawing:
    """A batch of pictures in the making, each somewhere on the sampler's way; the finished ones make room for new ones.

    The first batch are noised pictures of the world, each at the sampler step next to its time; from then on all is drawn.
    """

    times = sampler_times(2 * STEPS)  # a step has a stop half-way, see `guided_mean`

    def __init__(self, batch: Batch):
        begun = batch.times.view(-1, 1) <= self.times[:-1:2]
        self.passed = begun.sum(1) - 1  # sampler steps done
        self.words = list(batch.words)
        self.mixed = batch.clean.lerp(batch.noise, self.stops()[0].view(-1, 1, 1, 1))

    def stops(self) -> tuple[Tensor, Tensor, Tensor]:
        """Beginning, middle and end of the step that each picture is about to take, (B,) each."""
        return self.times[2 * self.passed], self.times[2 * self.passed + 1], self.times[2 * self.passed + 2]

    def move(self, velocity: Tensor) -> None:
        """One sampler step along `velocity`, (B, C, H, W)."""
        start, _, end = self.stops()
        self.mixed = self.mixed + (end - start).view(-1, 1, 1, 1) * velocity
        self.passed = self.passed + 1

    def renew(self, batch: Batch) -> None:
        """Begin anew, with the noise and the words of `batch`, where a picture is finished."""
        for i in (self.passed == STEPS).nonzero().flatten().tolist():
            self.mixed[i], self.words[i], self.passed[i] = batch.noise[i], batch.words[i], 0


@torch.no_grad()
def guided_mean(drawing: Drawing, velocity: Callable[[Tensor, list[str], Tensor], Tensor], guidance: float) -> Tensor:
    """The mean guided velocity over each picture's next step, (B, C, H, W), from two steps of half the length.

    So the model, with one call a step, goes where its teacher goes with four.
    """

    def guided(mixed: Tensor, times: Tensor) -> Tensor:
        without = velocity(mixed, [""] * len(drawing.words), times)
        return without.lerp(velocity(mixed, drawing.words, times), guidance)

    start, middle, end = (stop.view(-1, 1, 1, 1) for stop in drawing.stops())
    first = guided(drawing.mixed, start.flatten())
    second = guided(drawing.mixed + (middle - start) * first, middle.flatten())
    return ((middle - start) * first + (end - middle) * second) / (end - start)
