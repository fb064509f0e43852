"""The commands behind `reattend`: frozen dataclasses whose fields are the options and whose `run` does the work.

Everything heavy is imported inside `run`, so that `reattend --help` answers at once. Defaults come from `Recipe`; an
option that is not given leaves the recipe's value alone, which is what lets `--recipe` and single options combine.
"""

from __future__ import annotations

import json as json_text
import secrets
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from ..pipelines.recipe import Recipe
from ..pipelines.stages import Upscale as Growth
from ..pipelines.videos import Video as Length
from .distill_commands import Distill
from .options import (
    FILE,
    NUMBER,
    OUT,
    TEXT,
    WHOLE,
    Bar,
    attention_entry,
    default,
    quiet_libraries,
    read_size,
    stoppable,
)
from .ranks import TIMEOUT, joined
from .story_command import Story

__all__ = ["Command"]

DEFAULT_RECIPE = Recipe(prompt="-")
DEFAULT_GROWTH = Growth()
DEFAULT_LENGTH = Length()
VIDEO_MODEL = "tiny-video"


@dataclass(frozen=True, kw_only=True)
class Image:
    """Make a picture from a text, and write it as PNG with its recipe inside and beside it."""

    prompt: Annotated[str | None, Positional, TEXT, arg(metavar="PROMPT", help_behavior_hint="")] = None
    """What the picture shows. May be left out with --recipe."""
    recipe: Annotated[Path | None, FILE, default("none")] = None
    """PNG or JSON file that reattend wrote: make that picture again. Other options change single values of it."""
    model: Annotated[str | None, TEXT, default(DEFAULT_RECIPE.model)] = None
    """Bundled name, local diffusers folder, or hub id."""
    negative: Annotated[str | None, TEXT, default("none")] = None
    """What the picture should not show."""
    width: Annotated[int | None, WHOLE, default("the model's own")] = None
    """In pixels, a multiple of 8."""
    height: Annotated[int | None, WHOLE, default("the model's own")] = None
    """In pixels, a multiple of 8."""
    steps: Annotated[int | None, WHOLE, default(DEFAULT_RECIPE.steps)] = None
    """Denoising steps; more = slower and finer."""
    guidance: Annotated[float | None, NUMBER, default("the model's own")] = None
    """How strongly the prompt is followed."""
    seed: Annotated[int | None, WHOLE, default("drawn, and told")] = None
    """The only source of chance."""
    attention: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: stock; repeatable)"),
    ] = ()
    """Attention to use in place of the stock one, for example: --attention agent ratio=0.4"""
    linear: Annotated[Path | None, FILE, default("none")] = None
    """Folder of a trained linear student (`reattend distill run`), in place of --attention."""
    out: Path = OUT
    """Folder, or name of a PNG file."""
    device: Annotated[str | None, TEXT, default("the first of cuda, mps, cpu")] = None
    """Where to compute."""
    dtype: Annotated[str | None, TEXT, default("float32 on a CPU, 16 bits on CUDA")] = None
    """Numbers to compute in: float32, float16 or bfloat16."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Make the picture, in one go or in stages. Raises ValueError or TypeError for bad input, as early as possible."""
        from ..pipelines.files import check_writable, free_path

        recipe = self.to_recipe()
        named = self.out.suffix != ""
        if named and self.out.suffix.lower() != ".png":
            raise ValueError(
                f"--out {self.out} is no PNG file: pictures are written as PNG; give a name ending in .png, or a folder"
            )
        check_writable(self.out)
        began = time.monotonic()
        quiet_libraries()  # before the imports: some of their notices come with those
        from ..pipelines import generate, load, upscale
        from ..pipelines.picture import size_endings

        make = generate if recipe.upscale is None else upscale
        with joined() as ranks:
            pipe = load(recipe.model, device=ranks.device(self.device), dtype=recipe.dtype)
            with Bar(silent=not ranks.speaks) as bar:
                picture = make(ranks.seeded(recipe), pipe=pipe, on_step=bar, split=ranks.split)
        if not ranks.speaks:
            return
        words = f"{recipe.prompt} {picture.recipe.seed}"
        path = self.out if named else free_path(self.out, words, ".png", size_endings(picture))
        *smaller, (image, sidecar) = picture.save(path)
        seconds = time.monotonic() - began
        if self.json:
            made = {"image": str(image), "recipe_file": str(sidecar), "seconds": round(seconds, 3)}
            made |= {"smaller": [str(file) for file, _ in smaller]} if recipe.upscale else {}
            print(json_text.dumps({**made, "recipe": json_text.loads(picture.recipe.to_json())}))
        else:
            for file, _ in smaller:
                print(file)
            print(f"{image}  (seed {picture.recipe.seed}, {seconds:.1f} s)")

    def to_recipe(self) -> Recipe:
        """The recipe of `--recipe` or the default one, with the options that were given."""
        return self._recipe({"attention": self._attention()} if self.attention else {})

    def _recipe(self, given: dict[str, Any]) -> Recipe:
        names = ("prompt", "negative", "model", "width", "height", "steps", "guidance", "seed", "dtype")
        given |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.linear is not None:
            if not self.linear.exists():
                raise ValueError(
                    f"--linear {self.linear} is not there; give the folder of a student or its weight file"
                )
            given["linear"] = str(self.linear)
        if self.recipe is not None:
            return replace(Recipe.read(self.recipe), **given)
        if "prompt" not in given:
            raise ValueError(
                "no prompt was given: say what the picture shows, as in "
                f'reattend {type(self).__name__.lower()} "a blue car on sand"'
            )
        return Recipe(**given)

    def _attention(self) -> tuple[dict[str, str], ...]:
        return tuple(attention_entry(*words) for words in self.attention)


@dataclass(frozen=True, kw_only=True)
class Upscale(Image):
    """Make a picture and enlarge it in stages, each of which adds detail; write every size as PNG with its recipe.

    Start from a text, from the recipe of a picture that reattend made, or from any picture file (--source). Width and
    height are those of the first picture.
    """

    scale: Annotated[float | None, NUMBER, default(f"{DEFAULT_GROWTH.scale:g}")] = None
    """How many times wider and higher, above 1 up to 16; in stages of at most 2."""
    size: Annotated[
        tuple[str, ...],
        UseAppendAction,
        arg(metavar="WIDTHxHEIGHT", help_behavior_hint="(default: what --scale says; repeatable)"),
    ] = ()
    """Size of a later stage in pixels, in place of --scale: --size 1024x768 --size 2048x1536"""
    strength: Annotated[float | None, NUMBER, default(DEFAULT_GROWTH.strength)] = None
    """How much a stage may change the picture, above 0 up to 1; less stays closer to it, more adds detail."""
    later_steps: Annotated[int | None, WHOLE, default("as --steps")] = None
    """Denoising steps of a later stage at strength 1."""
    attention: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: that of --recipe, or stock; repeatable)"),
    ] = ()
    """Attention of the later stages, for example: --attention agent ratio=0.4"""
    shift: Annotated[float | None, NUMBER, default("the model's own")] = None
    """Noise shift of the later stages, for models with a flow-matching scheduler; more changes the picture more."""
    rope_theta_scale: Annotated[float | None, NUMBER, default("10 from twice the model's own size on, else 1")] = None
    """Factor on the base of the rotary embedding in the later stages; more works against repeated motifs."""
    tile_from: Annotated[int | None, WHOLE, default(DEFAULT_GROWTH.tile_from)] = None
    """Pixels of the longer side from which the VAE works in tiles, which takes less memory."""
    source: Annotated[Path | None, FILE, default("none")] = None
    """Picture file to enlarge, in place of a first picture; the prompt says what it shows."""

    def to_recipe(self) -> Recipe:
        """The recipe of `--recipe` or the default one, with the options that were given, and how its picture grows."""
        recipe = self._recipe({})
        names = {"strength": "strength", "steps": "later_steps", "shift": "shift", "tile_from": "tile_from"}
        names |= {"rope_theta_scale": "rope_theta_scale"}
        given: dict[str, Any] = {
            name: getattr(self, option) for name, option in names.items() if getattr(self, option) is not None
        }
        if self.attention:
            given["attention"] = self._attention()
        if self.scale is not None or self.size:
            given |= {"scale": self.scale, "sizes": tuple(read_size(text) for text in self.size)}
        if self.source is not None:
            given["source"] = str(self.source)
            recipe = replace(recipe, width=self.width, height=self.height)  # those of --recipe are of its own picture
        return replace(recipe, upscale=replace(recipe.upscale or DEFAULT_GROWTH, **given))


@dataclass(frozen=True, kw_only=True)
class Video(Image):
    """Make a film of any length from a text, and write it as MP4 with its recipe inside and beside it.

    One process or many make the same film: torchrun --nproc-per-node 4 -m reattend.ui.cli video "..." --frames 256. A film
    that was stopped (Ctrl-C) or died goes on with --resume, also with another number of processes.
    """

    prompt: Annotated[str | None, Positional, TEXT, arg(metavar="PROMPT", help_behavior_hint="")] = None
    """What the film shows, from its first frame on. May be left out with --recipe or --resume."""
    recipe: Annotated[Path | None, FILE, default("none")] = None
    """MP4 or JSON file that reattend wrote: make that film again. Other options change single values of it."""
    model: Annotated[str | None, TEXT, default(VIDEO_MODEL)] = None
    """Bundled name, local diffusers folder, or hub id of an AnimateDiff pipeline."""
    negative: Annotated[str | None, TEXT, default("none")] = None
    """What the film should not show."""
    frames: Annotated[int | None, WHOLE, default(DEFAULT_LENGTH.frames)] = None
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
    resume: Annotated[Path | None, FILE, default("none")] = None
    """Name of a film that was not finished: go on with it. All other options are those it was begun with."""
    timeout: Annotated[float, NUMBER, default(f"{TIMEOUT.total_seconds():g}")] = TIMEOUT.total_seconds()
    """Seconds after which a process that does not answer counts as lost; under torchrun."""

    def run(self) -> None:
        """Make the film. Raises ValueError or TypeError for bad input, as early as possible."""
        from ..pipelines.events import Cancelled, CancelToken
        from ..pipelines.files import check_writable, free_path
        from ..pipelines.film import check_film_path

        recipe, out = self.unfinished() if self.resume is not None else (self.to_recipe(), self.out)
        named = out.suffix != ""
        if named:
            check_film_path(out)
        for name, value in (("clip", self.clip), ("timeout", self.timeout)):
            if value <= 0:
                raise ValueError(f"--{name} must be more than 0, got {value}")
        check_writable(out)
        began, token = time.monotonic(), CancelToken()
        quiet_libraries()
        from ..pipelines import load, long_video

        with joined(self.timeout) as ranks:
            recipe = ranks.seeded(recipe)
            if recipe.seed is None:
                recipe = replace(recipe, seed=secrets.randbelow(2**32))
            path = ranks.agreed(str(out if named else free_path(out, f"{recipe.prompt} {recipe.seed}", ".mp4")))
            pipe = load(recipe.model, device=ranks.device(self.device), dtype=recipe.dtype)
            try:
                with stoppable(token, speaks=ranks.speaks), Bar(silent=not ranks.speaks) as bar:
                    film = long_video(recipe, path, pipe=pipe, clip=self.clip, on_step=bar, cancel=token)
            except Cancelled:
                if ranks.speaks:
                    kept = Path(f"{path}.parts").exists()
                    more = f"; what is done is kept: reattend video --resume {path}" if kept else ""
                    print(f"reattend: stopped{more}", file=sys.stderr)
                raise SystemExit(130) from None
        if not ranks.speaks:
            return
        seconds = time.monotonic() - began
        if self.json:
            made = {"film": path, "recipe_file": f"{path}.json", "seconds": round(seconds, 3), "sent": film.sent}
            print(json_text.dumps({**made, "recipe": json_text.loads(film.recipe.to_json())}))
        else:
            frames = film.recipe.video.frames if film.recipe.video else 0
            print(f"{path}  (seed {film.recipe.seed}, {frames} frames, {seconds:.1f} s)")

    def to_recipe(self) -> Recipe:
        """The recipe of `--recipe` or the default one, with the options that were given, and its length."""
        given: dict[str, Any] = {"attention": self._attention()} if self.attention else {}
        if self.model is None and self.recipe is None:
            given["model"] = VIDEO_MODEL
        recipe = self._recipe(given)
        length = {name: getattr(self, name) for name in ("frames", "fps", "blend") if getattr(self, name) is not None}
        if self.then:
            length["later"] = tuple(_later(words) for words in self.then)
        return replace(recipe, upscale=None, video=replace(recipe.video or DEFAULT_LENGTH, **length))

    def unfinished(self) -> tuple[Recipe, Path]:
        """The recipe of the film of `--resume`, and its path."""
        from ..pipelines.checkpoint import latest, parts_folder

        assert self.resume is not None
        given = [
            name for name in ("prompt", "recipe", "model", "frames", "seed", "steps") if getattr(self, name) is not None
        ]
        if given:
            raise ValueError(f"--resume goes on with a film as it was begun; leave out {', '.join(given)}")
        found = latest(parts_folder(self.resume))
        if found is None:
            raise ValueError(
                f"there is no unfinished film {self.resume}: {parts_folder(self.resume)} holds no checkpoint"
            )
        return Recipe.from_json(json_text.dumps(found.manifest["recipe"])), self.resume


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Count how often pictures show what their captions say: stock attention and others, same captions, same seeds.

    A run that was stopped goes on where it was when it is started again with the same options.
    """

    model: str = DEFAULT_RECIPE.model
    """Bundled name, local diffusers folder, or hub id of a model of the emoji world."""
    attention: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: stock alone; repeatable)"),
    ] = ()
    """Attention to compare with the stock one, for example: --attention agent ratio=0.4; each one is an arm of its own."""
    tomesd: Annotated[float | None, NUMBER, arg(metavar="RATIO", help_behavior_hint="(default: none)")] = None
    """Compare with the package tomesd (token merging) at this ratio, too."""
    samples: int = 500
    """Held-out captions."""
    steps: int = DEFAULT_RECIPE.steps
    """Denoising steps."""
    guidance: Annotated[float | None, NUMBER, default("the model's own")] = None
    """How strongly the caption is followed."""
    seed: int = 0
    """Chooses captions and noise."""
    batch: int = 20
    """Pictures in one call; more = faster and more memory."""
    out: Path = OUT / "evaluate"
    """Folder for results, summary and a contact sheet."""
    device: Annotated[str | None, TEXT, default("the first of cuda, mps, cpu")] = None
    """Where to compute."""
    dtype: Annotated[str | None, TEXT, default("float32 on a CPU, 16 bits on CUDA")] = None
    """Numbers to compute in: float32, float16 or bfloat16."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Evaluate. Raises ValueError or TypeError for bad input."""
        from ..pipelines.files import check_writable

        # What `Recipe` checks is checked by it: attention, steps, guidance, seed.
        checked = replace(DEFAULT_RECIPE, steps=self.steps, guidance=self.guidance, seed=self.seed)
        attention = [attention_entry(*words) for words in self.attention]
        recipes = [replace(checked, attention=(entry,)) for entry in attention]
        if self.tomesd is not None and not 0 <= self.tomesd < 1:
            raise ValueError(
                f"--tomesd is out of range: got {self.tomesd}, need 0 <= ratio < 1; it is the share merged"
            )
        check_writable(self.out)
        from tqdm import tqdm

        from ..emoji_world.evaluate import Arm, evaluate, tomesd_arm
        from ..pipelines.load import load

        quiet_libraries()
        names = ["-".join(words).replace("=", "-") for words in self.attention]
        arms = [Arm(name="stock")]
        arms += [Arm(name=name, attention=made.attention) for name, made in zip(names, recipes, strict=True)]
        arms += [tomesd_arm(self.tomesd)] if self.tomesd is not None else []
        pipe = load(self.model, device=self.device, dtype=self.dtype)
        with tqdm(unit="picture", file=sys.stderr, disable=None, leave=False) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found = evaluate(
                pipe, arms, out=self.out, samples=self.samples, steps=self.steps, guidance=self.guidance, seed=self.seed,
                batch=self.batch, command=" ".join(["reattend", *sys.argv[1:]]), on_progress=show,
            )  # fmt: skip
        print(found.to_json() if self.json else found)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed and memory against stock attention and against what one would use instead."""

    what: Positional[Literal["agent", "clear", "video", "distill"]]
    """What to measure: agent attention in the UNet of Stable Diffusion 1.5, CLEAR in a block of FLUX, films of up to 1,024
    frames, or a step of the trainer; random weights."""
    minutes: float = 20.0
    """Time limit; rounds that would not fit are left out."""
    quick: bool = False
    """Tiny sizes: tries everything in seconds and says nothing about speed."""
    out: Annotated[Path | None, FILE, default("none")] = None
    """JSON file to write as well."""
    show: Annotated[Path | None, FILE, default("none")] = None
    """JSON file of an earlier run of clear: print its short table and measure nothing."""
    device: Annotated[str | None, TEXT, default("cuda if there is one, else cpu")] = None
    """Where to compute."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Measure. Raises ValueError for bad input."""
        from ..bench import agent, clear, distill, video
        from ..pipelines.files import check_writable
        from ..pipelines.load import find_device

        if self.show is not None:
            if self.what != "clear":
                raise ValueError(f"--show reads results of clear, got the benchmark {self.what}; leave it out")
            print(clear.show(self.show))
            return
        if self.out is not None:
            check_writable(self.out)
        device = None if self.device is None else str(find_device(self.device))
        run = {"agent": agent.run, "clear": clear.run, "video": video.run, "distill": distill.run}[self.what]
        run(minutes=self.minutes, quick=self.quick, json=self.json, out=self.out, device=device)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Tell versions, devices, which attention backends work here (each is tried), and what to install."""

    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        quiet_libraries()
        from .doctor import examine, table

        found = examine()
        print(json_text.dumps(found) if self.json else table(found))


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Open the page in a browser. Only this machine can reach it unless --share or --host say otherwise."""

    model: Annotated[str | None, TEXT, default("the bundled ones")] = None
    """Local diffusers folder or hub id to offer besides the bundled models."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs --password."""
    port: Annotated[int | None, WHOLE, default("the first free one from 7860")] = None
    """Port to listen on."""
    share: bool = False
    """Make a public link for others. Needs --password."""
    password: Annotated[str | None, TEXT, default("none")] = None
    """What visitors must type."""
    out: Path = OUT
    """Folder for pictures; the only one the page can read."""
    no_browser: bool = False
    """Do not open a browser window."""

    def run(self) -> None:
        from .page import launch

        launch(
            model=self.model, host=self.host, port=self.port, share=self.share, password=self.password, out=self.out,
            open_browser=not self.no_browser,
        )  # fmt: skip


def _later(words: tuple[str, ...]) -> tuple[int, str]:
    """A later prompt as it is typed. Raises ValueError."""
    if len(words) != 2 or not words[0].isdecimal():
        raise ValueError(
            f'--then cannot read {" ".join(words)!r}: write --then FRAME PROMPT, as in --then 64 "a blue car"'
        )
    return int(words[0]), words[1]


Command = (
    Annotated[Image, subcommand("image")]
    | Annotated[Upscale, subcommand("upscale")]
    | Annotated[Distill, subcommand("distill")]
    | Annotated[Story, subcommand("story")]
    | Annotated[Video, subcommand("video")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Ui, subcommand("ui")]
)
