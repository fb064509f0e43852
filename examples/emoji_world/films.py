"""Do long films keep what they show? Dual-scope attention, streamed, beside FreeNoise and beside clips on their own.

    python -m reattend.emoji_world.films --out out/films

Ours makes the whole film; the others make its first frames, because FreeNoise holds all frames at once and clips know
nothing of each other anyway. All films go through the same codec, and the reader looks at every frame: are the kinds and
tints those of the first frame? `--attention dual-scope anchors=8` is our way with other settings; each needs a folder.

A run that was stopped goes on in its folder. What was read is kept (`results.jsonl`), and a film that is whole is read, not
made again, if it is of the same settings and weights, which are noted beside it with the seconds it took (`.made.json`). A
film of ours goes on from its checkpoint, and then tells no time. The others begin anew, and so does the reading of a film.
`--show FILE` prints the table of a `summary.json` once more.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tyro.conf import UseAppendAction, arg

from ..bench.video import CONTEXT, PEER, free_noise
from ..pipelines.checkpoint import latest, parts_folder
from ..pipelines.checks import attention_entry, attention_in_full
from ..pipelines.files import written_whole
from ..pipelines.film import FilmFile, frame_count, frames_of, partial
from ..pipelines.filming import filled_in, long_video
from ..pipelines.load import load
from ..pipelines.noise import frame_noise
from ..pipelines.recipe import Recipe
from ..pipelines.sheet import save_sheet
from ..pipelines.videos import Video
from .evaluate import environment, model_settings
from .identity import Identity, judge
from .rates import rate
from .read import Found, read
from .results import Results, print_table

__all__ = ["ARMS", "compare", "table"]

FORMAT = "reattend films 1"
OURS, CLIPS = "dual-scope", "independent clips"
ARMS = (OURS, PEER, CLIPS)
GOAL = 0.95  # of our frames that show what the first one does
PROMPTS = ("a red balloon and a cat on sea",)  # the cat's tint is left to the model: no text keeps it

Progress = Callable[[str, int, int], None]  # what is done, and how far of how much


def compare(
    model: Any,
    *,
    out: Path,
    frames: int = 2304,
    peer_frames: int = 512,
    steps: int = 10,
    seed: int = 0,
    prompts: Sequence[str] = PROMPTS,
    arms: Sequence[str] = ARMS,
    attention: Sequence[Mapping[str, Any]] = (),
    command: str = "",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Make every film with every arm and read it. Goes on from `out` if it holds results of the same settings.

    Args:
        model: a loaded AnimateDiff pipeline of the emoji world, or what `load` takes.
        out: folder of the films, their contact sheets, `results.jsonl` and `summary.json`.
        frames: of our films.
        peer_frames: of the other arms' films, and of the stretch of ours that is compared with them.
        arms: names from ARMS.
        attention: of our films, as in `Recipe.attention`; dual-scope is added where it is missing.
        on_progress: called while a film is made and read.

    Returns:
        What `summary.json` holds: per arm how often frames show what the first one does, and how many show the same, with
        95 % intervals that take frames for independent, which neighbours are not.

    Raises:
        ValueError: an unknown arm or attention, no prompt, no frames, or `out` holds results of other settings.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"there is no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if not prompts or not 2 <= peer_frames <= frames:
        raise ValueError(
            f"need a prompt, and 2 to {frames} frames to compare; got {len(prompts)} prompts and {peer_frames} frames"
        )
    plan = Recipe(prompt=prompts[0], steps=steps, attention=tuple(map(dict, attention)), video=Video(frames=frames))
    pipe = load(model) if isinstance(model, (str, Path)) else model
    plan = filled_in(plan, pipe)
    settings = {
        "frames": frames, "peer_frames": peer_frames, "steps": steps, "seed": seed, "prompts": list(prompts),
        "arms": list(arms), "attention": attention_in_full(plan.attention), **model_settings(pipe),
    }  # fmt: skip
    weights = {name: settings[name] for name in ("model", "scheduler", "dtype")}
    results = Results(Path(out) / "results.jsonl", FORMAT, settings)
    for i, prompt in enumerate(prompts):
        for arm in arms:
            if (arm, i) not in results.entries:
                count = Video(frames=frames if arm == OURS else peer_frames)
                recipe = replace(plan, prompt=prompt, seed=seed + i, video=count)
                results.add([_entry(pipe, filled_in(recipe, pipe), weights, arm, i, Path(out), on_progress)])
    summary = {
        "settings": settings,
        "about": environment(pipe, command),
        "arms": {arm: _summary(results, arm, len(prompts), peer_frames) for arm in arms},
    }
    with written_whole(Path(out) / "summary.json") as (path,):
        path.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    compared = summary["settings"]["peer_frames"]
    lines = [
        f"| arm | frames | first frame shows | kept in the first {compared} | kept in all | alike in all | moved in the first "
        f"{compared}, in widths | s per frame |",
        "|---" * 8 + "|",
    ]
    for arm, found in summary["arms"].items():
        first = "; ".join(" and ".join(names) or "nothing" for names in found["first"])
        seconds = "-" if found["seconds"] is None else f"{found['seconds'] / found['frames']:.2f}"
        lines.append(
            f"| {arm} | {found['frames']} | {first} | {found['kept_in_first']} | {found['kept_in_all']} | {found['alike']} | "
            f"{found['travelled']:.1f} | {seconds} |"
        )
    if OURS in summary["arms"]:
        right, asked = summary["arms"][OURS]["counts"]["kept_in_all"]
        verdict = "met" if right >= GOAL * asked else "MISSED"
        lines += ["", f"{OURS} keeps {right} of {asked} frames as the first (goal: {GOAL:.0%}): {verdict}"]
    return "\n".join(lines)


def _entry(
    pipe: Any, recipe: Recipe, weights: dict[str, Any], arm: str, i: int, out: Path, on_progress: Progress | None
) -> dict[str, Any]:
    """One film, made unless it is there already, and read."""
    assert recipe.video is not None
    count, told = recipe.video.frames, on_progress or (lambda *_: None)
    path = out / f"{re.sub(r'[^a-z]+', '-', arm.lower())}-{i + 1}.mp4"
    of = {"arm": arm, "recipe": json.loads(recipe.to_json()), **weights}
    if arm == OURS:
        of["attention"] = attention_in_full(recipe.attention)
    note = path.with_suffix(".made.json")
    noted = _noted(note, of) if path.exists() else None  # films appear whole under their name
    if noted is None:
        note.unlink(missing_ok=True)  # it is of another film
        goes_on = latest(parts_folder(path)) is not None
        began = time.monotonic()
        if arm == OURS:
            long_video(recipe, path, pipe=pipe, on_step=lambda event: told(f"{arm}, step", event.step, event.steps))
        else:
            made = _free_noise_film if arm == PEER else _clips
            _write(path, made(pipe, recipe, told), recipe.video.fps, json.dumps(of))
        noted = {"of": of, "seconds": None if goes_on else time.monotonic() - began}
        with written_whole(note) as (aside,):
            aside.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    save_sheet(path, count, path.with_suffix(".png"))
    readings = []
    for frame in frames_of(path):
        readings.append([asdict(one) for one in read(frame).sprites])
        told(f"{arm}, reading frame", len(readings), count)
    if len(readings) != count:
        raise ValueError(f"{path} has {len(readings)} of {count} frames; delete it, and run this once more")
    return {"arm": arm, "sample": i, "frames": count, "seconds": noted["seconds"], "readings": readings}


def _noted(note: Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """What is noted of a film, if that is one of these settings and weights."""
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        return noted if noted["of"] == json.loads(json.dumps(of)) and "seconds" in noted else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.no_grad()
def _free_noise_film(pipe: Any, recipe: Recipe, told: Progress) -> Iterator[np.ndarray]:
    """FreeNoise as diffusers has it, all frames in one call."""
    assert recipe.video is not None and recipe.seed is not None
    with free_noise(pipe):
        yield from _called(
            pipe, recipe, recipe.video.frames, lambda step: told(f"{PEER}, step", step, recipe.steps),
            generator=torch.Generator().manual_seed(recipe.seed),
        )  # fmt: skip


@torch.no_grad()
def _clips(pipe: Any, recipe: Recipe, told: Progress) -> Iterator[np.ndarray]:
    """One stock clip after another, from the very noise that our frames have."""
    assert recipe.video is not None and recipe.seed is not None
    assert recipe.height is not None and recipe.width is not None
    total, factor = recipe.video.frames, pipe.vae_scale_factor
    shape = (pipe.unet.config.in_channels, recipe.height // factor, recipe.width // factor)
    for first in range(0, total, CONTEXT):
        span = (first, min(first + CONTEXT, total))
        noise = frame_noise(recipe.seed, span, shape).to(pipe.device, pipe.dtype)
        yield from _called(
            pipe, recipe, span[1] - span[0], latents=noise, generator=torch.Generator().manual_seed(recipe.seed + first)
        )
        told(f"{CLIPS}, frame", span[1], total)


def _called(
    pipe: Any, recipe: Recipe, frames: int, on_step: Callable[[int], None] | None = None, **more: Any
) -> Iterator[np.ndarray]:
    """The frames of one stock call, uint8, each (H, W, 3)."""

    def after(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(index + 1)
        return tensors

    pipe.set_progress_bar_config(disable=True)
    film = pipe(
        recipe.prompt, num_frames=frames, width=recipe.width, height=recipe.height, num_inference_steps=recipe.steps,
        guidance_scale=recipe.guidance, output_type="np", callback_on_step_end=after, **more,
    ).frames[0]  # fmt: skip
    for frame in film:
        yield (frame.clip(0, 1) * 255).round().astype(np.uint8)


def _write(path: Path, frames: Iterator[np.ndarray], fps: int, comment: str) -> None:
    """A film that no recipe of ours makes, whole or not at all."""
    first = next(frames)
    path.parent.mkdir(parents=True, exist_ok=True)
    film = FilmFile(partial(path), first.shape[1], first.shape[0], fps, comment)
    try:
        film.write(first)
        for frame in frames:
            film.write(frame)
    finally:
        film.close()
    if (found := frame_count(partial(path))) != film.frames:  # FFmpeg may have failed after it took all of them
        raise OSError(
            f"the film {path} has {found} of {film.frames} frames; most often the disk is full: make room, start again"
        )
    os.replace(partial(path), path)


def _judged(entry: dict[str, Any], first: int | None = None) -> Identity:
    return judge([Found(**one) for one in sprites] for sprites in entry["readings"][:first])


def _summary(results: Results, arm: str, prompts: int, compared: int) -> dict[str, Any]:
    entries = [results.entries[arm, i] for i in range(prompts)]
    whole, start = ([_judged(entry, first) for entry in entries] for first in (None, compared))
    kept = {
        name: rate(sum(one.kept.right for one in found), sum(one.kept.asked for one in found))
        for name, found in (("kept_in_first", start), ("kept_in_all", whole))
    }
    alike = rate(sum(one.alike.right for one in whole), sum(one.alike.asked for one in whole))
    seconds = [entry["seconds"] for entry in entries]
    return {
        "frames": sum(entry["frames"] for entry in entries),
        "first": [list(one.first) for one in whole],
        **{name: str(found) for name, found in kept.items()},
        "alike": str(alike),
        "counts": {name: [found.right, found.asked] for name, found in kept.items()},
        "travelled": sum(one.travelled for one in start) / prompts,
        "seconds": None if None in seconds else sum(seconds),
    }


def main(
    *,
    model: str = "tiny-video",
    out: Path = Path("out/films"),
    frames: int = 2304,
    peer_frames: int = 512,
    steps: int = 10,
    seed: int = 0,
    prompts: tuple[str, ...] = PROMPTS,
    arms: tuple[str, ...] = ARMS,
    attention: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: dual-scope; repeatable)"),
    ] = (),
    show: Path | None = None,
) -> None:
    """Make long films with three methods and tell how well each keeps what its first frame shows.

    Args:
        model: bundled name, folder or hub id of an AnimateDiff pipeline of the emoji world.
        out: folder for films, contact sheets, readings and the summary; a run that was stopped goes on in it.
        frames: of our films.
        peer_frames: of the films of the others.
        steps: of each film.
        seed: of the first film; the next ones count on.
        prompts: what the films show; each is one film for every arm.
        arms: which methods to run.
        attention: of our films, for example: --attention dual-scope anchors=8; other settings need another folder.
        show: print the table of this summary.json and make nothing.
    """
    if show is not None:
        print_table(show, table, "films")
        return
    from tqdm import tqdm

    with tqdm(disable=None) as bar:

        def told(what: str, done: int, total: int) -> None:
            bar.set_description_str(what, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        command = f"python -m reattend.emoji_world.films {shlex.join(sys.argv[1:])}".rstrip()
        try:
            summary = compare(model, out=out, frames=frames, peer_frames=peer_frames, steps=steps, seed=seed,
                              prompts=prompts, arms=arms, attention=[attention_entry(*words) for words in attention],
                              command=command, on_progress=told)  # fmt: skip
        except (ValueError, TypeError, OSError) as error:
            raise SystemExit(f"films: {error}") from None
    print(table(summary))


if __name__ == "__main__":
    tyro.cli(main)
