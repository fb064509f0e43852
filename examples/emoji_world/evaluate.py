"""How well a model follows captions of the emoji world, stock and with other attention, on the same captions and seeds.

Every arm makes the same pictures from held-out captions; the reader (`read.py`) says what they show. Readings go to
`results.jsonl`, one line per picture and arm, as soon as a batch is done, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..attn_processors import ATTN_PROCESSORS, installed
from ..pipelines.checks import method_of
from ..pipelines.files import written_whole
from ..pipelines.filling_in import chosen_guidance, guided
from ..pipelines.image import without_progress_bar
from ..pipelines.load import load
from .rates import Difference, Rate, difference, rate
from .read import Score, read, score
from .results import Results
from .world import sample_captions

__all__ = ["MEASURES", "Arm", "Evaluation", "evaluate", "tomesd_arm"]

FORMAT = "reattend evaluation 1"
SHOWN = 10  # pictures per arm on the contact sheet
# Words of the table -> counts of right answers and of questions for one picture.
MEASURES: dict[str, Callable[[Score], tuple[int, int]]] = {
    "kinds (pictures)": lambda s: (int(s.kinds), 1),
    "kinds (sprites)": lambda s: (s.sprites_right, s.sprites),
    "named tints": lambda s: (s.tints_right, s.named),
    "background": lambda s: (int(s.background), 1),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to run the model."""

    name: str  # letters, digits, dot, dash, underscore; names its pictures
    attention: tuple[dict[str, Any], ...] = ()  # as in `Recipe.attention`; () is stock
    patch: Callable[[Any], contextlib.AbstractContextManager] | None = field(default=None, repr=False)
    # another library's way: given the pipeline, a context manager that changes it and puts it back

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"arm name {self.name!r}: need letters, digits, dots, dashes and underscores; rename it")
        for entry in self.attention:
            if entry.get("name") not in ATTN_PROCESSORS:
                names = ", ".join(ATTN_PROCESSORS)
                raise ValueError(f"arm {self.name!r}: no attention {entry.get('name')!r}; there are {names}")

    @contextlib.contextmanager
    def inside(self, pipe: Any) -> Iterator[None]:
        """The pipeline as this arm wants it. Entered anew for each batch, so that no random state runs on."""
        methods = [method_of(entry) for entry in self.attention]
        with contextlib.ExitStack() as stack:
            if methods:
                stack.enter_context(installed(pipe, methods))
            if self.patch:
                stack.enter_context(self.patch(pipe))
            yield


def tomesd_arm(ratio: float) -> Arm:
    """Token merging as the package tomesd does it, with its own defaults and the same random choices in every batch."""

    @contextlib.contextmanager
    def patch(pipe: Any) -> Iterator[None]:
        import tomesd

        with torch.random.fork_rng():
            torch.manual_seed(0)  # tomesd starts its generator from torch's
            tomesd.apply_patch(pipe, ratio=ratio)
            try:
                yield
            finally:
                tomesd.remove_patch(pipe)

    return Arm(name=f"tomesd-{ratio:g}", patch=patch)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Rates of every arm and their differences to the first one; prints as a table."""

    settings: dict[str, Any]  # what the pictures depend on
    about: dict[str, Any]  # device, versions, command
    samples: int
    rates: dict[str, dict[str, Rate]]  # arm -> measure -> rate
    differences: dict[str, dict[str, Difference]]  # arm -> measure -> difference to the first arm

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        first = next(iter(self.rates))
        rows = [["arm", *MEASURES]]
        rows += [[arm, *map(str, rates.values())] for arm, rates in self.rates.items()]
        rows += [[f"{arm} - {first}", *map(str, found.values())] for arm, found in self.differences.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        title = (
            f"{self.samples} held-out captions, {self.settings['steps']} steps; 95 % intervals; differences in points"
        )
        return "\n".join([title, *lines])


def evaluate(
    model: Any,
    arms: Sequence[Arm],
    *,
    out: Path,
    samples: int = 500,
    steps: int = 20,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 20,
    command: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Make pictures with every arm and score them. Goes on from `out` if it holds results of the same settings.

    Args:
        model: a loaded pipeline that makes pictures from text, or what `load` takes.
        arms: what to compare; the others are compared with the first. Names must differ.
        out: folder of `results.jsonl`, `summary.json`, the first pictures of every arm and the sheet `contact.png`.
        samples: held-out captions; picture i has the seed `seed + i`, in every arm. More can be added later.
        steps: denoising steps.
        guidance: classifier-free guidance; None is the model's own.
        seed: chooses the captions and the pictures' noise.
        batch: pictures per pipeline call; more = faster and more memory. Results depend on it by rounding only.
        command: what repeats this run, for the summary.
        on_progress: called with pictures done and in all, after every batch.

    Raises:
        ValueError: bad numbers, arms with the same name, a pipeline that makes clips, or `out` holds results of other
            settings.
    """
    for name, value in (("samples", samples), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}, need at least 1; give a positive number")
    names = [arm.name for arm in arms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"got arms {names}, need at least one and no name twice; give them different names")
    pipe = load(model) if isinstance(model, (str, Path)) else model
    if "num_frames" in inspect.signature(pipe.__call__).parameters:
        raise ValueError(
            f"{type(pipe).__name__} makes clips, not pictures; look at them with python -m reattend.emoji_world.clips"
        )
    out, guidance = Path(out), chosen_guidance(pipe, guidance)
    settings = {
        "arms": [{"name": arm.name, "attention": list(arm.attention)} for arm in arms],
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        **model_settings(pipe),
    }
    results = Results(out / "results.jsonl", FORMAT, settings)
    captions = sample_captions(np.random.default_rng(seed), samples)
    total = samples * len(arms)
    for start in range(0, samples, batch):
        for arm in arms:
            missing = [i for i in range(start, min(start + batch, samples)) if (arm.name, i) not in results.entries]
            if not missing:
                continue
            with arm.inside(pipe):
                pictures = _generate(pipe, [captions[i] for i in missing], [seed + i for i in missing], steps, guidance)
            for i, picture in zip(missing, pictures, strict=True):
                if i < SHOWN:
                    with written_whole(picture_path(out, arm.name, i)) as (path,):
                        picture.save(path, "PNG")
            made = {i: (captions[i], picture) for i, picture in zip(missing, pictures, strict=True)}
            results.add(scored(arm.name, made))
            if on_progress:
                done = sum(i < samples and name in names for name, i in results.entries)
                on_progress(done, total)
    evaluation = summarized(results, settings, names, samples, environment(pipe, command))
    sheet = contact_sheet([[picture_path(out, name, i) for i in range(min(samples, SHOWN))] for name in names])
    with written_whole(out / "summary.json", out / "contact.png") as (summary_path, sheet_path):
        summary_path.write_text(evaluation.to_json() + "\n")
        sheet.save(sheet_path, "PNG")
    return evaluation


def contact_sheet(rows: Sequence[Sequence[Path]], side: int | None = None) -> Image.Image:
    """Pictures in rows, one row per arm, so that eyes can compare what the table says; `side` makes all as large."""
    pictures = [[Image.open(path).convert("RGB") for path in row] for row in rows]
    if side is not None:
        pictures = [[ImageOps.contain(picture, (side, side)) for picture in row] for row in pictures]
    width, height = pictures[0][0].width + 4, pictures[0][0].height + 4
    sheet = Image.new("RGB", (width * len(pictures[0]), height * len(pictures)), "white")
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width + 2, y * height + 2))
    return sheet


def scored(arm: str, made: dict[int, tuple[str, Image.Image]]) -> Iterator[dict[str, Any]]:
    """Pictures read and scored, as lines of results."""
    for i, (caption, picture) in made.items():
        reading = read(picture)
        found = asdict(score(reading, caption))
        yield {"arm": arm, "sample": i, "caption": caption, "score": found, "reading": asdict(reading)}


def _generate(
    pipe: Any, captions: list[str], seeds: list[int], steps: int, guidance: float | None
) -> list[Image.Image]:
    """One stock pipeline call; every picture has its own noise, whatever else is in the batch."""
    generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
    with without_progress_bar(pipe):
        values = pipe(
            captions, num_inference_steps=steps, generator=generators, output_type="np", **guided(pipe, guidance)
        ).images
    if not np.isfinite(values).all():
        raise RuntimeError("the model computed pictures that are not numbers (NaN); load it with dtype='float32'")
    return pipe.numpy_to_pil(values)


def summarized(
    results: Results, settings: dict[str, Any], names: list[str], samples: int, about: dict[str, Any]
) -> Evaluation:
    counts = {  # arm -> measure -> (samples, 2): right and asked
        arm: {
            words: np.array([measure(Score(**results.entries[arm, i]["score"])) for i in range(samples)])
            for words, measure in MEASURES.items()
        }
        for arm in names
    }
    first = counts[names[0]]
    return Evaluation(
        settings=settings,
        about=about,
        samples=samples,
        rates={arm: {words: rate(*table.T) for words, table in found.items()} for arm, found in counts.items()},
        differences={
            arm: {words: difference(found[words][:, 0], first[words][:, 0], first[words][:, 1]) for words in MEASURES}
            for arm, found in list(counts.items())[1:]
        },
    )


def picture_path(out: Path, arm: str, i: int) -> Path:
    return out / "pictures" / f"{arm}-{i:03}.png"


def digest_of(*parts: bytes | str) -> str:
    digest = hashlib.blake2s()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def reader_digest() -> str:
    """Changes with the reader, so that pictures read by two readers are never counted together."""
    files = ("world.py", "sprites.png", "templates.py", "matching.py", "read.py")
    return digest_of(*(Path(__file__).with_name(name).read_bytes() for name in files))


def model_settings(pipe: Any) -> dict[str, str]:
    """What the pictures depend on besides the arguments of a run."""
    scheduler = pipe.scheduler
    return {
        "model": fingerprint(pipe),
        "scheduler": digest_of(repr(sorted(scheduler.config.items(), key=str)).encode(), type(scheduler).__name__),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "reader": reader_digest(),
    }


def fingerprint(pipe: Any) -> str:
    """Changes with the weights: sums of every parameter of every model in the pipeline."""
    sums = [
        (part, name, weight.double().sum().item(), weight.double().abs().sum().item())
        for part, model in sorted(pipe.components.items())
        if isinstance(model, torch.nn.Module)
        for name, weight in model.named_parameters()
    ]
    return digest_of(repr(sums))


def environment(pipe: Any, command: str) -> dict[str, Any]:
    device = torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else pipe.device.type
    packages = ("reattend", "torch", "diffusers", "transformers", "numpy", "pillow")
    return {
        "command": command,
        "model": str(pipe.config.get("_name_or_path", "")),
        "pipeline": type(pipe).__name__,
        "device": device,
        "versions": {package: metadata.version(package) for package in packages},
    }
