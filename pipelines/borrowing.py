"""What a film changes in the stock pipeline for the length of its call: the text, the schedule, where latents lie, the VAE."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors.families import replaced
from . import checkpoint
from .prompts import FramePrompts

__all__ = ["Schedule", "TextOfFrames", "kept_on_host", "upcast_vae"]


class TextOfFrames:
    """Root pre-hook: puts the text of the frames in the place of the pipeline's placeholder."""

    def __init__(self, text: FramePrompts):
        self.text = text

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return replaced(model, args, kwargs, encoder_hidden_states=self.text)


class Schedule:
    """Stands for `scheduler.set_timesteps`: a film that goes on has the remaining steps only.

    The pipeline reads the timesteps once, then prepares its latents; after that the scheduler has all of them again, which
    tell phases of attention how far the film is.
    """

    def __init__(self, pipe: Any, resumed: checkpoint.Moment | None):
        self.pipe, self.scheduler, self.resumed = pipe, pipe.scheduler, resumed
        self.stock, self.prepare = pipe.scheduler.set_timesteps, pipe.prepare_latents
        functools.update_wrapper(self, self.stock)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.stock(*args, **kwargs)
        self.whole = self.scheduler.timesteps
        if self.resumed is not None:
            checkpoint.restore(self.scheduler, _placed(self.resumed.history, self.pipe._execution_device))
            self.scheduler.timesteps = self.whole[self.resumed.step :]

    def latents(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for `pipe.prepare_latents`."""
        if self.resumed is None:
            return self.prepare(*args, **kwargs)
        self.scheduler.timesteps = self.whole
        return self.resumed.latents.to(self.pipe._execution_device)


def _placed(value: Any, device: torch.device) -> Any:
    """A scheduler's history with its tensors on a device."""
    if isinstance(value, dict):
        return {name: _placed(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value


def kept_on_host(pipe: Any) -> list[tuple[Any, str, Any]]:
    """A patch that makes the pipeline keep latents in host memory, where `streamed` wants them; none on a CPU.

    Pipelines compute where the offloading hook of their first model says.
    """
    first = next(part for part in pipe.components.values() if isinstance(part, nn.Module))
    if pipe.device.type == "cpu" or hasattr(first, "_hf_hook"):
        return []
    return [(first, "_hf_hook", SimpleNamespace(execution_device=torch.device("cpu")))]


@contextlib.contextmanager
def upcast_vae(pipe: Any) -> Iterator[torch.dtype]:
    """The numbers the VAE computes in: where the stock pipeline upcasts it, as that of SDXL, float16 overflows."""
    vae = pipe.vae
    if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False) or not hasattr(pipe, "upcast_vae"):
        yield vae.dtype
        return
    try:
        vae.to(dtype=torch.float32)  # all of it: with parts left in float16, as by upcast_vae, newer decoders fail
        yield torch.float32
    finally:
        vae.to(dtype=torch.float16)
