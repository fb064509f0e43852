"""Which linear attention can a pretrained model be trained into? Many forms on one teacher, before and after training.

Run: python -m reattend.emoji_world.students --out out/students
     python -m reattend.emoji_world.students --show out/students/summary.json

Every form gets the same samples of the teacher, the same number of steps, the same settings and seeds. The default number
is meant to take about ten minutes for each form on one core; the table tells the seconds it took. Then teacher and
students draw the same held-out captions from the same noise, and the reader says whose pictures are right. Everything goes
to the folder as soon as it is there: pictures batch by batch, trainings in checkpoints, the summary after every form. A run
that was stopped, in whatever way, goes on where it was with the same command.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..attn_processors import install
from ..distill import DistillConfig, distill, evaluate, load_linear, make_dataset
from ..distill.comparison import closeness, step_flops
from ..distill.data import own_size
from ..distill.linear_folder import read_linear
from ..distill.progress import TrainEvent
from ..distill.ranks import check_device
from ..distill.validation import pictures
from ..pipelines.checks import complete_attention, method_of
from ..pipelines.files import written_whole
from ..pipelines.load import load
from .evaluate import SHOWN, contact_sheet, environment, model_settings, picture_path
from .read import read, score
from .results import Results, print_table
from .student_table import COST, TEACHER, TRAINED, arm_of, summarize, table
from .world import sample_captions

__all__ = ["FORMS", "compare"]

FORMAT = "reattend students 1"
FORMS = (  # at 256 px a grid token sees 30 to 110 of the 256 on average, or all of them through a linear form
    'clear radius=6 radii=[["blocks.0.",10]] pool=4',  # the first blocks of tiny-flux look far
    "clear radius=4",
    "clear pattern=tile tile=(2,2) radius=3.1",
    "neighborhood radius=4",
    "linear",
    "inline",
    "flow",
    "agent-joint agents=7",
    "mixture-of-heads radius=4",
    "routed tile=(4,4) topk=3",
)
# The teacher alone is followed: its guidance is built in, so its velocity is not the flow of its samples. Noise levels are those
# at which it lays a picture out; there students are farthest from it.
RECIPE = {"flow_weight": 0.0, "output_weight": 1.0, "attention_weight": 1.0, "match": "all", "logit_mean": 1.2, "warmup": 20,
          "schedule": "cosine"}  # fmt: skip
PAIRS = 16  # pairs of pictures that tell times
LARGER = 4  # how many times the side at which operations are counted besides
BATCH = 10  # pictures in a call


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended a training; what there is is kept."""


def compare(
    model: str | Path,
    *,
    out: Path,
    forms: Sequence[str] = FORMS,
    steps: int = 1000,
    data: int = 1000,
    samples: int = 500,
    denoising: int = 10,
    text_length: int = 24,
    batch: int = 8,
    lr: float = 2e-4,
    ema: float = 0.99,
    precision: str = "float32",
    seed: int = 0,
    command: str = "",
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train and judge every form. Goes on from `out` if it holds results of the same settings.

    Args:
        model: what `load` takes; the teacher.
        out: folder of everything; `summary.json` is what the function returns, `contact.png` shows the first pictures.
        forms: attentions, each a name and settings, as in "clear radius=4". More can be added later.
        steps: of training for each form.
        data: samples of the teacher to train on.
        samples: held-out captions; picture i has the seed `seed + i` in every arm. More can be added later.
        denoising: steps of each picture, and of the samples.
        text_length: text tokens of all of them, where the model has a choice.
        batch, lr, ema, precision: of the training, see `DistillConfig`.
        command: what repeats this run, for the summary.
        on_progress: called with a line for people whenever something is done.

    Raises:
        ValueError, TypeError: bad numbers or forms, or `out` holds results of other settings, or another process works there.
        Stopped: a signal ended a training.
    """
    if samples < 1 or data < batch:
        raise ValueError(f"got {samples=}, {data=}, {batch=}; need a sample at least and data for one batch at least")
    if len({slug(form) for form in forms}) < len(forms) or not forms:
        raise ValueError(f"got the forms {list(forms)}; need at least one, and none twice")
    tell = on_progress or (lambda line: None)
    out = Path(out)
    trainings = {
        form: DistillConfig(
            model=str(model), data=out / "data", out=out / "runs" / slug(form), attention=attention_of(form), steps=steps,
            batch=batch, micro_batch=batch, lr=lr, ema=ema, precision=precision, seed=seed,  # type: ignore[arg-type]
            log_every=10, save_every=50, keep=1, **RECIPE,  # type: ignore[arg-type]
        )
        for form in forms
    }  # fmt: skip
    check_device(precision)
    pipe = load(model, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    for config in trainings.values():  # raises where a form has no layer in this model, before anything is written
        install(pipe, config.method).remove()
    side, _ = own_size(pipe)
    length = text_length if hasattr(pipe, "transformer") else None  # UNets have one
    settings = {
        "steps": steps, "data": data, "denoising": denoising, "text_length": length, "batch": batch, "lr": lr, "ema": ema,
        "precision": precision, "seed": seed, "side": side, **RECIPE, **model_settings(pipe),
    }  # fmt: skip
    results = Results(out / "results.jsonl", FORMAT, settings)
    captions = sample_captions(np.random.default_rng(seed + 1), data, held_out=False)
    make_dataset(pipe, out / "data", prompts=captions, sizes=[(side, side)], steps=denoising, text_length=length,
                 seed=seed, shard=32, batch=8, on_progress=lambda done, total: tell(f"samples: {done} of {total}"))  # fmt: skip
    judge = Judge(pipe, results, out, samples, denoising, length, seed, (side, side), tell)
    more = {"settings": settings, "about": environment(pipe, command)}
    judge.pictures(TEACHER)
    for number, (form, config) in enumerate(trainings.items(), 1):
        judge.pictures(arm_of(form, "before"), config.attention)
        if (TRAINED + form, 0) not in results.entries:
            results.add([{"arm": TRAINED + form, "sample": 0, **_trained(config, form, tell)}])
        judge.pictures(arm_of(form, "after"), config.out / "student")
        if (COST + form, 0) not in results.entries:
            results.add([{"arm": COST + form, "sample": 0, **judge.cost(config.out / "student")}])
            tell(f"{form}: cost")
            _write(out, results, forms[:number], samples, more)
    return _write(out, results, forms, samples, more)


class Judge:
    """Draws the held-out captions with one arm after another and writes down what the reader sees."""

    def __init__(self, pipe: Any, results: Results, out: Path, samples: int, steps: int, text_length: int | None, seed: int,
                 size: tuple[int, int], tell: Callable[[str], None]):  # fmt: skip
        self.pipe, self.results, self.out, self.tell = pipe, results, out, tell
        self.steps, self.length, self.seed, self.size = steps, text_length, seed, size
        self.captions = sample_captions(np.random.default_rng(seed), samples)

    def pictures(self, arm: str, student: dict[str, Any] | Path | None = None) -> None:
        """Make and judge what is missing of an arm: an untrained attention, the folder of a student, or the teacher."""
        missing = [i for i in range(len(self.captions)) if (arm, i) not in self.results.entries]
        if not missing:
            return
        with ExitStack() as stack:
            if isinstance(student, Path):
                stack.callback(load_linear(self.pipe, student).remove)
            elif student is not None:
                stack.callback(install(self.pipe, method_of(student)).remove)
            for start in range(0, len(missing), BATCH):
                some = missing[start : start + BATCH]
                made, latents = pictures(
                    self.pipe, [self.captions[i] for i in some], self.size, self.steps, [self.seed + i for i in some], self.length
                )  # fmt: skip
                self.results.add([self._judged(arm, i, *pair) for i, *pair in zip(some, made, latents, strict=True)])
                self.tell(f"{arm}: pictures {some[-1] + 1} of {len(self.captions)}")

    def cost(self, student: Path) -> dict[str, Any]:
        """Milliseconds and operations of a step, beside the teacher's; and operations on a larger grid."""
        more: dict[str, Any] = {"size": self.size, "steps": self.steps, "text_length": self.length}
        found = evaluate(self.pipe, student, self.captions[:PAIRS], seed=self.seed, **more)
        large = (self.size[0] * LARGER, self.size[1] * LARGER)
        teacher, ours = step_flops(self.pipe, read_linear(student), student, size=large, text_length=self.length)
        return {
            "ms": found.student_ms_per_step, "teacher_ms": found.teacher_ms_per_step, "times_faster": found.times_faster,
            "flops": asdict(found.student_flops), "teacher_flops": asdict(found.teacher_flops),
            "large_flops": asdict(ours), "large_teacher_flops": asdict(teacher), "large_size": large,
        }  # fmt: skip

    def _judged(self, arm: str, i: int, pixels: np.ndarray, latents: torch.Tensor) -> dict[str, Any]:
        from safetensors.torch import load_file, save_file

        latents = latents.cpu()  # where the kept ones of the teacher are
        kept = self.out / "teacher" / f"{i:05}.safetensors"
        entry = {"arm": arm, "sample": i, "score": asdict(score(read(pixels), self.captions[i]))}
        if arm == TEACHER:
            with written_whole(kept) as (aside,):
                save_file({"pixels": torch.from_numpy(pixels).contiguous(), "latents": latents.contiguous()}, aside)
        else:
            theirs = load_file(kept)
            error, psnr, ssim = closeness(pixels, theirs["pixels"].numpy(), latents, theirs["latents"])
            entry |= {"latent_error": error, "psnr": psnr, "ssim": ssim}
        if i < SHOWN:
            with written_whole(picture_path(self.out, slug(arm), i)) as (path,):
                Image.fromarray(pixels).save(path, "PNG")
        return entry


def _trained(config: DistillConfig, form: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Train, or go on; what is told of it."""

    def on_step(event: TrainEvent) -> None:
        loss, pace = event.numbers["loss"], event.numbers["samples_per_second"]
        tell(f"{form}: step {event.step} of {event.steps}, loss {loss:.4g}, {pace:.3g} samples/s")

    ended = distill(config, on_step=on_step)
    if not ended.finished:
        raise Stopped(f"stopped in {form!r} after step {ended.step}; the same command goes on")
    told = _last_line(config.out / "log.jsonl")
    return {"steps": ended.step, "seconds": told["seconds"], "loss": told["loss"], "samples": config.batch * ended.step}


def _write(out: Path, results: Results, forms: Sequence[str], samples: int, more: dict[str, Any]) -> dict[str, Any]:
    """Write the summary and the first pictures of these forms, whose results are all there; returns the summary."""
    summary = summarize(results, forms, samples) | more
    rows = [TEACHER, *(arm_of(form, when) for form in forms for when in ("before", "after"))]
    sheet = contact_sheet([[picture_path(out, slug(arm), i) for i in range(min(samples, SHOWN))] for arm in rows], 128)
    with written_whole(out / "summary.json", out / "contact.png") as (summary_path, sheet_path):
        summary_path.write_text(json.dumps(summary, indent=2) + "\n")
        sheet.save(sheet_path, "PNG")
    return summary


def attention_of(form: str) -> dict[str, Any]:
    """ "clear radius=4" as an entry of a recipe, with all settings. Raises ValueError or TypeError."""
    name, *words = form.split()
    if bad := [word for word in words if "=" not in word]:
        raise ValueError(f"the form {form!r} has the word {bad[0]!r}, need key=value, as in 'clear radius=4'")
    return complete_attention([{"name": name, **dict(word.split("=", 1) for word in words)}])[0]


def slug(arm: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9.]+", "-", arm.lower()).strip("-")


def _last_line(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return next(line for line in reversed(lines) if "loss" in line)


def main(
    model: str = "tiny-flux",
    out: Path = Path("out/students"),
    forms: tuple[str, ...] = FORMS,
    steps: int = 1000,
    data: int = 1000,
    samples: int = 500,
    batch: int = 8,
    lr: float = 2e-4,
    precision: str = "float32",
    seed: int = 0,
    show: Path | None = None,
) -> None:
    """Print how near each linear form comes to its teacher, before and after training.

    Args:
        model: bundled name, local diffusers folder, or hub id of a model of the emoji world.
        out: folder of everything.
        forms: attentions to compare, each in quotes: "clear radius=4" "linear"
        steps: of training for each form.
        data: samples of the teacher to train on.
        samples: held-out captions to draw.
        batch: samples of a training step.
        lr: learning rate.
        precision: numbers to train in: float32, or bfloat16 where the processor has it.
        seed: chooses captions, samples and noise.
        show: only print the table of a summary.json that is there.
    """
    if show is not None:
        print_table(show, table, "students")
        return

    def tell(line: str) -> None:
        print(f"\r\033[K{line}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    command = f"python -m reattend.emoji_world.students {shlex.join(sys.argv[1:])}".rstrip()
    try:
        summary = compare(model, out=out, forms=forms, steps=steps, data=data, samples=samples, batch=batch, lr=lr,
                          precision=precision, seed=seed, command=command, on_progress=tell)  # fmt: skip
    except (ValueError, TypeError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        raise SystemExit(130) from None
    print(table(summary))


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
