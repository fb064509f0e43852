"""The picture job: recipe in, picture out, through the stock pipeline call with our attention inside.

Load, install, call, take everything out again. The pipeline's own code makes the picture; we only choose the generator,
listen after each step and keep what is needed to make the same picture once more.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from ..attn_processors import installed
from ..attn_processors.context import context_of
from ..attn_processors.planning import denoisers
from .checks import method_of
from .events import CancelToken, StepEvent
from .filling_in import filled_in, text_length
from .load import load
from .picture import Picture
from .recipe import Recipe
from .splitting import patches

__all__ = ["Picture", "generate", "preview"]


def generate(
    recipe: Recipe,
    *,
    pipe: Any = None,
    on_step: Callable[[StepEvent], None] | None = None,
    cancel: CancelToken | None = None,
    split: bool = False,
) -> Picture:
    """Make the picture that `recipe` describes. The same recipe gives the same pixels on a CPU.

    Args:
        recipe: what to make. What it leaves open is filled in and comes back in `Picture.recipe`.
        pipe: a loaded text-to-image pipeline, used in place of `recipe.model`; it is left as it was found.
        on_step: called in this thread after every denoising step.
        cancel: asked before the work, and after every step.
        split: compute rows of the picture on each rank of torch.distributed (`patches`); every rank calls alike, with a
            seed in the recipe, and gets the picture.

    Raises:
        Cancelled: if `cancel` was requested; `pipe` can be used again.
        ValueError: for a prompt that is too long, a pipeline that makes no pictures from text, attention that fits no
            layer, a model that cannot be loaded.
        RuntimeError: if the model computed no picture (not-a-number values), or its safety checker hid it.
        MemoryError: if the picture is too large for the memory there is.
    """
    cancel = cancel or CancelToken()
    began = time.monotonic()
    cancel.check()
    if split and recipe.seed is None:
        raise ValueError("a picture that is split over ranks needs a seed that all of them know; set recipe.seed")
    if recipe.upscale is not None:
        raise ValueError(
            "the recipe enlarges its picture, which generate does not do; call upscale (reattend upscale), or set the "
            "recipe's upscale to None for the small picture"
        )
    if pipe is None:
        pipe = load(recipe.model, dtype=recipe.dtype)
    recipe = filled_in(recipe, pipe)
    cancel.check()
    generator = torch.Generator("cpu").manual_seed(recipe.seed)  # type: ignore[arg-type]  # filled in
    image = stock_call(pipe, recipe, generator, on_step=on_step, cancel=cancel, began=began, split=split)
    return Picture(image=image, recipe=replace(recipe, width=image.width, height=image.height))


def stock_call(
    pipe: Any,
    recipe: Recipe,
    generator: torch.Generator,
    *,
    on_step: Callable[[StepEvent], None] | None,
    cancel: CancelToken,
    began: float,
    split: bool = False,
    **more: Any,
) -> Image.Image:
    """One call of the stock pipeline with the recipe's attention inside, which is gone afterwards.

    Args:
        pipe: a text-to-image pipeline, or one that takes `more`.
        recipe: a filled-in recipe; of its width and height only what `pipe` accepts is passed on.
        generator: the source of chance, in place of the recipe's seed.
        on_step, cancel, split: as for `generate`.
        began: `time.monotonic()` when the work began.
        more: further arguments of the call.

    Raises:
        as `generate`.
    """
    with attention_of(recipe, pipe), patches(pipe) if split else contextlib.nullcontext():
        return stock_rows(pipe, recipe, generator, on_step=on_step, cancel=cancel, began=began, **more)[0]


def stock_rows(
    pipe: Any,
    recipe: Recipe,
    generator: torch.Generator | Sequence[torch.Generator],
    *,
    on_step: Callable[[StepEvent], None] | None,
    cancel: CancelToken,
    began: float,
    change: Callable[[Any, int, torch.Tensor], torch.Tensor] | None = None,
    **more: Any,
) -> list[Image.Image]:
    """One call of the stock pipeline as it is; all its pictures.

    Args:
        as `stock_call`; `more` overrides what the recipe says, as with a list of prompts and as many generators.
        change: gives new latents after each step from (pipe, index of the step, latents).
    """
    clock = Clock(began)

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(clock.event(index + 1, getattr(pipe, "num_timesteps", recipe.steps), tensors["latents"]))
        cancel.check()
        if change is not None:
            tensors["latents"] = change(pipe, index, tensors["latents"])
        return tensors

    with without_progress_bar(pipe), _told_memory(recipe):
        output = pipe(
            **_arguments(pipe, recipe, inspect.signature(pipe.__call__).parameters) | more,
            generator=generator,
            output_type="np",  # the values that a PIL image would be rounded from, so that NaN can be seen
            callback_on_step_end=after_step,
        )
    return _pictures(output)


def preview(latents: torch.Tensor, pipe: Any, side: int = 256) -> Image.Image:
    """A small picture of unfinished latents: averaged down, then decoded by the model's own VAE.

    It costs one decode of at most `side` x `side` pixels; call it every few steps if that is much beside a step.

    Args:
        latents: shape (B, C, H, W); only the first row is shown.
        pipe: the pipeline that made them.
        side: largest width and height of the result, in pixels.
    """
    if latents.ndim != 4:
        raise ValueError(
            f"preview needs latents of shape (B, C, H, W), got {tuple(latents.shape)} from {type(pipe).__name__}"
        )
    vae = pipe.vae
    cells = max(1, side // pipe.vae_scale_factor)
    shrink = max(1.0, max(latents.shape[-2:]) / cells)
    size = [max(1, int(length / shrink)) for length in latents.shape[-2:]]
    with torch.no_grad():
        small = torch.nn.functional.interpolate(latents[:1].float(), size, mode="area")
        small = small / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        decoded = vae.decode(small.to(vae.dtype), return_dict=False)[0]
    processor = pipe.video_processor if hasattr(pipe, "video_processor") else pipe.image_processor
    return processor.postprocess(decoded.float().nan_to_num(), output_type="pil")[0]


class Clock:
    """Times the steps. The first one counts apart from the others, because loading and text encoding come with it."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.first: float | None = None

    def event(self, step: int, steps: int, latents: torch.Tensor | None) -> StepEvent:
        now = time.monotonic()
        if self.first is None:
            self.first = now
        each = (now - self.first) / (step - 1) if step > 1 else now - self.began
        return StepEvent(step, steps, latents, seconds=now - self.began, eta=each * (steps - step))


def _arguments(pipe: Any, recipe: Recipe, accepts: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """What the stock call gets; what the recipe leaves open is left to it."""
    values = {
        "max_sequence_length": text_length(pipe, accepts),
        "prompt": recipe.prompt,
        "negative_prompt": recipe.negative or None,
        "width": recipe.width,
        "height": recipe.height,
        "num_inference_steps": recipe.steps,
        "guidance_scale": recipe.guidance,
    }
    return {name: value for name, value in values.items() if value is not None and name in accepts}


def attention_of(recipe: Recipe, pipe: Any) -> contextlib.AbstractContextManager[Any]:
    """The recipe's attention inside the pipeline for the length of a with block."""
    if any(context_of(model) for model in denoisers(pipe)):
        raise ValueError(
            "the pipeline already carries attention of ours, which the recipe would not tell; call "
            "pipe.reset_attn_processor() (or remove its handle) and write it into the recipe's attention"
        )
    if recipe.linear is not None:
        return _student(recipe.linear, pipe)
    methods = [method_of(entry) for entry in recipe.attention]
    return installed(pipe, methods) if methods else contextlib.nullcontext()


@contextlib.contextmanager
def _student(folder: str, pipe: Any) -> Iterator[None]:
    """A trained linear student inside the pipeline for the length of a with block."""
    from ..distill.linear_folder import load_linear  # which itself stands on this package

    handle = load_linear(pipe, folder)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def without_progress_bar(pipe: Any) -> Iterator[None]:
    """Our events take the place of the pipeline's own bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@contextlib.contextmanager
def told_memory(what: str, advice: str) -> Iterator[None]:
    """Say in one sentence that memory ran out; torch has one class for it on devices and none on the CPU."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(f"not enough memory for {what}; choose {advice}") from error
        raise


def _told_memory(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    size = f"{recipe.width} x {recipe.height} pixels" if recipe.width and recipe.height else "the model's own size"
    return told_memory(f"a picture of {size}", "a smaller width and height")


def _pictures(output: Any) -> list[Image.Image]:
    if any(getattr(output, "nsfw_content_detected", None) or ()):
        raise RuntimeError("the model's own safety checker hid this picture; change the prompt or the seed")
    values = output.images  # (B, H, W, 3) in [0, 1]
    if not np.isfinite(values).all():
        raise RuntimeError(
            "the model computed no picture: its values are not numbers (NaN); float16 often overflows, "
            "use dtype float32 or bfloat16"
        )
    return diffusers.DiffusionPipeline.numpy_to_pil(values)
