"""The commands behind `reattend`: frozen dataclasses whose fields are the options and whose `run` does the work.

Everything heavy is imported inside `run`, so that `reattend --help` answers at once. Defaults come from `Recipe`; an
option that is not given leaves the recipe's value alone, which is what lets `--recipe` and single options combine.
"""

from __future__ import annotations

import json as json_text
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from .distill_commands import Distill
from .image_commands import DEFAULT_RECIPE, Image, Upscale
from .options import (
    FILE,
    NUMBER,
    OUT,
    TEXT,
    WHOLE,
    attention_entry,
    default,
    quiet_libraries,
)
from .story_command import Story
from .video_command import Video

__all__ = ["Command"]


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

    what: Positional[Literal["agent", "clear", "story", "video", "distill"]]
    """What to measure: agent attention in the UNet of Stable Diffusion 1.5, CLEAR in a block of FLUX, subjects of a story in
    that UNet, films of up to 1,024 frames, or a step of the trainer; random weights."""
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
        from ..bench import agent, clear, distill, story, video
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
        benchmarks = {"agent": agent, "clear": clear, "story": story, "video": video, "distill": distill}
        benchmarks[self.what].run(minutes=self.minutes, quick=self.quick, json=self.json, out=self.out, device=device)


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
    runs: Path = Path("runs")
    """Folder under which trainings (`reattend distill run`) are found, to be watched."""
    no_browser: bool = False
    """Do not open a browser window."""

    def run(self) -> None:
        from .page import launch

        launch(
            model=self.model, host=self.host, port=self.port, share=self.share, password=self.password, out=self.out,
            runs=self.runs, open_browser=not self.no_browser,
        )  # fmt: skip


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
