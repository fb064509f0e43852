"""Do characters stay themselves over a story? Stock attention, isolation, references and what repositioning adds.

    python -m reattend.emoji_world.stories --out out/stories

Every story has three panels; their captions name kinds and places, never tints. Each character's tint is in what it says
of itself (`looks`) and in its reference picture alone. The reader says what a panel shows. All arms make the same
stories from the same seeds, with the characters where the reader saw them in the stock pictures. Readings go to
`results.jsonl` story by story, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..attn_processors import installed
from ..pipelines.files import written_whole
from ..pipelines.load import load
from ..pipelines.script import Panel, Script
from ..pipelines.stories import USUAL, USUAL_UNET, story
from ..pipelines.told import Story, strip
from .evaluate import environment, fingerprint, reader_digest
from .rates import difference, rate
from .read import Reading, read
from .results import Results
from .sampled_tokens import SampledTokens
from .tales import MEASURES, PANELS, Tale, judge, sample_tales, tint_of

__all__ = ["ARMS", "compare", "table"]

FORMAT = "reattend stories 1"
EVERY_THIRD = 3  # some arms make every third story only
OFF: dict[str, Any] = {"isolate": None, "text_mix": 0.0}
# Settings of the processor; "strength" is the story's. None: another method, see `compare`.
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": {**OFF, "strength": 0.0},
    "isolation": {"strength": 0.0, "text_mix": 0.0},
    "own words": {"strength": 0.0},  # isolation, and each subject reads the caption with itself in its own words
    "references": {**OFF, "reposition": "plain"},
    "both": {"text_mix": 0.0, "reposition": "plain"},
    "both + reposition": {"text_mix": 0.0},
    "mass only": {"text_mix": 0.0, "reposition": "plain", "mass": 1.0},
    "all": {},  # own words, isolation, repositioned references: what `story` does for subjects with all of these
    "position only": {"text_mix": 0.0, "mass": -1.0},  # resampled, and the weight that this brings taken away
    "sampled tokens": None,
}
THIRD = ("position only", "sampled tokens")


def compare(
    model: Any,
    *,
    out: Path,
    pairs: int = 60,
    triples: int = 30,
    steps: int = 10,
    seed: int = 0,
    arms: Sequence[str] = tuple(ARMS),
    command: str = "",
    on_progress: Any = None,
) -> dict[str, Any]:
    """Make every story with every arm and judge it. Goes on from `out` if it holds results of the same settings.

    Args:
        model: a loaded pipeline of the emoji world, or what `load` takes.
        out: folder of `results.jsonl`, `summary.json`, and a strip of the first stories for each arm.
        pairs, triples: stories of two and of three characters.
        arms: names from ARMS; "stock" is always among them. "sampled tokens" is for
            UNets and left out elsewhere.
        on_progress: called with stories done and in all.

    Returns:
        What `summary.json` holds: per arm the rates with 95 % intervals and differences to stock over the same stories.

    Raises:
        ValueError: an unknown arm, no story, or `out` holds results of other settings.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"there is no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if pairs + triples < 1 or min(pairs, triples) < 0:
        raise ValueError(f"got {pairs} pairs and {triples} triples, need at least one story")
    pipe = load(model) if isinstance(model, (str, Path)) else model
    unet = getattr(pipe, "unet", None) is not None
    chosen = ["stock", *(arm for arm in arms if arm != "stock" and (unet or ARMS[arm] is not None))]
    settings = {
        "pairs": pairs, "triples": triples, "steps": steps, "seed": seed, "model": fingerprint(pipe),
        "reader": reader_digest(), "arms": {arm: ARMS[arm] for arm in chosen},
        "usual": {**USUAL, **(USUAL_UNET if unet else {})},
    }  # fmt: skip
    results = Results(Path(out) / "results.jsonl", FORMAT, settings)
    tales = sample_tales(seed, pairs, triples)
    work = [(i, arm) for i in range(len(tales)) for arm in chosen if arm not in THIRD or i % EVERY_THIRD == 0]
    for done, (i, arm) in enumerate(work):
        if (arm, i) not in results.entries:
            results.add([_made(pipe, tales[i], i, arm, steps, results, Path(out))])
        if on_progress is not None:
            on_progress(done + 1, len(work))
    summary = {"settings": settings, "about": environment(pipe, command), "arms": _summary(results, tales, chosen)}
    with written_whole(Path(out) / "summary.json") as (path,):
        path.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table: rates in percent with 95 % intervals, mean move in shares of the side."""
    lines = [f"| arm | stories | {' | '.join(MEASURES)} | moves |", "|---" * (len(MEASURES) + 3) + "|"]
    for arm, found in summary["arms"].items():
        cells = [found["rates"][measure] for measure in MEASURES]
        moves = "-" if found["moves"] is None else f"{found['moves']:.2f}"
        lines.append(f"| {arm} | {found['stories']} | {' | '.join(cells)} | {moves} |")
    return "\n".join(lines)


def _made(pipe: Any, tale: Tale, i: int, arm: str, steps: int, results: Results, out: Path) -> dict[str, Any]:
    """One story by one arm, read and judged."""
    if arm == "stock":
        made = _story(pipe, tale.script(steps), arm, rehearse=True)
        script = made.script
    else:
        script = Script.from_json(results.entries["stock", i]["script"])
        made = _story(pipe, script, arm)
    panels = [read(made.panels[number]) for number in range(PANELS)]
    if arm == "stock":
        references = [read(made.references[subject.name]) for subject in script.subjects]
        tints = [tint_of(tale.characters[j], reading) for j, reading in enumerate(references)]
    else:  # references never see panels: those of the stock model, read once
        tints = results.entries["stock", i]["tints"]
    places = [_centres(script, panel) for panel in script.panels]
    judged = judge(tale, tints, panels, places)
    if i < 6:
        pictures = [*(made.references[one.name] for one in script.subjects if one.name in made.references),
                    *(made.panels[number] for number in range(PANELS))]  # fmt: skip
        with written_whole(out / f"{re.sub(r'[^a-z]+', '-', arm)}-{i + 1}.png") as (path,):
            strip(pictures).save(path, "PNG")
    entry = {"arm": arm, "sample": i, "counts": judged, "readings": [asdict(reading) for reading in panels]}
    return entry | ({"script": script.to_json(), "tints": tints} if arm == "stock" else {})


def _story(pipe: Any, script: Script, arm: str, rehearse: bool = False) -> Story:
    settings = ARMS[arm]
    if settings is None:
        return _sampled(pipe, script)
    consistency = {name: value for name, value in settings.items() if name != "strength"}
    arranged = replace(script, consistency=consistency, strength=settings.get("strength", 1.0))
    if not rehearse:
        return story(arranged, pipe=pipe)
    # Stock panels, the references the stock model makes of the characters' prompts, and where everybody is in both.
    alone = tuple(Panel(prompt=one.prompt, places={}) for one in script.subjects)
    filled = story(replace(arranged, panels=(*arranged.panels, *alone)), pipe=pipe, only=[0], find=_nowhere).script
    seeds = [one.seed for one in filled.subjects]
    panels = [replace(panel, found=None) for panel in filled.panels[:PANELS]]
    alone = tuple(replace(panel, seed=seed) for panel, seed in zip(alone, seeds, strict=True))
    made = story(replace(filled, panels=(*panels, *alone), together=len(panels) + len(alone)), pipe=pipe, find=_nowhere)
    references = {one.name: made.panels[PANELS + j] for j, one in enumerate(filled.subjects)}
    subjects = tuple(replace(one, found=_place(read(references[one.name]), one.phrase, [])) for one in filled.subjects)
    placed = []
    for number, panel in enumerate(panels):
        taken: list[Any] = []
        reading = read(made.panels[number])
        placed.append(replace(panel, found={one.name: _place(reading, one.phrase, taken) for one in subjects}))
    final = replace(script, subjects=subjects, panels=tuple(placed), seed=filled.seed, guidance=filled.guidance,
                    width=filled.width, height=filled.height, dtype=filled.dtype, model=filled.model)  # fmt: skip
    return Story(script=final, panels=made.panels, references=references)


def _sampled(pipe: Any, script: Script) -> Story:
    """All rows of the story in one call, with tokens sampled between them."""
    prompts = [*(one.prompt for one in script.subjects), *(panel.prompt for panel in script.panels)]
    seeds = [*(one.seed for one in script.subjects), *(panel.seed for panel in script.panels)]
    generators = [torch.Generator("cpu").manual_seed(int(seed or 0)) for seed in seeds]
    pipe.set_progress_bar_config(disable=True)
    with installed(pipe, SampledTokens()):
        images = pipe(prompts, num_inference_steps=script.steps, generator=generators, guidance_scale=script.guidance,
                      width=script.width, height=script.height).images  # fmt: skip
    names = [one.name for one in script.subjects]
    panels = dict(enumerate(images[len(names) :]))
    return Story(script=script, panels=panels, references=dict(zip(names, images, strict=False)))


def _nowhere(picture: Any, phrases: list[str]) -> list[None]:
    return [None] * len(phrases)


def _place(reading: Reading, kind: str, taken: list[Any]) -> list[float] | None:
    """The box of the first thing of a kind that nobody has yet; things are in order from left to right."""
    one = next((sprite for sprite in reading.sprites if sprite.kind == kind and sprite not in taken), None)
    if one is None:
        return None
    taken.append(one)
    return list(one.box)


def _centres(script: Script, panel: Panel) -> list[tuple[float, float] | None]:
    boxes = [(panel.found or {}).get(one.name) for one in script.subjects]
    return [None if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes]


def _summary(results: Results, tales: Sequence[Tale], arms: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for arm in arms:
        numbers = [i for i in range(len(tales)) if (arm, i) in results.entries]
        counts = [results.entries[arm, i]["counts"] for i in numbers]
        base = [results.entries["stock", i]["counts"] for i in numbers]
        moves = [move for one in counts for move in one["moves"]]
        rates, differences = {}, {}
        for measure in MEASURES:
            ours, stock = (np.array([one[measure] for one in both], np.float64) for both in (counts, base))
            rates[measure] = str(rate(ours[:, 0], ours[:, 1]))
            if arm != "stock" and measure not in ("tint kept", "swapped"):  # asked of those present: not as often
                differences[measure] = str(difference(ours[:, 0], stock[:, 0], ours[:, 1]))
        found[arm] = {
            "stories": len(numbers), "rates": rates, "differences to stock": differences,
            "moves": sum(moves) / len(moves) if moves else None,
        }  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="tiny-sd")
    options.add_argument("--out", type=Path, default=Path("out/stories"))
    options.add_argument("--pairs", type=int, default=60)
    options.add_argument("--triples", type=int, default=30)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--arms", nargs="+", default=list(ARMS))
    given = options.parse_args(argv)
    from tqdm import tqdm

    with tqdm(unit="story", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        command = " ".join(["python -m reattend.emoji_world.stories", *(sys.argv[1:] if argv is None else argv)])
        summary = compare(given.model, out=given.out, pairs=given.pairs, triples=given.triples, steps=given.steps,
                          seed=given.seed, arms=given.arms, command=command, on_progress=show)  # fmt: skip
    print(table(summary))


if __name__ == "__main__":
    main()
