"""`reattend distill`: samples, the training itself, and its memory before it is begun.

Under torchrun (`torchrun --nproc-per-node 8 -m reattend.ui.cli distill run ...`) all processes share the work and the first
one speaks.
"""

from __future__ import annotations

import json as json_text
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from .options import FILE, NUMBER, TEXT, WHOLE, attention_entry, default, quiet_libraries, read_size
from .ranks import joined

if TYPE_CHECKING:
    from ..distill.progress import TrainEvent

__all__ = ["Distill"]

SAMPLES, RUN = Path("runs/samples"), Path("runs/distill")
LONGEST = 86_400.0  # seconds; a rank with few shards waits until the others have made theirs
KEYS = arg(metavar="KEY=VALUE", help_behavior_hint="(default: none; repeatable)")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Make the samples a student is trained on: what the teacher makes of prompts, or encoded pictures.

    Started again with the same options it makes what is missing.
    """

    model: Annotated[str, TEXT]
    """The teacher: bundled name, local diffusers folder, or hub id."""
    prompts: Annotated[Path | None, FILE, default("none")] = None
    """Text file with a prompt on each line."""
    pictures: Annotated[Path | None, FILE, default("none")] = None
    """In place of prompts, a folder of pictures with captions: NAME.txt beside NAME.png, or metadata.jsonl."""
    samples: Annotated[int | None, WHOLE, default("one for each prompt or picture")] = None
    """How many samples; prompts are gone through again with other noise."""
    size: Annotated[
        tuple[str, ...],
        UseAppendAction,
        arg(metavar="WIDTHxHEIGHT", help_behavior_hint="(default: the model's own; repeatable)"),
    ] = ()
    """Size in pixels; several for training on several shapes."""
    steps: int = 20
    """Denoising steps of the teacher."""
    guidance: Annotated[float | None, NUMBER, default("the model's own")] = None
    """How strongly the teacher follows the prompt."""
    text_length: Annotated[int | None, WHOLE, default("the model's own")] = None
    """Text tokens that captions are padded to; short captions train faster with fewer."""
    seed: int = 0
    """The only source of chance."""
    shard: int = 256
    """Samples per file."""
    batch: int = 4
    """Samples made at once; more = faster and more memory."""
    out: Path = SAMPLES
    """Folder of the samples."""
    device: Annotated[str | None, TEXT, default("the first of cuda, mps, cpu")] = None
    """Where to compute."""
    dtype: Annotated[str | None, TEXT, default("float32 on a CPU, 16 bits on CUDA")] = None
    """Numbers to compute in: float32, float16 or bfloat16."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Make the samples. Raises ValueError or TypeError for bad input."""
        from ..pipelines.files import check_writable

        sizes = [read_size(text) for text in self.size] or None
        if (self.prompts is None) == (self.pictures is None):
            raise ValueError("give either --prompts FILE or --pictures FOLDER")
        check_writable(self.out)
        from tqdm import tqdm

        from ..distill.data import captioned_pictures, make_dataset, read_prompts
        from ..distill.shards import Samples
        from ..pipelines.load import load

        given: dict[str, Any] = {"pictures": self.pictures}
        if self.prompts is not None:
            given = {"prompts": read_prompts(self.prompts)}
        elif self.pictures is not None:
            captioned_pictures(self.pictures)  # raises before the model is loaded
        quiet_libraries()
        with joined(self.device, LONGEST) as ranks:
            pipe = load(self.model, device=ranks.device(self.device), dtype=self.dtype)
            pipe.set_progress_bar_config(disable=True)
            silent = None if ranks.speaks else True
            with tqdm(unit="sample", file=sys.stderr, disable=silent, leave=False) as bar:

                def show(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                make_dataset(
                    pipe, self.out, **given, samples=self.samples, sizes=sizes, steps=self.steps, guidance=self.guidance,
                    text_length=self.text_length, seed=self.seed, shard=self.shard, batch=self.batch,
                    part=(ranks.rank, ranks.size), on_progress=show,
                )  # fmt: skip
            if ranks.split:
                import torch.distributed as dist

                dist.barrier()
            if ranks.speaks:
                count = len(Samples(self.out))
                made = {"samples": count, "folder": str(self.out)}
                print(json_text.dumps(made) if self.json else f"{self.out}  ({count} samples)")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Train a linear student, or go on where the run in --out stopped.

    Ctrl-C (or SIGTERM) ends it after the step, with a checkpoint; the same command goes on.
    """

    recipe: Annotated[Path | None, Positional, FILE, arg(metavar="RECIPE", help_behavior_hint="")] = None
    """TOML file, or a run's config.json. Other options change single values of it."""
    model: Annotated[str | None, TEXT, default("the recipe's")] = None
    """The teacher: bundled name, local diffusers folder, or hub id."""
    data: Annotated[Path | None, FILE, default("the recipe's")] = None
    """Folder of `reattend distill data`; or a file of prompts or folder of pictures, then samples are made first."""
    attention: Annotated[
        tuple[str, ...], arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: clear)")
    ] = ()
    """What the student attends with, for example: --attention clear radius=8"""
    steps: Annotated[int | None, WHOLE, default("10000")] = None
    """Optimiser steps."""
    batch: Annotated[int | None, WHOLE, default("32")] = None
    """Samples per step, over all processes."""
    micro_batch: Annotated[int | None, WHOLE, default("4")] = None
    """Samples computed at once in a process; smaller = less memory."""
    lr: Annotated[float | None, NUMBER, default("1e-4")] = None
    """Peak learning rate."""
    rank: Annotated[int | None, WHOLE, default("full copies")] = None
    """Train low-rank adapters of this rank in place of whole projections."""
    seed: Annotated[int | None, WHOLE, default("0")] = None
    """The only source of chance."""
    set: Annotated[tuple[str, ...], KEYS] = ()
    """Any other field of the recipe, for example: --set precision=bfloat16 checkpointing=true"""
    out: Annotated[Path | None, FILE, default(RUN)] = None
    """Folder of the run."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Train. Raises ValueError or TypeError for bad input."""
        config = to_config(self)
        import os

        from ..distill.trainer import distill

        quiet_libraries()
        speaks = int(os.environ.get("RANK", "0")) == 0
        with TrainBar(silent=not speaks) as bar:
            ended = distill(config, on_step=bar, on_sample=bar.sampled)
        if speaks:
            told = {"step": ended.step, "finished": ended.finished, "student": str(ended.student)}
            state = "" if ended.finished else f" of {config.steps}; start it again to go on"
            print(json_text.dumps(told) if self.json else f"{ended.student}  (step {ended.step}{state})")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tell how much memory a training takes, at full size, without downloading or allocating the model."""

    recipe: Annotated[Path | None, Positional, FILE, arg(metavar="RECIPE", help_behavior_hint="")] = None
    """TOML file, or a run's config.json."""
    model: Annotated[str | None, TEXT, default("the recipe's")] = None
    """Local diffusers folder, or hub id of a model whose sizes are known here."""
    attention: Annotated[
        tuple[str, ...], arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: clear)")
    ] = ()
    """What the student attends with."""
    set: Annotated[tuple[str, ...], KEYS] = ()
    """Any other field of the recipe, for example: --set rank=64 micro_batch=2"""
    size: Annotated[str, TEXT, arg(metavar="WIDTHxHEIGHT")] = "1024x1024"
    """Of the samples, in pixels."""
    text_length: int = 512
    """Text tokens of a sample."""
    processes: int = 1
    """How many share the work."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Count. Raises ValueError or TypeError for bad input."""
        config = to_config(self)
        size = read_size(self.size)
        if self.processes < 1 or self.text_length < 0:
            raise ValueError(
                f"--processes is at least 1 and --text-length at least 0, got {self.processes} and {self.text_length}"
            )
        from ..distill.plan import memory_plan

        quiet_libraries()
        found = memory_plan(config, size=size, text_length=self.text_length, processes=self.processes)
        print(found.to_json() if self.json else found)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Tell how near a student's pictures are to its teacher's, in pairs with the same prompt and noise, and how fast."""

    student: Annotated[Path, Positional, FILE, arg(metavar="STUDENT")]
    """Folder of a student, bundled name, or weight file published with CLEAR."""
    model: Annotated[str, TEXT]
    """The teacher: bundled name, local diffusers folder, or hub id."""
    prompts: Annotated[Path | None, FILE, default("captions of the emoji world")] = None
    """Text file with a prompt on each line; a pair of pictures for each."""
    samples: int = 200
    """How many captions of the emoji world, where no prompts are given; the reader then tells whose pictures are right."""
    size: Annotated[str | None, TEXT, arg(metavar="WIDTHxHEIGHT", help_behavior_hint="(default: the model's own)")] = (
        None
    )
    """Of the pictures, in pixels."""
    steps: int = 10
    """Denoising steps."""
    text_length: Annotated[int | None, WHOLE, default("the model's own")] = None
    """Text tokens that prompts are padded to."""
    seed: int = 0
    """Chooses captions and noise."""
    device: Annotated[str | None, TEXT, default("the first of cuda, mps, cpu")] = None
    """Where to compute."""
    dtype: Annotated[str | None, TEXT, default("float32 on a CPU, 16 bits on CUDA")] = None
    """Numbers to compute in: float32, float16 or bfloat16."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Compare. Raises ValueError or TypeError for bad input."""
        size = None if self.size is None else read_size(self.size)
        from ..distill.linear_folder import find_student

        if not find_student(self.student).exists():
            raise ValueError(
                f"there is no student at {self.student}; give the folder that a run wrote, or a bundled name"
            )
        if self.samples < 1:
            raise ValueError(f"--samples is at least 1, got {self.samples}")
        import numpy as np
        from tqdm import tqdm

        from ..distill.comparison import evaluate
        from ..distill.data import own_size, read_prompts
        from ..emoji_world.read import read, score
        from ..emoji_world.world import sample_captions
        from ..pipelines.load import load

        judge = None
        if self.prompts is not None:
            prompts = read_prompts(self.prompts)
        else:
            prompts = sample_captions(np.random.default_rng(self.seed), self.samples)

            def judge(pixels: np.ndarray, prompt: str) -> float:
                found = score(read(pixels), prompt)
                return float(found.kinds and found.background and found.tints_right == found.named)

        quiet_libraries()
        pipe = load(self.model, device=self.device, dtype=self.dtype)
        with tqdm(unit="pair", file=sys.stderr, disable=None, leave=False) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            found = evaluate(
                pipe, self.student, prompts, size=size or own_size(pipe), steps=self.steps, seed=self.seed,
                text_length=self.text_length, judge=judge, on_progress=show,
            )  # fmt: skip
        print(found.to_json() if self.json else found)


def to_config(command: Run | Plan) -> Any:
    """The configuration of the recipe, with the options that were given."""
    from ..distill.config import DistillConfig

    names = ("model", "data", "steps", "batch", "micro_batch", "lr", "rank", "seed", "out")
    given = {name: value for name in names if (value := getattr(command, name, None)) is not None}
    for pair in command.set:
        if "=" not in pair:
            raise ValueError(f"--set cannot read {pair!r}: fields are written KEY=VALUE, as in --set ema=0.99")
        key, _, value = pair.partition("=")
        given[key] = value
    if command.attention:
        given["attention"] = attention_entry(*command.attention)
    if command.recipe is not None:
        return DistillConfig.read(command.recipe, **given)
    needed = {"data": SAMPLES} if isinstance(command, Plan) else {}
    return DistillConfig.from_values(needed, "the command", **given)


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Train a pretrained diffusion transformer into a linear one."""

    what: (
        Annotated[Data, subcommand("data")]
        | Annotated[Run, subcommand("run")]
        | Annotated[Plan, subcommand("plan")]
        | Annotated[Compare, subcommand("evaluate")]
    )

    def run(self) -> None:
        self.what.run()


class TrainBar:
    """A progress bar with loss, pace, memory and the time left on stderr."""

    def __init__(self, silent: bool = False):
        self.silent = silent

    def __enter__(self) -> TrainBar:
        from tqdm import tqdm

        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        disable = True if self.silent else None
        self._bar = tqdm(unit="step", file=sys.stderr, disable=disable, leave=False, bar_format=form)
        return self

    def __call__(self, event: TrainEvent) -> None:
        numbers = event.numbers
        self._bar.total = event.steps
        self._bar.set_postfix_str(
            f"{self._bar.format_interval(event.eta)} left, loss {numbers['loss']:.4g}, "
            f"{numbers['samples_per_second']:.3g} samples/s, {numbers['memory_mib']:.0f} MiB",
            refresh=False,
        )
        self._bar.update(event.step - self._bar.n)

    def sampled(self, done: int, total: int) -> None:
        """Samples that are made before the first step."""
        self._bar.total = total
        self._bar.set_postfix_str("making samples", refresh=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.reset()

    def __exit__(self, *problem: object) -> None:
        self._bar.close()
