"""Does a picture still show what its caption says after it has grown? The reader judges every size.

Run: python -m reattend.emoji_world.judge_upscale --model tiny-sd --scenes 200 --scale 4
     python -m reattend.emoji_world.judge_upscale --scenes 200 --attention clear radius=6    in the larger sizes

Each scene is one call of `upscale`, whose first picture and all later ones are read; so every size has the same captions
and seeds, and differences to the first size are those of pairs. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..pipelines.files import written_whole
from ..pipelines.load import load
from ..pipelines.recipe import Recipe
from ..pipelines.stages import Upscale, stage_sizes
from ..pipelines.upscaling import upscale
from .evaluate import (
    FORMAT,
    SHOWN,
    Evaluation,
    contact_sheet,
    environment,
    model_settings,
    picture_path,
    scored,
    summarized,
)
from .results import Results
from .world import sample_captions

__all__ = ["judge", "size_names"]

SHEET_SIDE = 256  # pixels of each picture on the contact sheet


def judge(
    model: Any,
    *,
    out: Path,
    scenes: int = 200,
    scale: float = 4.0,
    strength: float = 0.7,
    steps: int = 20,
    attention: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    command: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Grow pictures from held-out captions and score all their sizes. Goes on from `out` if it holds such results.

    Args:
        model: a loaded text-to-image pipeline, or what `load` takes; the first size is its own.
        out: folder of `results.jsonl`, `summary.json`, the first pictures of every size and the sheet `contact.png`.
        scenes: held-out captions; scene i has the seed `seed + i`.
        scale: how many times larger the last size is, in stages of at most 2.
        strength: how much a stage may change the picture, above 0 up to 1.
        steps: denoising steps, in each size (a later one runs the share that `strength` says).
        attention: attention of the later sizes, as in a recipe.
        command: what repeats this run, for the summary.
        on_progress: called with scenes done and in all, after every scene.

    Returns:
        an evaluation with an arm for each size: "1x", "2x", "4x".

    Raises:
        ValueError, TypeError: bad numbers, unknown attention, or `out` holds results of other settings.
    """
    if scenes < 1:
        raise ValueError(f"scenes is {scenes}, need at least 1; give a positive number")
    growth = Upscale(scale=scale, strength=strength, attention=tuple(dict(entry) for entry in attention))
    first = Recipe(prompt="-", steps=steps, seed=seed, upscale=growth)
    pipe = load(model) if isinstance(model, (str, Path)) else model
    out, names = Path(out), size_names(growth)
    settings = {
        "sizes": names,
        "scale": growth.scale,
        "strength": growth.strength,
        "attention": list(growth.attention or ()),
        "steps": steps,
        "seed": seed,
        **model_settings(pipe),
    }
    results = Results(out / "results.jsonl", FORMAT, settings)
    captions = sample_captions(np.random.default_rng(seed), scenes)
    for i, caption in enumerate(captions):
        missing = [name for name in names if (name, i) not in results.entries]
        if missing:
            picture = upscale(replace(first, prompt=caption, seed=seed + i), pipe=pipe)
            made = dict(zip(names, (*picture.smaller, picture.image), strict=True))
            for name in missing:
                if i < SHOWN:
                    with written_whole(picture_path(out, name, i)) as (path,):
                        made[name].save(path, "PNG")
                results.add(scored(name, {i: (caption, made[name])}))
        if on_progress:
            on_progress(i + 1, scenes)
    evaluation = summarized(results, settings, names, scenes, environment(pipe, command))
    rows = [[picture_path(out, name, i) for i in range(min(scenes, SHOWN))] for name in names]
    sheet = contact_sheet(rows, SHEET_SIDE)
    with written_whole(out / "summary.json", out / "contact.png") as (summary_path, sheet_path):
        summary_path.write_text(evaluation.to_json() + "\n")
        sheet.save(sheet_path, "PNG")
    return evaluation


def size_names(growth: Upscale) -> list[str]:
    """ "1x", "2x", "4x": how many times larger each size is than the first."""
    side = 64
    return ["1x", *(f"{width / side:.3g}x" for width, _ in stage_sizes(growth, (side, side), 1))]


def main(
    model: str = "tiny-sd",
    scenes: int = 200,
    scale: float = 4.0,
    strength: float = 0.7,
    steps: int = 20,
    attention: tuple[str, ...] = (),
    seed: int = 0,
    out: Path = Path("out/judge-upscale"),
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Print how often pictures show what their captions say, at every size.

    Args:
        model: bundled name, local diffusers folder, or hub id of a model of the emoji world.
        scenes: held-out captions.
        scale: how many times larger the last size is.
        strength: how much a stage may change the picture.
        steps: denoising steps.
        attention: attention of the larger sizes: its name, then settings as key=value.
        seed: chooses captions and noise.
        out: folder for results, summary and a contact sheet.
        device: where to compute; the first of cuda, mps, cpu.
        dtype: float32, float16 or bfloat16.
    """
    from tqdm import tqdm

    try:
        bad = [word for word in attention[1:] if "=" not in word]
        if bad:
            raise ValueError(f"attention has the setting {bad[0]!r}, need key=value, as in --attention clear radius=6")
        entries = [{"name": attention[0], **dict(word.split("=", 1) for word in attention[1:])}] if attention else []
        pipe = load(model, device=device, dtype=dtype)
        with tqdm(total=scenes, desc="scenes", disable=None) as bar:

            def tell(done: int, _: int) -> None:
                bar.update(done - bar.n)

            found = judge(
                pipe, out=out, scenes=scenes, scale=scale, strength=strength, steps=steps, attention=entries, seed=seed,
                command=" ".join(["python -m reattend.emoji_world.judge_upscale", *sys.argv[1:]]), on_progress=tell,
            )  # fmt: skip
    except (ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(found)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
