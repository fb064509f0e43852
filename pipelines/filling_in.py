"""What a recipe leaves open, filled in from the pipeline; and what that pipeline cannot do, refused before any work.

A filled-in recipe makes the same picture once more: seed, guidance and number format are in it, and which model and
which versions made it. A text that no encoder of the model would read to its end is refused, too.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import torch

from .checks import check_number
from .load import GUIDANCE
from .recipe import Recipe

__all__ = ["check_length", "chosen_guidance", "chosen_length", "completed", "filled_in", "guided", "text_length"]

LONGEST_TEXT = 512  # tokens; the pipelines take no more


def filled_in(recipe: Recipe, pipe: Any) -> Recipe:
    """The recipe with seed, guidance, numbers, model and versions as they will be used.

    Raises:
        ValueError: if `pipe` makes no pictures from text, or cannot do what the recipe asks for.
    """
    accepts = inspect.signature(pipe.__call__).parameters
    if recipe.video is not None:
        raise ValueError(
            "the recipe is that of a film; call long_video (reattend video), or set its video to None for a picture"
        )
    _check_makes_pictures(pipe, accepts)
    recipe = completed(recipe, pipe, accepts)
    for name, text in (("prompt", recipe.prompt), ("negative prompt", recipe.negative)):
        check_length(name, text, pipe, accepts)
    return recipe


def _check_makes_pictures(pipe: Any, accepts: Mapping[str, inspect.Parameter]) -> None:
    if not {"prompt", "num_inference_steps", "callback_on_step_end"} <= set(accepts) or {"image", "num_frames"} & set(
        accepts
    ):
        raise ValueError(
            f"{type(pipe).__name__} does not make a picture from a text alone with a callback after each step; "
            "use a text-to-image pipeline such as StableDiffusionPipeline or StableDiffusionXLPipeline"
        )


def completed(recipe: Recipe, pipe: Any, accepts: Mapping[str, inspect.Parameter]) -> Recipe:
    """The recipe with seed, guidance, numbers, model and versions as they will be used."""
    dtype = str(pipe.dtype).removeprefix("torch.")
    if recipe.dtype not in (None, dtype):
        raise ValueError(
            f"the recipe computes in {recipe.dtype}, this pipeline in {dtype}; load it with dtype={recipe.dtype!r}"
        )
    guidance = chosen_guidance(pipe, recipe.guidance)
    if recipe.negative and "negative_prompt" not in accepts:
        raise ValueError(f"{type(pipe).__name__} takes no negative prompt, got {recipe.negative!r}; leave it out")
    return replace(
        recipe,
        model=pipe.config.get("_name_or_path") or recipe.model,
        seed=secrets.randbelow(2**32) if recipe.seed is None else recipe.seed,
        guidance=guidance,
        dtype=dtype,
        made_with={
            "reattend": importlib.metadata.version("reattend"),
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "device": pipe.device.type,
            "pipeline": type(pipe).__name__,
            "scheduler": type(pipe.scheduler).__name__,
        },
    )


def chosen_guidance(pipe: Any, asked: float | None) -> float | None:
    """Classifier-free guidance as asked, or what a bundled model draws best with, or the stock call's default.

    None where the call takes no guidance. Raises ValueError if it is asked for one then.
    """
    accepts = inspect.signature(pipe.__call__).parameters
    if "guidance_scale" in accepts:
        own = GUIDANCE.get(pipe.config.get("_name_or_path"), accepts["guidance_scale"].default)
        return own if asked is None else asked
    if asked is not None:
        raise ValueError(f"{type(pipe).__name__} takes no guidance, got {asked}; leave it out")
    return None


def guided(pipe: Any, asked: float | None) -> dict[str, float]:
    """`chosen_guidance` as an argument of the stock call."""
    guidance = chosen_guidance(pipe, asked)
    return {} if guidance is None else {"guidance_scale": guidance}


def check_length(name: str, text: str, pipe: Any, accepts: Mapping[str, inspect.Parameter]) -> None:
    """Raise ValueError if no text encoder sees the whole text; stock pipelines cut it off with a warning."""
    found = []  # (tokens, allowed) for each tokenizer
    for tokenizer in _tokenizers(pipe):
        allowed = tokenizer.model_max_length
        if _reads_long_text(tokenizer) and "max_sequence_length" in accepts:
            allowed = text_length(pipe, accepts)  # it is cut there
        tokens = len(tokenizer(text, truncation=False, add_special_tokens=False, verbose=False).input_ids)
        found.append((tokens, allowed - tokenizer.num_special_tokens_to_add()))
    if found and all(tokens > allowed for tokens, allowed in found):
        tokens, allowed = max(found, key=lambda pair: pair[1])
        raise ValueError(f"{name} is too long: got {tokens} tokens, this model reads {allowed}; shorten it")


def text_length(pipe: Any, accepts: Mapping[str, inspect.Parameter]) -> int | None:
    """Tokens that the pipeline's long text (T5) is padded to: the stock call's default, or fewer if the tokenizer says so.

    Stock pipelines mask nothing of the padding, so it costs time and takes part in attention. None: no long text here.
    """
    if "max_sequence_length" not in accepts:
        return None
    limits = [tokenizer.model_max_length for tokenizer in _tokenizers(pipe) if _reads_long_text(tokenizer)]
    return min([accepts["max_sequence_length"].default, *limits])


def chosen_length(pipe: Any, asked: int | None) -> int | None:
    """Text tokens that captions are padded to: as asked, or as `generate` has it; None where the model has no choice.

    Raises TypeError or ValueError for a number that cannot be, or a model without a choice.
    """
    own = text_length(pipe, inspect.signature(pipe.__call__).parameters)
    if asked is None:
        return own
    if own is None:
        raise ValueError(f"{type(pipe).__name__} has one text length, got text_length={asked}; leave it out")
    check_number("text_length", asked, int, 1, LONGEST_TEXT)
    return asked


def _tokenizers(pipe: Any) -> list[Any]:
    """The pipeline's tokenizers; FLUX.2 has its own inside a processor."""
    parts = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    return [getattr(part, "tokenizer", part) for part in parts]


def _reads_long_text(tokenizer: Any) -> bool:
    return "CLIP" not in type(tokenizer).__name__
