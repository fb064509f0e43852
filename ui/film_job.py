"""The film job behind the page: recipe -> MP4 with its contact sheet. Plain functions, no Gradio; `film_form` is the form.

A film is denoised as a whole, step by step, and written at the end, clip by clip. While it is denoised the page shows a
contact sheet of the unfinished latents; while it is written, the sheet fills with finished frames and the growing file can
be played. A film that was stopped stays in the output folder, and the same recipe goes on with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..pipelines.agreement import request_digest
from ..pipelines.checkpoint import Checkpoint, latest, parts_folder
from ..pipelines.events import Cancelled, CancelToken, StepEvent
from ..pipelines.files import free_path
from ..pipelines.film import frame_count, partial
from ..pipelines.filming import filled_in, long_video
from ..pipelines.image import preview
from ..pipelines.recipe import Recipe
from ..pipelines.sheet import contact_sheet, save_sheet, sheet_frames
from ..pipelines.videos import Video
from .film_files import kept_films
from .image_job import PREVIEW_SHARE
from .jobs import Kept, Made, Progress

SHEET_ENDING = "-sheet.png"
BESIDE = (".mp4.json", ".mp4.parts", ".partial.mp4", SHEET_ENDING)
GROWTH = 1.5  # the growing film is shown again when it has so many times as many frames: every look copies it
PREVIEW_SIDE = 96  # pixels of an unfinished frame


class FilmJob:
    """Makes films into one folder. Only the worker thread may call it.

    pipe: gives the pipeline of a model, as `ImageJob.pipe`.
    kept: the folder of `film_files` with the films and pictures that recipes name by their digests.
    """

    def __init__(
        self, out: Path, pipe: Callable[[str, str | None, Callable[[Progress], None]], Any], kept: Path
    ) -> None:
        self.out = out
        self._pipe = pipe
        self._kept = kept

    def __call__(self, recipe: Recipe, token: CancelToken, report: Callable[[Progress], None]) -> Made:
        start = time.monotonic()
        pipe = self._pipe(recipe.model, recipe.dtype, report)
        token.check()
        assert recipe.video is not None
        given: dict[str, Any] = kept_films(self._kept, recipe.video.pictures)
        if given:
            report(Progress("Reading what the film is made from"))
        recipe = filled_in(recipe, pipe, given, token)
        assert recipe.video is not None
        path = self._unfinished(recipe, pipe) or free_path(self.out, f"{recipe.prompt} {recipe.seed}", ".mp4", BESIDE)
        show = _Show(recipe, pipe, path, report)
        report(Progress("Working on the first step"))
        try:
            film = long_video(recipe, path, pipe=pipe, **given, on_step=show, cancel=token)
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
    options = " and ".join(f"--{word.replace('_', '-')}" for word in video.pictures)
    later = f"or later run reattend video --resume on {name}{f', with {options} as here' if options else ''}."
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
