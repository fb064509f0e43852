"""The film job behind the page: form -> recipe -> MP4 with its contact sheet. Plain functions, no Gradio.

A film is denoised as a whole, step by step, and written at the end, clip by clip. While it is denoised the page shows a
contact sheet of the unfinished latents; while it is written, the sheet fills with finished frames and the growing file can
be played. A film that was stopped stays in the output folder, and the same recipe goes on with it.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import AnimateDiffPAGPipeline
from PIL import Image
from torch import Tensor

from ..attn_processors import DualScopeAttnProcessor
from ..pipelines.agreement import request_digest
from ..pipelines.checkpoint import Checkpoint, latest, parts_folder
from ..pipelines.events import Cancelled, CancelToken, StepEvent
from ..pipelines.files import free_path
from ..pipelines.film import frame_count, partial
from ..pipelines.filming import DUAL_SCOPE, filled_in, long_video
from ..pipelines.image import preview
from ..pipelines.load import bundled
from ..pipelines.recipe import Recipe
from ..pipelines.sheet import contact_sheet, save_sheet, sheet_frames
from ..pipelines.videos import NUMBERS, Video
from .attention_form import STOCK, settings_of
from .image_job import PREVIEW_SHARE, fill_form, read_form, whole
from .jobs import Kept, Made, Progress

FILMS = ("AnimateDiffPipeline", "AnimateDiffPAGPipeline", "AnimateDiffSDXLPipeline")  # from text alone
FIELDS = ("frames", "fps", "later", "blend")  # beside those of a picture
SETTINGS = settings_of(DualScopeAttnProcessor)
SHEET_ENDING = "-sheet.png"
BESIDE = (".mp4.json", ".mp4.parts", ".partial.mp4", SHEET_ENDING)
GROWTH = 1.5  # the growing film is shown again when it has so many times as many frames: every look copies it
PREVIEW_SIDE = 96  # pixels of an unfinished frame

NO_MODEL = (
    "There is no model for films here: `tiny-video` is not part of this installation, and no folder of an AnimateDiff "
    "pipeline that needs text alone was named when the page was started; start it again with `reattend ui --model FOLDER`."
)


def film_models(models: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models that may make pictures and those that may make films from text; one that is not here yet may do either."""
    kinds = {model: _pipeline_class(model) for model in models}
    films = [model for model, kind in kinds.items() if kind is None or kind in FILMS]
    return [model for model, kind in kinds.items() if kind is None or not kind.startswith("AnimateDiff")], films


def _pipeline_class(model: str) -> str | None:
    """The pipeline a model folder names; None if there is no folder, as of a hub id."""
    folder = bundled().get(model, Path(model).expanduser())
    try:
        return str(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class FilmJob:
    """Makes films into one folder. Only the worker thread may call it.

    pipe: gives the pipeline of a model, as `ImageJob.pipe`.
    """

    def __init__(self, out: Path, pipe: Callable[[str, str | None, Callable[[Progress], None]], Any]) -> None:
        self.out = out
        self._pipe = pipe

    def __call__(self, recipe: Recipe, token: CancelToken, report: Callable[[Progress], None]) -> Made:
        start = time.monotonic()
        pipe = self._pipe(recipe.model, recipe.dtype, report)
        token.check()
        recipe = filled_in(recipe, pipe)
        assert recipe.video is not None
        path = self._unfinished(recipe, pipe) or free_path(self.out, f"{recipe.prompt} {recipe.seed}", ".mp4", BESIDE)
        show = _Show(recipe, pipe, path, report)
        report(Progress("Working on the first step"))
        try:
            film = long_video(recipe, path, pipe=pipe, on_step=show, cancel=token)
        except Cancelled:
            found = latest(parts_folder(path))
            if found is None:
                raise
            raise Kept(_kept_text(found, show.written, recipe.video, path.name), recipe, show.playable()) from None
        report(Progress("Making the contact sheet"))
        sheet = path.with_name(path.stem + SHEET_ENDING)
        save_sheet(path, recipe.video.frames, sheet)
        seconds = time.monotonic() - start
        return Made(path, path.with_name(path.name + ".json"), film.recipe, seconds, sheet=sheet)

    def _unfinished(self, recipe: Recipe, pipe: Any) -> Path | None:
        """The film of this very recipe and model that was begun in the folder."""
        wanted = request_digest(recipe, pipe)
        for folder in sorted(self.out.glob("*.mp4.parts")):
            found = latest(folder)
            if found is not None and found.manifest["digest"] == wanted:
                return folder.with_name(folder.name.removesuffix(".parts"))
        return None


def _kept_text(found: Checkpoint, written: int, video: Video, name: str) -> str:
    later = f"or later run reattend video --resume on {name}."
    steps = found.manifest["recipe"]["steps"]
    if written:
        return (
            f"Stopped after {written} of {video.frames} frames were written; so much of the film plays. "
            f"Press Go on to write the rest, {later}"
        )
    return f"Stopped after step {found.step} of {steps}, which is kept. Press Go on to finish the film, {later}"


class _Show:
    """Turns the events of a film into progress with a sheet that sharpens, then fills, and a film that grows."""

    def __init__(self, recipe: Recipe, pipe: Any, path: Path, report: Callable[[Progress], None]) -> None:
        assert recipe.video is not None and recipe.width is not None and recipe.height is not None
        self.path, self.pipe, self.report = path, pipe, report
        self.size = (recipe.width, recipe.height)
        self.shown = sheet_frames(recipe.video.frames)
        self.written = 0
        self._pictures: dict[int, Image.Image] = {}
        self._next = 0.0  # time of the next preview
        self._playable: tuple[Path, int] | None = None  # the growing film when it was shown last

    def __call__(self, event: StepEvent) -> None:
        if event.frames is None:
            sheet = self._unfinished(event.latents)
            self.report(Progress("Drawing", event.step, event.steps, event.eta, sheet, "Drawing all frames"))
            return
        if not self.written:
            self._pictures = {}
        for i, frame in enumerate(event.frames, self.written):
            if i in self.shown:
                self._pictures[i] = Image.fromarray(frame)
        self.written += len(event.frames)
        self.report(
            Progress(
                "Writing",
                event.clip + 1,
                event.clips,
                event.eta,
                contact_sheet(self._pictures, self.shown, self.size),
                "Writing the film",
                "clip",
                self._grown(),
            )
        )

    def playable(self) -> Path | None:
        """The growing film, if it can be played already."""
        unfinished = partial(self.path)
        return unfinished if self.written and frame_count(unfinished) else None

    def _grown(self) -> tuple[Path, int] | None:
        """The growing film and its frames, as it was when there were enough new ones."""
        wanted = GROWTH * self._playable[1] if self._playable else 1
        if self.written >= wanted:
            found = frame_count(partial(self.path))  # FFmpeg keeps the last ones to itself for a while
            if found >= wanted:
                self._playable = (partial(self.path), found)
        return self._playable

    def _unfinished(self, latents: Tensor | None) -> Image.Image | None:
        """A sheet of unfinished latents, (1, C, F, H, W); None if one would take too much of the time."""
        start = time.monotonic()
        if latents is None or start < self._next:
            return None
        frames = latents.to(self.pipe.vae.device)[0].transpose(0, 1)
        pictures = {i: preview(frames[i : i + 1], self.pipe, PREVIEW_SIDE) for i in self.shown}
        sheet = contact_sheet(pictures, self.shown, self.size)
        end = time.monotonic()
        self._next = end + (end - start) / PREVIEW_SHARE
        return sheet


def read_film_form(form: Mapping[str, Any], models: Sequence[str]) -> Recipe:
    """The recipe the form asks for.

    Args:
        form: what `image_job.read_form` reads but the attention, FIELDS, and an entry "dual-scope.setting" for each of
            SETTINGS.
        models: the models this page offers for films.

    Raises:
        ValueError, TypeError: one sentence about the first field that cannot be used.
    """
    if not (form["prompt"] or "").strip():
        raise ValueError("The prompt is empty; say what the film should show.")
    recipe = read_form({**form, "attention": STOCK}, models)
    video = Video(
        frames=_needed("number of frames", form["frames"]),
        fps=_needed("number of frames per second", form["fps"]),
        later=_read_later(form["later"] or ""),
        blend=whole("number of frames of a change", form["blend"]) or 0,
    )
    attention = {"name": DUAL_SCOPE} | {s.name: s.read(form[f"{DUAL_SCOPE}.{s.name}"]) for s in SETTINGS}
    return replace(recipe, video=video, attention=(attention,))


def fill_film_form(recipe: Recipe, models: Sequence[str]) -> dict[str, Any]:
    """The form that asks for this recipe.

    Raises:
        ValueError, TypeError: the recipe asks for what this tab cannot do.
    """
    video = _without_usual(recipe.video)
    if video is None:
        raise ValueError("The recipe makes a picture; load it on the tab Image or Upscale.")
    others = [entry["name"] for entry in recipe.attention if entry["name"] != DUAL_SCOPE]
    if others or len(recipe.attention) > 1:
        raise ValueError(
            f"The recipe combines {' and '.join(entry['name'] for entry in recipe.attention)} attention and this page can "
            "hold dual-scope alone; use it on the command line: reattend video --recipe."
        )
    inputs = [*video.pictures, *(name for name in NUMBERS if getattr(video, name) is not None)]
    inputs += ["pag_applied_layers"] if video.pag_applied_layers else []
    if inputs:
        adapter = [name for name in inputs if name.startswith("ip_adapter")]
        where = "from Python: long_video" if adapter else "on the command line: reattend video --recipe"
        raise ValueError(f"The recipe has {(adapter or inputs)[0]}, which this page cannot show; use it {where}.")
    form = fill_form(replace(recipe, attention=(), video=None), models)
    del form["attention"]
    method: Any = DualScopeAttnProcessor()
    chosen = recipe.attention[0] if recipe.attention else method.settings()
    form |= {f"{DUAL_SCOPE}.{s.name}": s.shown(chosen[s.name]) for s in SETTINGS}
    later = "\n".join(f"{frame}: {prompt}" for frame, prompt in video.later)
    return form | {"frames": video.frames, "fps": video.fps, "later": later, "blend": video.blend}


def _without_usual(video: Video | None) -> Video | None:
    """Without perturbed-attention guidance as the pipeline has it of its own accord, which no field has to tell."""
    own = AnimateDiffPAGPipeline
    layers = inspect.signature(own.__init__).parameters["pag_applied_layers"].default
    scale = inspect.signature(own.__call__).parameters["pag_scale"].default
    if video is None or (video.pag_scale, video.pag_applied_layers) != (scale, (layers,)):
        return video
    return replace(video, pag_scale=None, pag_applied_layers=())


def _read_later(text: str) -> tuple[tuple[int, str], ...]:
    """Later prompts, one a line: "64: a blue car on sand". Raises ValueError."""
    later = []
    for line in filter(None, map(str.strip, text.splitlines())):
        frame, colon, prompt = line.partition(":")
        if not colon or not frame.strip().isdecimal():
            raise ValueError(
                f"A later prompt cannot be read: {line[:60]!r}; write the frame it begins at, a colon and the prompt, such as "
                "64: a blue car on sand."
            )
        later.append((int(frame), prompt.strip()))
    return tuple(later)


def _needed(what: str, value: Any) -> int:
    number = whole(what, value)
    if number is None:
        raise ValueError(f"The {what} is empty; give a whole number.")
    return number
