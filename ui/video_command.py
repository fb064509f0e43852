"""The command that makes films: `reattend video`."""

from __future__ import annotations

import inspect
import json as json_text
import secrets
import shlex
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from ..pipelines.recipe import Recipe
from ..pipelines.videos import Video as Length
from .image_commands import Image
from .options import (
    FILE,
    NUMBER,
    OUT,
    TEXT,
    WHOLE,
    Bar,
    default,
    quiet_libraries,
)
from .ranks import TIMEOUT, Ranks, joined

DEFAULT_LENGTH = Length()
VIDEO_MODEL = "tiny-video"


@dataclass(frozen=True, kw_only=True)
class Video(Image):
    """Make a film of any length from a text, and write it as MP4 with its recipe inside and beside it.

    One process or many make the same film: torchrun --nproc-per-node 4 -m reattend.ui.cli video "..." --frames 256. A film
    that was stopped (Ctrl-C) or died goes on with --resume, also with another number of processes. Ctrl-C stops all processes
    at the next motion module, and what is done is kept; torchrun kills those that need longer than 30 seconds for it (its
    --shutdown-timeout), and then the newest checkpoint counts, which is at most five minutes and a step old.
    """

    prompt: Annotated[str | None, Positional, TEXT, arg(metavar="PROMPT", help_behavior_hint="")] = None
    """What the film shows, from its first frame on. May be left out with --recipe or --resume."""
    recipe: Annotated[Path | None, FILE, default("none")] = None
    """MP4 or JSON file that reattend wrote: make that film again. Other options change single values of it."""
    model: Annotated[str | None, TEXT, default(VIDEO_MODEL)] = None
    """Bundled name, local diffusers folder, or hub id of an AnimateDiff pipeline."""
    negative: Annotated[str | None, TEXT, default("none")] = None
    """What the film should not show."""
    frames: Annotated[int | None, WHOLE, default(f"as many as it is made from, or {DEFAULT_LENGTH.frames}")] = None
    """Frames in all."""
    fps: Annotated[int | None, WHOLE, default(DEFAULT_LENGTH.fps)] = None
    """Frames per second of the file."""
    then: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="FRAME PROMPT", help_behavior_hint="(default: none; repeatable)"),
    ] = ()
    """From this frame on the film shows something else: --then 64 "a blue balloon on sea"."""
    blend: Annotated[int | None, WHOLE, default(DEFAULT_LENGTH.blend)] = None
    """Frames over which a later prompt takes over; 0 = at once."""
    video: Annotated[Path | None, FILE, default("none")] = None
    """Film to start from, for a video-to-video model: an MP4 or a folder of pictures, one for every frame."""
    strength: Annotated[float | None, NUMBER, default("the model's own")] = None
    """How much of that film may change, above 0 up to 1."""
    conditioning_frames: Annotated[
        tuple[Path, ...],
        UseAppendAction,
        arg(metavar="PATH", help_behavior_hint="(default: none; repeatable, one for each ControlNet)"),
    ] = ()
    """What the ControlNet of the model follows: an MP4 or a folder of pictures, one for every frame."""
    controlnet_conditioning_scale: Annotated[float | None, NUMBER, default("the model's own")] = None
    """How closely the ControlNet is followed."""
    pag_scale: Annotated[float | None, NUMBER, default("the model's own")] = None
    """Weight of perturbed-attention guidance, for a model with that."""
    attention: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: dual-scope; repeatable)"),
    ] = ()
    """Attention to use, for example: --attention dual-scope anchors=8 --attention agent ratio=0.4"""
    clip: int = 16
    """Frames on the device at a time; less takes less memory. Changes nothing in the film."""
    out: Path = OUT
    """Folder, or name of an MP4 file."""
    sheet: Annotated[Path | None, FILE, default("none")] = None
    """PNG file for a contact sheet as well: frames from all over the film in a grid, each with its number."""
    resume: Annotated[Path | None, FILE, default("none")] = None
    """Name of a film that was not finished: go on with it, by the options it was begun with."""
    timeout: Annotated[float, NUMBER, default(f"{TIMEOUT.total_seconds():g}")] = TIMEOUT.total_seconds()
    """Seconds after which a process that does not answer counts as lost; under torchrun."""

    def run(self) -> None:
        """Make the film. Raises ValueError or TypeError for bad input, as early as possible."""
        from ..pipelines.events import Cancelled, CancelToken, stoppable
        from ..pipelines.files import check_writable, free_path
        from ..pipelines.film import check_film_path
        from ..pipelines.sheet import save_sheet

        recipe, out = self.unfinished() if self.resume is not None else (self.to_recipe(), self.out)
        named = out.suffix != ""
        if named:
            check_film_path(out)
        for name, value in (("clip", self.clip), ("timeout", self.timeout)):
            if value <= 0:
                raise ValueError(f"--{name} must be more than 0, got {value}")
        check_writable(out)
        if self.sheet is not None:
            if self.sheet.suffix.lower() != ".png":
                raise ValueError(f"the contact sheet is written as PNG: got {str(self.sheet)!r}; end its name in .png")
            check_writable(self.sheet)
        began, token = time.monotonic(), CancelToken()
        quiet_libraries()
        from ..pipelines import load, long_video

        with joined(self.device, self.timeout) as ranks:
            recipe = ranks.seeded(recipe)
            if recipe.seed is None:
                recipe = replace(recipe, seed=secrets.randbelow(2**32))
            path = ranks.agreed(str(out if named else free_path(out, f"{recipe.prompt} {recipe.seed}", ".mp4")))
            pipe = load(recipe.model, device=ranks.device(self.device), dtype=recipe.dtype)
            self._check_frames(recipe, pipe)
            try:
                with stoppable(token, partial(_keeping, ranks)), Bar(silent=not ranks.speaks) as bar:
                    film = long_video(
                        recipe, path, pipe=pipe, **self._pictures(), clip=self.clip, on_step=bar, cancel=token
                    )
            except Cancelled:
                if ranks.speaks:
                    kept = Path(f"{path}.parts").exists()
                    again = shlex.join(["reattend", "video", "--resume", path, *self._picture_options()])
                    more = f"; what is done is kept: {again}" if kept else ""
                    print(f"reattend: stopped{more}", file=sys.stderr)
                raise SystemExit(130) from None
        if not ranks.speaks:
            return
        seconds = time.monotonic() - began
        frames = film.recipe.video.frames if film.recipe.video else 0
        if self.sheet is not None:
            save_sheet(film.path, frames, self.sheet)
        if self.json:
            made = {"film": path, "recipe_file": f"{path}.json", "seconds": round(seconds, 3), "sent": film.sent}
            made |= {} if self.sheet is None else {"sheet": str(self.sheet)}
            print(json_text.dumps({**made, "recipe": json_text.loads(film.recipe.to_json())}))
        else:
            print(f"{path}  (seed {film.recipe.seed}, {frames} frames, {seconds:.1f} s)")
            if self.sheet is not None:
                print(f"{self.sheet}  (contact sheet)")

    def to_recipe(self) -> Recipe:
        """The recipe of `--recipe` or the default one, with the options that were given, and its length."""
        given: dict[str, Any] = {"attention": self._attention()} if self.attention else {}
        if self.model is None and self.recipe is None:
            given["model"] = VIDEO_MODEL
        recipe = self._recipe(given)
        names = ("frames", "fps", "blend", "strength", "controlnet_conditioning_scale", "pag_scale")
        length = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.then:
            length["later"] = tuple(_later(words) for words in self.then)
        video, given = recipe.video or DEFAULT_LENGTH, self._pictures()
        if given:
            from ..pipelines.film_pictures import count_of

            word, paths = next(iter(given.items()))
            path = paths[0] if isinstance(paths, list) else paths
            if not video.controlnet_frame_indices:  # else they are for a few frames
                length = {"frames": count_of(f"--{word.replace('_', '-')}", path)} | length
            length["pictures"] = {word: digest for word, digest in video.pictures.items() if word not in given}
        return replace(recipe, upscale=None, video=replace(video, **length))

    def _pictures(self) -> dict[str, Any]:
        """The pictures that were given, as arguments of `long_video`."""
        rows = list(self.conditioning_frames)
        given = {"video": self.video, "conditioning_frames": rows[0] if len(rows) == 1 else rows or None}
        return {word: value for word, value in given.items() if value is not None}

    def _picture_options(self) -> list[str]:
        """The pictures that were given, as they were typed."""
        rows = [("--video", self.video), *(("--conditioning-frames", row) for row in self.conditioning_frames)]
        return [word for option, path in rows if path is not None for word in (option, str(path))]

    def _check_frames(self, recipe: Recipe, pipe: Any) -> None:
        """Raise ValueError if pictures for a few frames would say how long the film is."""
        known = self.frames is not None or (recipe.video is not None and recipe.video.controlnet_frame_indices)
        if not known and "controlnet_frame_indices" in inspect.signature(pipe.__call__).parameters:
            raise ValueError(
                f"{type(pipe).__name__} takes pictures for a few frames, which do not tell how long the film is; give "
                "--frames"
            )

    def unfinished(self) -> tuple[Recipe, Path]:
        """The recipe of the film of `--resume`, and its path."""
        from ..pipelines.checkpoint import latest, parts_folder

        assert self.resume is not None
        free = ["resume", "clip", "device", "timeout", "json", "sheet"]  # change nothing in the film
        free += ["video", "conditioning_frames"]  # are not kept with it
        options = [option for option in fields(self) if option.name not in free]
        given = [option.name for option in options if getattr(self, option.name) != option.default]
        if given:
            raise ValueError(f"--resume goes on with a film as it was begun; leave out {', '.join(given)}")
        found = latest(parts_folder(self.resume))
        if found is None:
            raise ValueError(
                f"there is no unfinished film {self.resume}: {parts_folder(self.resume)} holds no checkpoint"
            )
        return Recipe.from_json(json_text.dumps(found.manifest["recipe"])), self.resume


def _later(words: tuple[str, ...]) -> tuple[int, str]:
    """A later prompt as it is typed. Raises ValueError."""
    if len(words) != 2 or not words[0].isdecimal():
        raise ValueError(
            f'--then cannot read {" ".join(words)!r}: write --then FRAME PROMPT, as in --then 64 "a blue car"'
        )
    return int(words[0]), words[1]


def _keeping(ranks: Ranks, asked: signal.Signals) -> None:
    if not ranks.speaks:
        return
    if asked == signal.SIGINT:
        said = "stopping and keeping what is done; Ctrl-C once more stops at once"
    else:  # also torchrun's to those that are left when one process is gone
        said = "asked to end; what is done is kept where all processes are still there"
    print(f"\nreattend: {said}", file=sys.stderr)
