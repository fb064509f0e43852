"""How near a student is to its teacher: the same prompts, sizes and noise for both, and differences in pairs.

    latent_error    mean square of the difference of the final latents, over the teacher's mean square
    psnr, ssim      of the pictures, by torchmetrics
    ms_per_step     of the denoiser, in turns; the median over the pictures
    flops           operations of the denoiser in a step, and of the attention in it, counted in one more picture of each
    score           what a judge says of a picture and its prompt, in [0, 1]; for example whether the prompt is right

Means come with 95 % intervals over the prompts (normal, from the differences in pairs).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attn_processors import AttnMethod
from ..attn_processors.planning import denoisers
from ..pipelines.checks import check_number
from .linear_folder import install_linear, read_linear
from .step_cost import Flops, counted, timed
from .validation import picture

__all__ = ["Comparison", "Interval", "closeness", "evaluate", "step_flops"]

Judge = Callable[[np.ndarray, str], float]


@dataclass(frozen=True)
class Interval:
    """A mean, and how far a 95 % interval reaches to either side; nan from a single value."""

    mean: float
    margin: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.margin:.2g}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Student against teacher. `scores` is (teacher, student, student - teacher), None without a judge."""

    samples: int
    latent_error: Interval
    psnr: Interval
    ssim: Interval
    teacher_ms_per_step: float
    student_ms_per_step: float
    times_faster: float
    teacher_flops: Flops
    student_flops: Flops
    scores: tuple[Interval, Interval, Interval] | None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def __str__(self) -> str:
        lines = [
            f"{self.samples} pairs of pictures",
            f"  error of the latents   {self.latent_error}   (of the teacher's mean square)",
            f"  PSNR                   {self.psnr} dB",
            f"  SSIM                   {self.ssim}",
            f"  ms a step              {self.student_ms_per_step:.1f}, teacher {self.teacher_ms_per_step:.1f} "
            f"({self.times_faster:.2f} times faster)",
            f"  GFLOP a step           {_giga(self.student_flops)}, teacher {_giga(self.teacher_flops)}",
        ]
        if self.scores is not None:
            lines.append("  score                  {1}, teacher {0}, difference {2}".format(*self.scores))
        return "\n".join(lines)


def evaluate(
    pipe: Any,
    student: str | Path,
    prompts: Sequence[str],
    *,
    size: tuple[int, int],
    steps: int = 10,
    seed: int = 0,
    text_length: int | None = None,
    judge: Judge | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare a student's pictures with its teacher's.

    Args:
        pipe: the stock pipeline; it is left as it was found.
        student: folder of a student, or a weight file published with CLEAR.
        prompts: one pair of pictures for each.
        size: width and height in pixels.
        steps, text_length: of both.
        seed: picture i begins with the noise of seed + i.
        judge: called as judge(picture (H, W, 3) uint8, prompt) for each picture.
        on_progress: called with (pairs done, pairs in all).

    Raises:
        ValueError: for bad input, or a student that does not fit `pipe`.
    """
    check_number("steps", steps, int, 1, 1000)
    if not prompts:
        raise ValueError("there are no prompts to compare with; give some")
    found = read_linear(student)
    each: dict[str, Any] = {"text_length": text_length, "steps": steps, "seed": seed, "prompt": prompts[0]}
    flops = step_flops(pipe, found, student, size=size, **each)  # also warms both up
    closenesses: list[tuple[float, float, float]] = []
    seconds: tuple[list[float], list[float]] = ([], [])
    scores: list[tuple[float, float]] = []
    for number, prompt in enumerate(prompts):
        made = []
        for role in (0, 1) if number % 2 == 0 else (1, 0):  # in turns, so that a slow minute hits both
            handle = install_linear(pipe, found, student) if role else None
            try:
                with timed(denoisers(pipe)[0]) as forwards:
                    pixels, latents = picture(pipe, prompt, size, steps, seed + number, text_length)
                seconds[role].append(sum(forwards) / steps)
            finally:
                if handle is not None:
                    handle.remove()
            made.append((role, pixels, latents))
        (_, theirs, teacher), (_, ours, latents) = sorted(made, key=lambda entry: entry[0])
        closenesses.append(closeness(ours, theirs, latents, teacher))
        if judge is not None:
            scores.append((float(judge(theirs, prompt)), float(judge(ours, prompt))))
        if on_progress is not None:
            on_progress(number + 1, len(prompts))
    errors, psnrs, ssims = zip(*closenesses, strict=True)
    judged = None
    if scores:
        teacher_scores, student_scores = zip(*scores, strict=True)
        judged = (_interval(teacher_scores), _interval(student_scores), _interval([b - a for a, b in scores]))
    return Comparison(
        samples=len(prompts), latent_error=_interval(errors), psnr=_interval(psnrs), ssim=_interval(ssims),
        teacher_ms_per_step=median(seconds[0]) * 1000, student_ms_per_step=median(seconds[1]) * 1000,
        times_faster=median(a / b for a, b in zip(*seconds, strict=True)),
        teacher_flops=flops[0], student_flops=flops[1], scores=judged,
    )  # fmt: skip


def closeness(ours: np.ndarray, theirs: np.ndarray, latents: Tensor, teacher: Tensor) -> tuple[float, float, float]:
    """Error of the latents (over the teacher's mean square), PSNR in dB (at most 100) and SSIM of a pair of pictures.

    Args:
        ours, theirs: pictures of student and teacher, uint8 (H, W, 3).
        latents, teacher: the latents they were decoded from.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255 for pixels in (ours, theirs))
    latents, teacher = latents.float(), teacher.float()
    error = float((latents - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12))
    psnr = min(float(peak_signal_noise_ratio(a, b, data_range=1.0)), 100.0)  # equal pictures: infinite
    similarity: Any = structural_similarity_index_measure(a, b, data_range=1.0)
    return error, psnr, float(similarity)


def step_flops(
    pipe: Any,
    student: tuple[AttnMethod, dict[str, Tensor], str | None, Any],
    path: str | Path,
    *,
    size: tuple[int, int],
    steps: int = 1,
    prompt: str = "",
    seed: int = 0,
    text_length: int | None = None,
) -> tuple[Flops, Flops]:
    """Operations in a step of the teacher and of a student, counted while each makes a picture.

    A student whose attention is computed by "flex", inside which nobody can count, is counted as "auto" computes it.

    Args:
        student: what `read_linear` gave for `path`.
    """
    method, *rest = student
    if getattr(method, "backend", None) == "flex":
        method = dataclasses.replace(method, backend="auto")  # type: ignore[call-arg]

    def work() -> None:
        picture(pipe, prompt, size, steps, seed, text_length)

    handle = install_linear(pipe, (method, *rest), path)  # type: ignore[arg-type]
    try:
        model, layers = denoisers(pipe)[0], [layer.name for layer in handle.report().layers]
        ours = counted(model, layers, work, steps)
    finally:
        handle.remove()
    return counted(model, layers, work, steps), ours


def _giga(flops: Flops) -> str:
    return f"{flops.model / 1e9:.4g} (attention {flops.attention / 1e9:.4g})"


def _interval(values: Sequence[float]) -> Interval:
    margin = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return Interval(mean(values), margin)
