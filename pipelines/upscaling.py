"""Coarse to fine: a picture is made at a size the model knows, then enlarged and denoised again, stage by stage.

A model asked for several times its own size repeats its motifs; asked to add detail to an enlarged picture it does not.
Each later stage resizes the picture (Lanczos), encodes it, adds noise up to `strength` and denoises it at the new size
(SDEdit, arXiv 2108.01073), with the image-to-image class that diffusers has for the family, built from the very same
components. What a stage changes for large sizes is undone after it, also after an error: the base of the rotary embedding,
tiling in the VAE, attention of ours. The noise shift is changed on a copy of the scheduler.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..attn_processors.planning import denoisers
from .events import CancelToken, StepEvent
from .files import opened
from .filling_in import filled_in
from .image import attention_of, generate, stock_call
from .load import load
from .picture import Picture
from .recipe import Recipe
from .stages import Size, Upscale, fitting, stage_sizes

__all__ = ["ROPE_THETA_SCALE", "rotary_base", "upscale"]

ROPE_THETA_SCALE = 10.0  # CLEAR (arXiv 2412.16112) uses it from twice the size of training on


def upscale(
    recipe: Recipe,
    *,
    pipe: Any = None,
    on_step: Callable[[StepEvent], None] | None = None,
    cancel: CancelToken | None = None,
    split: bool = False,
) -> Picture:
    """Make the picture that `recipe` describes and enlarge it in stages. The same recipe gives the same pixels on a CPU.

    Args:
        recipe: what to make; its width and height are those of the first picture, which is the one that `generate` makes.
            Its `upscale` says how the picture grows; None means twice as large, in one stage.
        pipe: a loaded text-to-image pipeline, used in place of `recipe.model`; it is left as it was found.
        on_step: called in this thread after every denoising step; steps count over all stages.
        cancel: asked before the work, between stages and after every step.
        split: in the later stages compute rows of the picture on each rank of torch.distributed (`patches`); every rank
            calls alike, with a seed in the recipe, and gets the pictures.

    Returns:
        The largest picture, with the smaller ones in `Picture.smaller`.

    Raises:
        Cancelled: if `cancel` was requested; `pipe` can be used again.
        ValueError: as `generate`; for sizes that do not work, a family without an image-to-image class, a shift or rotary
            base that the model does not have, a source that is no picture.
        RuntimeError, MemoryError: as `generate`.
    """
    cancel = cancel or CancelToken()
    began = time.monotonic()
    cancel.check()
    if split and recipe.seed is None:
        raise ValueError("a picture that is split over ranks needs a seed that all of them know; set recipe.seed")
    if pipe is None:
        pipe = load(recipe.model, dtype=recipe.dtype)
    recipe = filled_in(recipe, pipe)
    growth = recipe.upscale or Upscale()
    refine = _image_to_image(pipe, growth.shift)
    picture, recipe, sizes = _start(recipe, growth, pipe, _multiple(refine))
    assert recipe.seed is not None, "filled in"
    later = _later_recipe(recipe, growth)
    _check_later(growth, later, refine)

    first: list[Any] = [] if picture is not None else [(recipe.width, recipe.height)]
    planned = [recipe.steps] * len(first) + [max(1, int(later.steps * growth.strength))] * len(sizes)
    count = _Counter(on_step, began, [*first, *sizes], planned)
    if picture is None:
        picture = generate(replace(recipe, upscale=None), pipe=pipe, on_step=count.stage(0), cancel=cancel).image
    pictures = [picture]
    for stage, size in enumerate(sizes, start=1):
        cancel.check()
        with rotary_base(refine, _theta_scale(growth, size, pipe)), _tiled(refine.vae, max(size) >= growth.tile_from):
            picture = stock_call(
                refine,
                replace(later, width=size[0], height=size[1]),
                _generator(recipe.seed, stage),
                on_step=count.stage(stage - 1 + len(first)),
                cancel=cancel,
                began=time.monotonic(),
                split=split,
                image=pictures[-1].resize(size, Image.Resampling.LANCZOS),
                strength=growth.strength,
            )
        pictures.append(picture)
    return Picture(image=picture, recipe=replace(recipe, upscale=growth), smaller=tuple(pictures[:-1]))


def _image_to_image(pipe: Any, shift: float | None) -> Any:
    """The family's stock image-to-image pipeline on the same components, with a scheduler of its own."""
    from diffusers import AutoPipelineForImage2Image  # imports every family, which takes seconds

    scheduler = copy.deepcopy(pipe.scheduler)
    if shift is not None:
        if not hasattr(scheduler, "set_shift"):
            raise ValueError(
                f"{type(scheduler).__name__} has no noise shift, got shift {shift:g}; leave it out, or use a model with "
                "a flow-matching scheduler"
            )
        # With dynamic shifting the pipeline would choose the shift from the size, and ours would not be asked for.
        scheduler.register_to_config(use_dynamic_shifting=False)
        scheduler.set_shift(shift)
    own = {"add_watermarker": pipe.watermark is not None} if hasattr(pipe, "watermark") else {}
    try:
        refine = AutoPipelineForImage2Image.from_pipe(pipe, scheduler=scheduler, **own)
    except ValueError as error:
        raise ValueError(_no_class(pipe)) from error
    if not {"image", "strength", "callback_on_step_end"} <= set(inspect.signature(refine.__call__).parameters):
        raise ValueError(_no_class(pipe))
    return refine


def _no_class(pipe: Any) -> str:
    return (
        f"diffusers has no image-to-image class with a strength for {type(pipe).__name__}; upscale works with families "
        "such as Stable Diffusion, SDXL, Stable Diffusion 3 and Flux"
    )


def _multiple(pipe: Any) -> int:
    """Widths and heights that work are multiples of it: VAE times patch, and 8 as in every recipe."""
    cell = pipe.vae_scale_factor * getattr(pipe, "patch_size", 1)  # SD3; Flux tells its image processor instead
    return math.lcm(8, cell, pipe.image_processor.config.vae_scale_factor)


def _own_size(pipe: Any) -> Size | None:
    """(width, height) in pixels that the model was trained on, where the pipeline tells it."""
    unet = getattr(pipe, "unet", None)
    side = getattr(pipe, "default_sample_size", None) or (unet.config.sample_size if unet is not None else None)
    if side is None:
        return None
    height, width = (side, side) if isinstance(side, int) else side
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def _start(recipe: Recipe, growth: Upscale, pipe: Any, multiple: int) -> tuple[Image.Image | None, Recipe, list[Size]]:
    """The picture to start from if there is one, the recipe with the size of the first picture, and the later sizes."""
    if growth.source is not None:
        if recipe.width or recipe.height:
            raise ValueError(
                f"width and height are those of the source {growth.source}: got {recipe.width} and {recipe.height}; "
                "leave them out, and say the scale or the sizes to come"
            )
        picture = opened(Path(growth.source).expanduser(), "picture")
        return picture, recipe, stage_sizes(growth, picture.size, multiple)
    own = _own_size(pipe) or (None, None)
    width, height = recipe.width or own[0], recipe.height or own[1]
    if width is None or height is None:
        raise ValueError(f"{type(pipe).__name__} does not tell its own size; give width and height")
    start = fitting((width, height), multiple)
    return None, replace(recipe, width=start[0], height=start[1]), stage_sizes(growth, start, multiple)


def _later_recipe(recipe: Recipe, growth: Upscale) -> Recipe:
    """What the later stages are made from; their sizes come with them."""
    return replace(
        recipe,
        upscale=None,
        steps=recipe.steps if growth.steps is None else growth.steps,
        attention=recipe.attention if growth.attention is None else growth.attention,
    )


def _check_later(growth: Upscale, later: Recipe, refine: Any) -> None:
    """Find out before the first stage what would stop the later ones. Raises ValueError, TypeError."""
    if int(later.steps * growth.strength) < 1:
        raise ValueError(
            f"strength leaves no step to do: got {growth.strength:g} of {later.steps} steps, need at least one; "
            f"use more steps, or a strength of at least {math.ceil(1000 / later.steps) / 1000:g}"
        )
    if growth.rope_theta_scale is not None and not _rotary(refine):
        raise ValueError(
            f"{type(refine).__name__} has no rotary embedding, got rope_theta_scale {growth.rope_theta_scale:g}; "
            "leave it out"
        )
    with attention_of(later, refine):
        pass


def _rotary(target: Any) -> list[Any]:
    """The position embeddings with a rotary base in the denoisers."""
    embeddings = (getattr(model, "pos_embed", None) for model in denoisers(target))
    return [embedding for embedding in embeddings if hasattr(embedding, "theta")]


def _theta_scale(growth: Upscale, size: Size, pipe: Any) -> float:
    if growth.rope_theta_scale is not None:
        return growth.rope_theta_scale
    own = _own_size(pipe)
    return ROPE_THETA_SCALE if own is not None and max(size) >= 2 * max(own) else 1.0


@contextlib.contextmanager
def rotary_base(target: Any, scale: float) -> Iterator[None]:
    """Multiply the rotary base of a pipeline or model, where there is one, for the length of a with block."""
    before = [(embedding, embedding.theta) for embedding in _rotary(target)]
    try:
        if scale != 1:
            for embedding, theta in before:
                embedding.theta = theta * scale
        yield
    finally:
        for embedding, theta in before:
            embedding.theta = theta


@contextlib.contextmanager
def _tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """Let the VAE work in tiles for the length of a with block, if it can and does not already."""
    switch = wanted and hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
    try:
        if switch:
            vae.enable_tiling()
        yield
    finally:
        if switch:
            vae.disable_tiling()


def _generator(seed: int, stage: int) -> torch.Generator:
    """Noise of its own for every later stage, from the one seed."""
    mixed = np.random.SeedSequence((seed, stage)).generate_state(1, np.uint64)[0]
    return torch.Generator("cpu").manual_seed(int(mixed))


class _Counter:
    """Counts steps and time over all stages. A step is taken to cost in proportion to its pixels."""

    def __init__(
        self, on_step: Callable[[StepEvent], None] | None, began: float, sizes: list[Size], planned: list[int]
    ) -> None:
        self._on_step = on_step
        self._began = began
        self._pixels = [width * height for width, height in sizes]
        self._steps = planned  # corrected when a stage begins: schedulers differ in rounding and order
        self._rate = 0.0  # seconds of a step for each pixel, last measured

    def stage(self, index: int) -> Callable[[StepEvent], None] | None:
        """What that stage is to call after its steps."""
        return None if self._on_step is None else lambda event: self._tell(index, event)

    def _tell(self, index: int, event: StepEvent) -> None:
        assert self._on_step is not None
        self._steps[index] = event.steps
        left = event.eta or 0.0
        if event.step < event.steps:
            self._rate = left / (event.steps - event.step) / self._pixels[index]
        later = zip(self._steps[index + 1 :], self._pixels[index + 1 :], strict=True)
        left += sum(self._rate * steps * pixels for steps, pixels in later)
        self._on_step(
            replace(
                event,
                step=sum(self._steps[:index]) + event.step,
                steps=sum(self._steps),
                stage=index,
                stages=len(self._steps),
                seconds=time.monotonic() - self._began,
                eta=left,
            )
        )
