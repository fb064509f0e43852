"""Chance for films: every frame has its own, so it does not matter who draws it.

What is drawn for a frame depends on the seed, the frame and the step alone, never on the number of ranks, the split or the
device. Schedulers that add noise are made to draw frame by frame: the frames of their latents are put in the batch axis, for
which diffusers takes one generator per row. Everything else a scheduler does is element by element.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor

from ..attn_processors.comm import Span

__all__ = ["PerFrameStep", "check_scheduler", "frame_noise"]

SHAPE = (4, 2, 2)  # of a frame in the trial of a scheduler


def generator(*key: object) -> torch.Generator:
    """A generator on the CPU that depends on the key alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def frame_noise(seed: int, own: Span, shape: tuple[int, int, int]) -> Tensor:
    """Noise of the frames `own`, each of shape (C, H, W): (1, C, f, H, W), fp32 on the CPU."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "start", i)) for i in range(*own)], 1).unsqueeze(0)


class PerFrameStep:
    """Stands for `scheduler.step` while a film is made: (1, C, f, H, W) latents go through it as f rows."""

    def __init__(self, scheduler: Any, seed: int, own: Span):
        self.stock, self.seed, self.own = scheduler.step, seed, own
        functools.update_wrapper(self, self.stock)  # pipelines look at its signature
        self.draws = "generator" in inspect.signature(self.stock).parameters

    def __call__(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.draws:
            kwargs["generator"] = [generator(self.seed, "step", float(timestep), i) for i in range(*self.own)]
        out = self.stock(_rows(model_output), timestep, _rows(sample), *args, **kwargs)
        if isinstance(out, tuple):  # return_dict=False
            return tuple(_film(value) for value in out)
        return type(out)(**{name: _film(value) for name, value in out.items()})


def check_scheduler(scheduler: Any, steps: int) -> None:
    """Raise ValueError if the scheduler mixes frames: parts of a small film must come out as in the whole.

    Raises:
        ValueError: also for dynamic thresholding, which looks at all values of a picture or film at once.
    """
    name = type(scheduler).__name__
    if scheduler.config.get("thresholding"):
        raise ValueError(
            f"{name} was given thresholding=True, which looks at all frames at once; switch it off "
            "(scheduler.register_to_config(thresholding=False)), or use another scheduler"
        )
    drawn = torch.Generator().manual_seed(0)
    sample, guess = (torch.randn(1, SHAPE[0], 3, *SHAPE[1:], generator=drawn) for _ in range(2))
    whole = _trial(scheduler, steps, (0, 3), sample, guess)
    parts = [_trial(scheduler, steps, own, sample, guess) for own in ((0, 1), (1, 3))]
    if not torch.allclose(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=1e-5):
        raise ValueError(
            f"{name} does not treat every frame on its own, so a film could not be split; use another scheduler, such as "
            "DDIM, Euler or DPM-Solver++"
        )


def _trial(scheduler: Any, steps: int, own: Span, sample: Tensor, guess: Tensor) -> Tensor:
    """Two steps of a copy on some of the frames."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    step = PerFrameStep(scheduler, 0, own)
    part = slice(*own)
    latents = sample[:, :, part]
    for timestep in scheduler.timesteps[:2]:
        scheduler.scale_model_input(latents, timestep)
        latents = step(guess[:, :, part], timestep, latents).prev_sample
    return latents


def _rows(x: Tensor) -> Tensor:
    """(1, C, f, H, W) -> (f, C, H, W)"""
    return x[0].transpose(0, 1)


def _film(x: Any) -> Any:
    """(f, C, H, W) -> (1, C, f, H, W); other values as they are."""
    return x.transpose(0, 1).unsqueeze(0) if isinstance(x, Tensor) and x.ndim == 4 else x
