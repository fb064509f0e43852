"""The commands behind `reattend`: frozen dataclasses whose fields are the options and whose `run` does the work.

Everything heavy is imported inside `run`, so that `reattend --help` answers at once. Defaults come from `Recipe`; an
option that is not given leaves the recipe's value alone, which is what lets `--recipe` and single options combine.
"""

from __future__ import annotations

import json as json_text
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand
from tyro.constructors import PrimitiveConstructorSpec

from ..pipelines.recipe import Recipe

if TYPE_CHECKING:
    from ..pipelines.events import StepEvent

__all__ = ["Command"]

OUT = Path("out")
DEFAULT_RECIPE = Recipe(prompt="-")


def _optional(kind: Callable[[str], Any], words: str) -> PrimitiveConstructorSpec:
    """How an option that may be left out is read: without tyro's `None` choice, and with a plain message."""

    def read(texts: list[str]) -> Any:
        try:
            return kind(texts[0])
        except ValueError:
            raise ValueError(f"got {texts[0]!r}, need {words}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, kind),  # type: ignore[arg-type]
        str_from_instance=lambda value: [str(value)],
    )


def _default(text: object) -> Any:
    return arg(help_behavior_hint=f"(default: {text})")


WHOLE = _optional(int, "a whole number")
NUMBER = _optional(float, "a number")
TEXT = _optional(str, "text")
FILE = _optional(Path, "a file")


@dataclass(frozen=True, kw_only=True)
class Image:
    """Make a picture from a text, and write it as PNG with its recipe inside and beside it."""

    prompt: Annotated[str | None, Positional, TEXT, arg(metavar="PROMPT", help_behavior_hint="")] = None
    """What the picture shows. May be left out with --recipe."""
    recipe: Annotated[Path | None, FILE, _default("none")] = None
    """PNG or JSON file that reattend wrote: make that picture again. Other options change single values of it."""
    model: Annotated[str | None, TEXT, _default(DEFAULT_RECIPE.model)] = None
    """Bundled name, local diffusers folder, or hub id."""
    negative: Annotated[str | None, TEXT, _default("none")] = None
    """What the picture should not show."""
    width: Annotated[int | None, WHOLE, _default("the model's own")] = None
    """In pixels, a multiple of 8."""
    height: Annotated[int | None, WHOLE, _default("the model's own")] = None
    """In pixels, a multiple of 8."""
    steps: Annotated[int | None, WHOLE, _default(DEFAULT_RECIPE.steps)] = None
    """Denoising steps; more = slower and finer."""
    guidance: Annotated[float | None, NUMBER, _default("the model's own")] = None
    """How strongly the prompt is followed."""
    seed: Annotated[int | None, WHOLE, _default("drawn, and told")] = None
    """The only source of chance."""
    attention: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: stock; repeatable)"),
    ] = ()
    """Attention to use in place of the stock one, for example: --attention agent ratio=0.4"""
    out: Path = OUT
    """Folder, or name of a PNG file."""
    device: Annotated[str | None, TEXT, _default("the first of cuda, mps, cpu")] = None
    """Where to compute."""
    dtype: Annotated[str | None, TEXT, _default("float32 on a CPU, 16 bits on CUDA")] = None
    """Numbers to compute in: float32, float16 or bfloat16."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Make the picture. Raises ValueError or TypeError for bad input, as early as possible."""
        from ..pipelines.files import check_writable, free_path

        recipe = self.to_recipe()
        named = self.out.suffix != ""
        if named and self.out.suffix.lower() != ".png":
            raise ValueError(
                f"--out {self.out} is no PNG file: pictures are written as PNG; give a name ending in .png, or a folder"
            )
        check_writable(self.out)
        began = time.monotonic()
        from ..pipelines.image import generate
        from ..pipelines.load import load

        _quiet_libraries()
        pipe = load(recipe.model, device=self.device, dtype=recipe.dtype)
        with _Bar() as bar:
            picture = generate(recipe, pipe=pipe, on_step=bar)
        path = self.out if named else free_path(self.out, f"{recipe.prompt} {picture.recipe.seed}", ".png")
        image, sidecar = picture.recipe.save(picture.image, path)
        seconds = time.monotonic() - began
        if self.json:
            made = {"image": str(image), "recipe_file": str(sidecar), "seconds": round(seconds, 3)}
            print(json_text.dumps({**made, "recipe": json_text.loads(picture.recipe.to_json())}))
        else:
            print(f"{image}  (seed {picture.recipe.seed}, {seconds:.1f} s)")

    def to_recipe(self) -> Recipe:
        """The recipe of `--recipe` or the default one, with the options that were given."""
        names = ("prompt", "negative", "model", "width", "height", "steps", "guidance", "seed", "dtype")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.attention:
            given["attention"] = tuple(_attention(*words) for words in self.attention)
        if self.recipe is not None:
            return replace(Recipe.read(self.recipe), **given)
        if "prompt" not in given:
            raise ValueError(
                'no prompt was given: say what the picture shows, as in reattend image "a blue car on sand"'
            )
        return Recipe(**given)


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
    guidance: Annotated[float | None, NUMBER, _default("the model's own")] = None
    """How strongly the caption is followed."""
    seed: int = 0
    """Chooses captions and noise."""
    batch: int = 20
    """Pictures in one call; more = faster and more memory."""
    out: Path = OUT / "evaluate"
    """Folder for results, summary and a contact sheet."""
    device: Annotated[str | None, TEXT, _default("the first of cuda, mps, cpu")] = None
    """Where to compute."""
    dtype: Annotated[str | None, TEXT, _default("float32 on a CPU, 16 bits on CUDA")] = None
    """Numbers to compute in: float32, float16 or bfloat16."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Evaluate. Raises ValueError or TypeError for bad input."""
        from ..pipelines.files import check_writable

        # What `Recipe` checks is checked by it: attention, steps, guidance, seed.
        checked = replace(DEFAULT_RECIPE, steps=self.steps, guidance=self.guidance, seed=self.seed)
        attention = [_attention(*words) for words in self.attention]
        recipes = [replace(checked, attention=(entry,)) for entry in attention]
        if self.tomesd is not None and not 0 <= self.tomesd < 1:
            raise ValueError(
                f"--tomesd is out of range: got {self.tomesd}, need 0 <= ratio < 1; it is the share merged"
            )
        check_writable(self.out)
        from tqdm import tqdm

        from ..emoji_world.evaluate import Arm, evaluate, tomesd_arm
        from ..pipelines.load import load

        _quiet_libraries()
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

    what: Positional[Literal["agent"]]
    """What to measure: agent attention in the UNet of Stable Diffusion 1.5, with random weights."""
    minutes: float = 20.0
    """Time limit; rounds that would not fit are left out."""
    quick: bool = False
    """A tiny UNet at tiny sizes: tries everything in seconds and says nothing about speed."""
    out: Annotated[Path | None, FILE, _default("none")] = None
    """JSON file to write as well."""
    device: Annotated[str | None, TEXT, _default("cuda if there is one, else cpu")] = None
    """Where to compute."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Measure. Raises ValueError for bad input."""
        from ..bench.agent import run
        from ..pipelines.files import check_writable
        from ..pipelines.load import find_device

        if self.out is not None:
            check_writable(self.out)
        device = None if self.device is None else str(find_device(self.device))
        run(minutes=self.minutes, quick=self.quick, json=self.json, out=self.out, device=device)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Tell versions, devices, which attention backends work here (each is tried), and what to install."""

    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        _quiet_libraries()
        from .doctor import examine, table

        found = examine()
        print(json_text.dumps(found) if self.json else table(found))


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Open the page in a browser. Only this machine can reach it unless --share or --host say otherwise."""

    model: Annotated[str | None, TEXT, _default("the bundled ones")] = None
    """Local diffusers folder or hub id to offer besides the bundled models."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs --password."""
    port: Annotated[int | None, WHOLE, _default("the first free one from 7860")] = None
    """Port to listen on."""
    share: bool = False
    """Make a public link for others. Needs --password."""
    password: Annotated[str | None, TEXT, _default("none")] = None
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


Command = (
    Annotated[Image, subcommand("image")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Ui, subcommand("ui")]
)


def _attention(name: str = "", *pairs: str) -> dict[str, str]:
    """One `--attention NAME key=value ...`; the attention itself reads the values."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(
                f"--attention {name} cannot read {pair!r}: settings are written key=value, "
                "as in --attention agent ratio=0.4, and the prompt comes before --attention"
            )
    return {"name": name, **dict(pair.split("=", 1) for pair in pairs)}


class _Bar:
    """A progress bar with the time left on stderr, fed with step events; silent where stderr is no terminal."""

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self._bar = tqdm(unit="step", file=sys.stderr, disable=None, leave=False)
        return self

    def __call__(self, event: StepEvent) -> None:
        self._bar.total = event.steps
        self._bar.update(event.step - self._bar.n)

    def __exit__(self, *problem: object) -> None:
        self._bar.close()


def _quiet_libraries() -> None:
    """Keep the libraries' bars and notices off a terminal that is ours; warnings about real trouble stay."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
