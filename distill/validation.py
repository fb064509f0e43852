"""Pictures in between: the student beside the teacher, same prompt and noise, from the pipeline that is being trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..pipelines.files import written_whole
from ..pipelines.filling_in import chosen_length, guided
from ..pipelines.image import without_progress_bar
from .progress import plain

if TYPE_CHECKING:
    from .config import DistillConfig
    from .roles import TwoRoles
    from .shards import Samples

__all__ = ["picture", "pictures", "validate"]


def validate(
    pipe: Any,
    roles: TwoRoles,
    samples: Samples,
    config: DistillConfig,
    step: int,
    *,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    writes: bool = True,
) -> float:
    """Write `pictures/step-NNNNNNNN.png`, a row for each prompt with teacher and student.

    `autocast` is what the student runs under: its trained weights are fp32 beside those of the pipeline.

    Returns:
        mean squared error of the student's final latents to the teacher's.
    """
    size = next(iter(samples.groups()))
    rows, errors = [], []
    for number, prompt in enumerate(config.validation_prompts):
        settings = (pipe, prompt, size, config.validation_steps, config.seed + number, samples.about.get("text_length"))
        teacher, theirs = picture(*settings)
        with roles.student(), autocast():
            student, ours = picture(*settings)
        rows.append(np.concatenate([teacher, student], axis=1))
        errors.append(float((ours.float() - theirs.float()).square().mean()))
    if writes:
        path = config.out / "pictures" / f"step-{step:08d}.png"
        with written_whole(path) as (aside,):
            Image.fromarray(np.concatenate(rows, axis=0)).save(aside, format="PNG")
        note: Path = path.with_suffix(".json")
        told = {"step": step, "prompts": config.validation_prompts, "latent_error": plain(errors)}
        note.write_text(json.dumps(told) + "\n")
    return sum(errors) / len(errors)


def picture(
    pipe: Any, prompt: str, size: tuple[int, int], steps: int, seed: int, text_length: int | None = None
) -> tuple[np.ndarray, torch.Tensor]:
    """One stock call: the picture, uint8 (H, W, 3), and the latents it was decoded from, (1, ...)."""
    made, latents = pictures(pipe, [prompt], size, steps, [seed], text_length)
    return made[0], latents


@torch.no_grad()
def pictures(
    pipe: Any,
    prompts: Sequence[str],
    size: tuple[int, int],
    steps: int,
    seeds: Sequence[int],
    text_length: int | None = None,
) -> tuple[np.ndarray, torch.Tensor]:
    """One stock call for several prompts, each with the noise of its own seed: uint8 (B, H, W, 3) and latents (B, ...).

    `text_length` in tokens; None = as many as `generate` takes.
    """
    kept: dict[str, torch.Tensor] = {}

    def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        kept["latents"] = tensors["latents"]
        return tensors

    length = chosen_length(pipe, text_length)
    more: dict[str, Any] = {**guided(pipe, None)}
    if length is not None:
        more["max_sequence_length"] = length
    with without_progress_bar(pipe):
        made = pipe(
            prompt=list(prompts), width=size[0], height=size[1], num_inference_steps=steps, output_type="np",
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], callback_on_step_end=keep, **more,
        ).images  # fmt: skip
    return (np.nan_to_num(made) * 255).round().clip(0, 255).astype(np.uint8), kept["latents"]
