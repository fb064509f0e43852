"""What a film changes in the stock pipeline for the length of its call: the text, the schedule, the VAE."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors.context import context_of
from ..attn_processors.dual_scope import DualScopeAttnProcessor
from ..attn_processors.families import replaced
from ..attn_processors.installer import apply
from ..attn_processors.planning import plan
from . import checkpoint
from .prompts import FramePrompts
from .stream import has_motion

__all__ = ["Schedule", "TextOfFrames", "in_float32", "join_controlnet", "upcast_vae"]


class TextOfFrames:
    """Root pre-hook: puts the text of the frames in the place of the pipeline's placeholder."""

    def __init__(self, text: FramePrompts):
        self.text = text

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return replaced(model, args, kwargs, encoder_hidden_states=self.text)


@contextlib.contextmanager
def join_controlnet(pipe: Any) -> Iterator[None]:
    """For the length of a with block, a ControlNet in which frames meet has the attention between frames that the UNet has."""
    if not has_motion(net := getattr(pipe, "controlnet", None)):
        yield
        return
    context = context_of(pipe.unet)
    assert context is not None, "films are made with attention of ours"
    methods = [item.method for item in context.installations if isinstance(item.method, DualScopeAttnProcessor)]
    handle = apply(plan(net, methods), pipe)
    try:
        yield
    finally:
        handle.remove()


class Schedule:
    """Stands for `scheduler.set_timesteps`: a film that goes on has the remaining steps only.

    The pipeline reads the timesteps once, then prepares its latents; after that the scheduler has all of them again, which
    tell phases of attention how far the film is.
    """

    def __init__(self, pipe: Any, resumed: checkpoint.Moment | None, source: Tensor | None = None):
        """source: latents of the film that this one is made from, without noise, (1, C, f, H, W)."""
        self.pipe, self.scheduler, self.resumed, self.source = pipe, pipe.scheduler, resumed, source
        self.stock, self.prepare = pipe.scheduler.set_timesteps, pipe.prepare_latents
        self.cut = getattr(pipe, "get_timesteps", None)  # of video-to-video, which leaves out the first steps
        functools.update_wrapper(self, self.stock)

    @property
    def patches(self) -> list[tuple[Any, str, Any]]:
        cut = [] if self.cut is None else [(self.pipe, "get_timesteps", self.remaining)]
        return [(self.scheduler, "set_timesteps", self), (self.pipe, "prepare_latents", self.latents), *cut]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.stock(*args, **kwargs)
        self.whole = self.scheduler.timesteps
        if self.resumed is not None:
            checkpoint.restore(self.scheduler, _placed(self.resumed.history, self.pipe._execution_device))
            if self.cut is None:
                self.scheduler.timesteps = self.whole[self.resumed.step :]

    def remaining(self, *args: Any, **kwargs: Any) -> tuple[Tensor, int]:
        """Stands for `pipe.get_timesteps`."""
        assert self.cut is not None
        timesteps, number = self.cut(*args, **kwargs)
        return timesteps if self.resumed is None else timesteps[self.resumed.step :], number

    def latents(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for `pipe.prepare_latents`."""
        place = self.pipe._execution_device
        if self.source is not None:
            noise = kwargs["latents"]
            both = (x.to(place, noise.dtype).transpose(1, 2) for x in (self.source, noise))  # as stock: B, F, ...
            noisy = self.scheduler.add_noise(*both, kwargs["timestep"])
            return noisy.contiguous().transpose(1, 2)  # as they come from a checkpoint: sums then round alike
        if self.resumed is None:
            return self.prepare(*args, **kwargs)
        self.scheduler.timesteps = self.whole
        return self.resumed.latents.to(place)


def _placed(value: Any, device: torch.device) -> Any:
    """A scheduler's history with its tensors on a device."""
    if isinstance(value, dict):
        return {name: _placed(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value


@contextlib.contextmanager
def upcast_vae(pipe: Any) -> Iterator[torch.dtype]:
    """The numbers the VAE computes in: where the stock pipeline upcasts it, as that of SDXL, float16 overflows."""
    vae = pipe.vae
    if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False) or not hasattr(pipe, "upcast_vae"):
        yield vae.dtype
        return
    with in_float32(vae):
        yield torch.float32


@contextlib.contextmanager
def in_float32(vae: nn.Module) -> Iterator[None]:
    """The VAE in float32, all of it: with parts left in float16, as by upcast_vae, newer decoders fail."""
    before: Any = vae.dtype
    try:
        yield vae.to(dtype=torch.float32)
    finally:
        vae.to(dtype=before)
