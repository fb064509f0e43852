"""How tiny-flux learns guidance by heart: on the pictures that it is about to draw, at the steps of the sampler.

A model that follows the guided velocity, v(empty) + guidance * (v(caption) - v(empty)), needs one call per step instead of
two (Meng et al. 2023). What a guided sampler passes through is not a noised picture of the world. So the model learns on
its own path, as in on-policy distillation (Ross et al. 2011, DAgger): every training step takes a batch of pictures in the
making, learns there, and moves each one sampler step on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .batches import Batch

__all__ = ["SHIFT", "STEPS", "Drawing", "guided_mean", "sampler_times"]

STEPS = (10, 20)  # of the samplers on whose paths the model learns
SHIFT = 3.0  # of the sampler's steps towards the noisy side (Esser et al. 2024, section 5.3.2)
GUIDED_ABOVE = 0.7  # times of the guidance: less noisy pictures gain nothing by it (Kynkaanniemi et al. 2024)

Ids = dict[str, Tensor]  # token ids of captions, (B, tokens) for each text encoder
Velocity = Callable[[Tensor, Ids, Tensor], Tensor]


def sampler_times(way: Tensor) -> Tensor:
    """Where FluxPipeline's scheduler stands after a part of its steps, `way` from 0 to 1: from 1, all noise, to 0."""
    even = 1 - way
    return SHIFT * even / (1 + (SHIFT - 1) * even)


class Drawing:
    """A batch of pictures in the making, each somewhere on the sampler's way; the finished ones make room for new ones.

    The first batch are noised pictures of the world, each at the sampler step next to its time; from then on all is drawn.
    """

    def __init__(self, batch: Batch):
        self.steps = torch.full_like(batch.times, STEPS[0], dtype=torch.long)  # of each picture
        stops = sampler_times(torch.arange(STEPS[0], device=batch.times.device) / STEPS[0])
        self.passed = (batch.times.view(-1, 1) <= stops).sum(1) - 1  # steps done
        self.ids = {name: ids.clone() for name, ids in batch.ids.items()}
        self.mixed = batch.clean.lerp(batch.noise, self.stops()[0].view(-1, 1, 1, 1))

    def stops(self) -> tuple[Tensor, Tensor, Tensor]:
        """Beginning, middle and end of the step that each picture is about to take, (B,) each."""
        start, middle, end = (sampler_times((self.passed + part) / self.steps) for part in (0.0, 0.5, 1.0))
        return start, middle, end

    def move(self, velocity: Tensor) -> None:
        """One sampler step along `velocity`, (B, C, H, W)."""
        start, _, end = self.stops()
        self.mixed = self.mixed + (end - start).view(-1, 1, 1, 1) * velocity
        self.passed = self.passed + 1

    def renew(self, batch: Batch) -> None:
        """Begin anew, with the noise and the captions of `batch`, where a picture is finished."""
        done = (self.passed == self.steps).nonzero().flatten()
        self.mixed[done] = batch.noise[done]
        for name, ids in self.ids.items():
            ids[done] = batch.ids[name][done]
        self.passed[done] = 0
        self.steps[done] = STEPS[batch.step % len(STEPS)]


@torch.no_grad()
def guided_mean(drawing: Drawing, velocity: Velocity, guidance: float, empty: Ids) -> Tensor:
    """The mean guided velocity over each picture's next step, (B, C, H, W), from two steps of half the length.

    So the model, with one call a step, goes where its teacher goes with four. `empty` are the ids of no caption, (1, tokens).
    """

    def guided(mixed: Tensor, times: Tensor) -> Tensor:
        asked = velocity(mixed, drawing.ids, times)
        early = (times > GUIDED_ABOVE).nonzero().flatten()
        if len(early):
            nothing = {name: ids.expand(len(early), -1) for name, ids in empty.items()}
            without = velocity(mixed[early], nothing, times[early])
            asked[early] = without.lerp(asked[early], guidance)
        return asked

    start, middle, end = (stop.view(-1, 1, 1, 1) for stop in drawing.stops())
    first = guided(drawing.mixed, start.flatten())
    second = guided(drawing.mixed + (middle - start) * first, middle.flatten())
    return ((middle - start) * first + (end - middle) * second) / (end - start)
