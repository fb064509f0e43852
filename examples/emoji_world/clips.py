"""Does a video model show what its caption says in every frame, and does anything move?

    python -m reattend.emoji_world.clips --model tiny-video --samples 50 --steps 20

The stock pipeline makes one clip for each of some held-out captions, as long as the clips its motion modules were trained
on, and the reader looks at every frame. Frames of one clip depend on each other, so the intervals count by clip. Readings
go to `results.jsonl` as soon as a clip is done: a run that was stopped goes on where it was, and clips can be added.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from ..pipelines.files import written_whole
from ..pipelines.filling_in import chosen_guidance, guided
from ..pipelines.load import load
from .evaluate import MEASURES, contact_sheet, environment, model_settings
from .identity import centre_of, judge, name_of
from .rates import Rate, rate
from .read import Found, Score, read, score
from .results import Results, print_table
from .world import LATTICE, sample_captions

__all__ = ["clips", "reach", "table"]

FORMAT = "reattend clips 1"
ARM = "stock"
FRAMES = 16
SHOWN, SHOWN_FRAMES = 8, 8  # clips on the contact sheet, and frames of each
MOVES = 0.75 / LATTICE  # widths: a step of the lattice, less what the reader may be off
# Words of the table -> right answers and questions about one frame.
WHOLE = "kinds and tints (frames)"
PER_FRAME: dict[str, Callable[[Score], tuple[int, int]]] = {
    WHOLE: lambda s: (int(s.sprites_right == s.sprites and s.tints_right == s.named), 1),
    **{words: MEASURES[words] for words in ("kinds (sprites)", "named tints", "background")},
}


def clips(
    model: Any,
    *,
    out: Path,
    samples: int = 50,
    steps: int = 20,
    guidance: float | None = None,
    frames: int = FRAMES,
    seed: int = 0,
    command: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Make clips and read them. Goes on from `out` if it holds results of the same settings.

    Args:
        model: a loaded AnimateDiff pipeline of the emoji world, or what `load` takes.
        out: folder of `results.jsonl`, `summary.json`, the first clips and their sheet `contact.png`.
        samples: held-out captions; clip i has the seed `seed + i`.
        steps: denoising steps.
        guidance: classifier-free guidance; None is the model's own.
        frames: of a clip.
        on_progress: called with clips done and in all.

    Returns:
        What `summary.json` holds: rates over frames, how many clips move, and how far.

    Raises:
        ValueError: bad numbers, or `out` holds results of other settings.
        RuntimeError: the model computed no pictures.
    """
    for name, value, least in (("samples", samples, 1), ("steps", steps, 1), ("frames", frames, 2)):
        if value < least:
            raise ValueError(f"{name} is {value}, need at least {least}; give a larger number")
    pipe = load(model) if isinstance(model, (str, Path)) else model
    out, guidance = Path(out), chosen_guidance(pipe, guidance)
    settings = {"frames": frames, "steps": steps, "guidance": guidance, "seed": seed, **model_settings(pipe)}
    results = Results(out / "results.jsonl", FORMAT, settings)
    captions = sample_captions(np.random.default_rng(seed), samples)
    for i, caption in enumerate(captions):
        if (ARM, i) in results.entries:
            continue
        clip = _made(pipe, caption, seed + i, frames, steps, guidance)
        if i < SHOWN:
            with written_whole(_strip_path(out, i)) as (path,):
                _strip(clip).save(path, "PNG")
        readings = [read(frame) for frame in clip]
        scores = [asdict(score(reading, caption)) for reading in readings]
        found = [[asdict(one) for one in reading.sprites] for reading in readings]
        results.add([{"arm": ARM, "sample": i, "caption": caption, "scores": scores, "readings": found}])
        if on_progress:
            on_progress(i + 1, samples)
    summary = {
        "settings": settings,
        "about": environment(pipe, command),
        "samples": samples,
        **_summary([results.entries[ARM, i] for i in range(samples)]),
    }
    sheet = contact_sheet([[_strip_path(out, i)] for i in range(min(samples, SHOWN))])
    with written_whole(out / "summary.json", out / "contact.png") as (summary_path, sheet_path):
        summary_path.write_text(json.dumps(summary, indent=2) + "\n")
        sheet.save(sheet_path, "PNG")
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table."""
    settings = summary["settings"]
    rates = {words: Rate(**found) for words, found in summary["rates"].items()}
    rows = [*rates.items(), ("moved, in widths", f"{summary['travelled']:.2f}")]
    title = f"{summary['samples']} clips of {settings['frames']} frames, {settings['steps']} steps; 95 % intervals"
    return "\n".join([title, "", "| | |", "|---|---|", *(f"| {words} | {found} |" for words, found in rows)])


def reach(readings: Iterable[Sequence[Found]]) -> float:
    """How far the thing that goes farthest gets from where it was, in picture widths; there and back counts once.

    The outer tenth of its places at either end is left out, so that one frame that was misread moves nothing.
    """
    places: dict[str, list[tuple[float, float]]] = {}
    for sprites in readings:
        for one in sprites:
            if one.kind:
                places.setdefault(name_of(one), []).append(centre_of(one))
    ends = [np.percentile(points, (10, 90), axis=0) for points in places.values()]
    return max((float(np.hypot(*(high - low))) for low, high in ends), default=0.0)


def _made(pipe: Any, caption: str, seed: int, frames: int, steps: int, guidance: float | None) -> np.ndarray:
    """One stock call: uint8, (F, H, W, 3)."""
    pipe.set_progress_bar_config(disable=True)
    values = pipe(
        caption, num_frames=frames, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np", **guided(pipe, guidance),
    ).frames[0]  # fmt: skip
    if not np.isfinite(values).all():
        raise RuntimeError("the model computed pictures that are not numbers (NaN); load it with dtype='float32'")
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _summary(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def answered(words: str, some: Sequence[dict[str, Any]]) -> Rate:
        answers = np.array([[PER_FRAME[words](Score(**one)) for one in entry["scores"]] for entry in some])
        return rate(*answers.sum(axis=1).T)  # (clips, right and asked)

    rates = {words: answered(words, entries) for words in PER_FRAME}
    by_count: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        by_count.setdefault(entry["scores"][0]["sprites"], []).append(entry)
    for count, some in sorted(by_count.items()):
        rates[f"{WHOLE}, {len(some)} clips of {count} sprite{'s' * (count > 1)}"] = answered(WHOLE, some)
    seen = [[[Found(**one) for one in sprites] for sprites in entry["readings"]] for entry in entries]
    judged = [judge(readings) for readings in seen]
    rates["as in the first frame"] = rate([one.kept.right for one in judged], [one.kept.asked for one in judged])
    rates["clips that move"] = rate(sum(reach(readings) >= MOVES for readings in seen), len(seen))
    return {
        "rates": {words: asdict(found) for words, found in rates.items()},
        "travelled": sum(one.travelled for one in judged) / len(judged),
    }


def _strip(clip: np.ndarray) -> Image.Image:
    """Frames from all over a clip, side by side."""
    shown = np.linspace(0, len(clip) - 1, min(len(clip), SHOWN_FRAMES)).round().astype(int)
    return Image.fromarray(np.concatenate(list(clip[shown]), axis=1))


def _strip_path(out: Path, i: int) -> Path:
    return out / "clips" / f"{i:03}.png"


def main(
    *,
    model: str = "tiny-video",
    out: Path = Path("out/clips"),
    samples: int = 50,
    steps: int = 20,
    guidance: float | None = None,
    seed: int = 0,
    show: Path | None = None,
) -> None:
    """Make clips from held-out captions, and tell in how many frames the reader finds what was asked for.

    Args:
        model: bundled name, folder or hub id of an AnimateDiff pipeline of the emoji world.
        out: folder for readings, the summary and a contact sheet; a run that was stopped goes on in it.
        samples: held-out captions, one clip each.
        steps: of each clip.
        guidance: how strongly the caption is followed; the model's own if left out.
        seed: chooses captions and noise.
        show: print the table of this summary.json and make nothing.
    """
    if show is not None:
        print_table(show, table, "clips")
        return
    from tqdm import tqdm

    with tqdm(unit="clip", disable=None) as bar:

        def told(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        command = " ".join(["python -m reattend.emoji_world.clips", *sys.argv[1:]])
        try:
            summary = clips(model, out=out, samples=samples, steps=steps, guidance=guidance, seed=seed, command=command,
                            on_progress=told)  # fmt: skip
        except (ValueError, RuntimeError, OSError) as error:
            raise SystemExit(f"clips: {error}") from None
    print(table(summary))


if __name__ == "__main__":
    tyro.cli(main)
