"""The training loop: for each batch noise, teacher, student, loss, step; now and then log, pictures, checkpoint.

Everything random depends on (seed, step, place in the batch): the order of the samples, noise, noise levels, left-out
captions. So a run that was stopped goes on bit for bit, and the number of processes changes only who computes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attn_processors import ATTN_PROCESSORS, ClearAttnProcessor
from ..pipelines.events import CancelToken
from ..pipelines.files import check_writable
from . import checkpoint
from .batches import Batches, learning_rate
from .config import DistillConfig
from .data import make_dataset, mixed, read_prompts
from .denoising import Denoising, Size, denoising_of
from .linear_folder import save_linear
from .losses import Losses, matched_layers, student_losses
from .progress import Meter, TrainEvent
from .ranks import Ranks
from .roles import TwoRoles
from .shards import Samples
from .validation import validate

__all__ = ["Trained", "distill"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """How a run ended: `finished` is False if it was stopped, and can go on. `student` is what `load_linear` installs."""

    step: int
    finished: bool
    student: Path


def distill(
    config: DistillConfig,
    *,
    pipe: Any = None,
    on_step: Callable[[TrainEvent], None] | None = None,
    cancel: CancelToken | None = None,
) -> Trained:
    """Train a linear student of `config.model`, or go on where the run in `config.out` stopped.

    Under torchrun all processes share the work. SIGTERM and SIGINT, or `cancel`, end the run after the step, with a
    checkpoint. Afterwards the pipeline is stock again, bit for bit (with parallel="fsdp" it is of no further use).

    Args:
        config: what to do.
        pipe: a loaded pipeline, used in place of `config.model`.
        on_step: called after each logged step, on the first process.
        cancel: asked after each step.

    Raises:
        ValueError: for bad input, samples or checkpoints that do not fit.
        RuntimeError: if the loss is no number for `config.bad_steps` steps in a row.
    """
    check_writable(config.out)
    if not config.data.exists():
        raise ValueError(f"there is nothing at {config.data}; make samples with: reattend distill data")
    with Ranks.joined(config) as ranks, _stoppable(cancel or CancelToken()) as stop:
        own = pipe is None
        if pipe is None:
            from ..pipelines.load import load

            pipe = load(config.model, device=ranks.device, dtype=config.precision)
        _check_type(pipe, config, ranks)
        samples = _samples(config, pipe, ranks)
        if own and not config.validate_every:  # text encoders and VAE have done their work
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module) and part is not denoising_of(pipe).model:
                    part.to("cpu")
        run = Run(config, pipe, samples, ranks)
        try:
            return run.train(on_step, stop)
        finally:
            run.close()
            del run, pipe


class Run:
    """Teacher, student, optimiser and averaged weights of one run, and where it is."""

    def __init__(self, config: DistillConfig, pipe: Any, samples: Samples, ranks: Ranks):
        from diffusers.training_utils import EMAModel

        self.config, self.pipe, self.samples, self.ranks = config, pipe, samples, ranks
        self.denoising: Denoising = denoising_of(pipe)
        self.batches = Batches(samples.groups(), config.batch, config.seed)
        ranks.accumulation(config)  # raises
        settings = {key: value for key, value in config.attention.items() if key != "name"}
        self.method = ATTN_PROCESSORS[config.attention["name"]].from_settings(settings)
        self.roles = TwoRoles(
            pipe, self.method, layers=config.layers, projections=config.projections, rank=config.rank, seed=config.seed
        )
        model = self.roles.model
        self._checkpointed = bool(getattr(model, "is_gradient_checkpointing", False))
        try:
            self.roles.tap(matched_layers(self.roles.layers, config.match) if config.attention_weight else [])
            if config.checkpointing:
                model.enable_gradient_checkpointing()
            self.wrapped = ranks.wrapped(model, config)
            self.trained = self.roles.trained()
            for parameter in self.trained.values():
                parameter.requires_grad_(True)
            self.parameters = list(self.trained.values())
            self.optimizer = ranks.accelerator.prepare_optimizer(
                torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
            )
            self.ema = EMAModel(self.parameters, decay=config.ema) if config.ema else None
            self.step, self.bad, self.saved = 0, 0, -1
            self._resume()
        except BaseException:
            self.close()
            raise

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self, on_step: Callable[[TrainEvent], None] | None, stop: CancelToken) -> Trained:
        config, ranks = self.config, self.ranks
        if ranks.first:
            config.write(config.out / "config.json")
            _cut_log(config.out / "log.jsonl", self.step)
        ranks.track(config)
        meter = Meter(self.step, ranks)
        stopped = False
        for size, micros in self.read():
            if stopped := ranks.any(stop.requested):
                break
            lr = learning_rate(config, self.step)
            norm = self.learn(size, micros, lr, meter)
            self.step += 1
            if self.step % config.log_every == 0 or self.step == config.steps:
                numbers = {"step": self.step, **meter.read(self.step, config.batch), "gradient_norm": norm, "lr": lr}
                self._tell(numbers, on_step, meter)
            if config.validate_every and self.step % config.validate_every == 0:
                self._validate()
                meter.rest(self.step)
            if self.step % config.save_every == 0:
                self.save()
                meter.rest(self.step)
        self.save()
        finished = self.step >= config.steps and not stopped
        student = config.out / "student"
        self.write_student(student)
        if config.ema and finished:
            self.write_student(config.out / "student-raw", averaged=False)
        return Trained(self.step, finished, student)

    def learn(
        self, size: Size, micros: Iterator[tuple[dict[str, Tensor], list[int]]], lr: float, meter: Meter
    ) -> float:
        """One optimiser step on the micro batches of this process; the norm of the gradients."""
        config, ranks, roles = self.config, self.ranks, self.roles
        count = ranks.accumulation(config)
        if config.radius_steps:
            roles.use(self._shrunk(size))
        for number, (sample, places) in enumerate(micros):
            with ranks.syncing(self.wrapped, number == count - 1):
                losses = self.losses(size, sample, places)
                with roles.student():  # what is recomputed in backward is the student
                    ranks.accelerator.backward(losses.total / count)
            meter.add(losses, count)
        norm = ranks.clip(self.optimizer, self.parameters, config.clip)
        good = math.isfinite(norm)
        if good or config.precision == "float16":  # there the scaler has to hear of it; it skips the step itself
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        if good and self.ema is not None:
            self.ema.step(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.bad = 0 if good else self.bad + 1
        if self.bad >= config.bad_steps:
            raise RuntimeError(
                f"the gradients were no numbers {self.bad} steps in a row (step {self.step + 1}); the last checkpoint is "
                "good: lower lr, or use precision bfloat16 or float32"
            )
        return norm

    def losses(self, size: Size, sample: dict[str, Tensor], places: list[int]) -> Losses:
        """Teacher, student and their losses on one micro batch, whose samples have these places in the batch."""
        config, denoising, roles = self.config, self.denoising, self.roles
        device, dtype = self.ranks.device, roles.model.dtype
        clean = sample["latents"].float()
        noise, levels, dropped = self.draw(places, clean.shape[1:])
        levels = denoising.warp(levels, denoising.tokens(size))
        text = {name: value for name, value in sample.items() if name != "latents"}
        if dropped.any():
            for name, value in self.samples.empty.items():
                text[name] = torch.where(dropped.view(-1, *[1] * value.ndim), value, text[name])
        text = {name: value.to(device, dtype) for name, value in text.items()}
        levels = levels.to(device)
        noisy, target = denoising.corrupt(clean.to(device), noise.to(device), levels)
        inputs = denoising.inputs(noisy.to(dtype), levels, text, size, config.guidance)
        autocast = self.ranks.accelerator.autocast
        with torch.no_grad(), autocast(), roles.recording() as theirs:
            teacher = roles.model(**inputs, return_dict=False)[0]
        with roles.student(), autocast(), roles.recording() as ours:
            student = self.wrapped(**inputs, return_dict=False)[0]
        taps = [{layer: [kept[key] for key in sorted(kept)] for layer, kept in taps.items()} for taps in (ours, theirs)]
        return student_losses(
            student, teacher, target, *taps, flow_weight=config.flow_weight, output_weight=config.output_weight,
            attention_weight=config.attention_weight,
        )  # fmt: skip

    def draw(self, places: list[int], shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, *shape), noise levels (B,) in (0, 1), left-out captions (B,), each by step and place alone."""
        config = self.config
        share = (0.1 if self.denoising.compares else 0.0) if config.dropout is None else config.dropout
        noises, levels, dropped = [], [], []
        for place in places:
            generator = torch.Generator().manual_seed(mixed(config.seed, self.step, place))
            normal = torch.randn(1, generator=generator)
            uniform, chance = torch.rand(2, 1, generator=generator).unbind(0)
            levels.append(normal.sigmoid() if config.times == "logit-normal" else uniform)
            dropped.append(chance < share)
            noises.append(torch.randn(shape, generator=generator))
        return torch.stack(noises), torch.cat(levels), torch.cat(dropped)

    def read(self) -> Iterator[tuple[Size, Iterator[tuple[dict[str, Tensor], list[int]]]]]:
        """From the present step on: the size of each batch, and this process's micro batches with their places."""
        config, ranks = self.config, self.ranks
        places = ranks.places(config)
        plan = [self.batches.at(step) for step in range(self.step, config.steps)]
        chosen = [[int(indices[place]) for place in micro] for _, indices in plan for micro in places]
        loader = iter(
            torch.utils.data.DataLoader(
                self.samples, batch_sampler=chosen, num_workers=config.workers, pin_memory=ranks.device.type == "cuda"
            )
        )
        for size, _ in plan:
            yield size, ((next(loader), micro) for micro in places)

    # -- keeping ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved == self.step:
            return
        config, scaler = self.config, self.ranks.accelerator.scaler
        numbers = {
            "config": json.loads(config.to_json()),
            "samples": self.samples.digest,
            "bad": self.bad,
            "ema_steps": self.ema.optimization_step if self.ema else 0,
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        checkpoint.save(
            config.out / "checkpoints", self.step, self._state(), numbers, self.write_student, keep=config.keep,
            writes=self.ranks.first,
        )  # fmt: skip
        self.saved = self.step
        self.ranks.wait()

    def write_student(self, folder: Path, averaged: bool = True) -> None:
        """The folder that `load_linear` installs, with the averaged weights if there are any."""
        values = dict(zip(self.trained, self.ema.shadow_params, strict=True)) if averaged and self.ema else self.trained
        tensors = {name: checkpoint.whole(value) for name, value in values.items()}
        if self.ranks.first:
            info = {"base": self.config.model, "steps": self.step, "batch": self.config.batch}
            stored, layers = self.roles.stored(tensors), self.roles.layers
            save_linear(folder, self.roles.model, self.method, stored, layers=layers, info=info)

    def close(self) -> None:
        """Leave the pipeline as it was found."""
        model = self.roles.model
        if self.config.checkpointing and not self._checkpointed:
            model.disable_gradient_checkpointing()
        if self.config.parallel == "ddp":
            self.roles.remove()

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        for place, (name, parameter) in enumerate(self.trained.items()):
            yield f"trained.{name}", checkpoint.whole(parameter)
            if self.ema is not None:
                yield f"ema.{name}", checkpoint.whole(self.ema.shadow_params[place])
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{key}.{name}", checkpoint.whole(value)

    def _resume(self) -> None:
        config = self.config
        found = checkpoint.newest(config.out / "checkpoints")
        if found is None:
            return
        about, file = found
        before = DistillConfig.from_values(about["config"], f"{file}")
        if (name := before.conflict(config)) is not None:
            raise ValueError(
                f"{config.out} holds a run with {name}={getattr(before, name)!r}, asked is {getattr(config, name)!r}; go on "
                "with the same options, or choose another --out"
            )
        if about["samples"] != self.samples.digest:
            raise ValueError(f"the run in {config.out} began on other samples than those in {self.samples.folder}")
        targets: dict[str, Tensor] = {f"trained.{name}": value for name, value in self.trained.items()}
        if self.ema is not None:
            targets |= {f"ema.{name}": value for name, value in zip(self.trained, self.ema.shadow_params, strict=True)}
            self.ema.optimization_step = about["ema_steps"]
        for name, value in checkpoint.restore(file, targets):
            _, key, path = name.split(".", 2)
            parameter = self.trained[path]
            kept = self.optimizer.state.setdefault(parameter, {})
            kept[key] = value if value.ndim == 0 else checkpoint.like(value, parameter)
        if about["scaler"] and self.ranks.accelerator.scaler is not None:
            self.ranks.accelerator.scaler.load_state_dict(about["scaler"])
        self.step = self.saved = about["step"]
        self.bad = about["bad"]

    # -- telling ------------------------------------------------------------------------------------------------------

    def _tell(self, numbers: dict[str, Any], on_step: Callable[[TrainEvent], None] | None, meter: Meter) -> None:
        if not self.ranks.first:
            return
        with (self.config.out / "log.jsonl").open("a") as lines:
            lines.write(json.dumps(numbers) + "\n")
        flat = {key: value for key, value in numbers.items() if isinstance(value, (int, float)) and key != "step"}
        self.ranks.accelerator.log(flat, step=self.step)
        if on_step is not None:
            on_step(TrainEvent(self.step, self.config.steps, numbers, meter.eta(self.config.steps - self.step)))

    def _validate(self) -> None:
        """Pictures of the student beside the teacher; sharded models need every process for them."""
        if self.config.parallel == "ddp" and not self.ranks.first:
            self.ranks.wait()
            return
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            error = validate(
                self.pipe, self.roles, self.samples, self.config, self.step,
                autocast=self.ranks.accelerator.autocast, writes=self.ranks.first,
            )  # fmt: skip
        finally:
            if self.ema is not None:
                self.ema.restore(self.parameters)
        if self.ranks.first:
            with (self.config.out / "log.jsonl").open("a") as lines:
                lines.write(json.dumps({"step": self.step, "validation_latent_error": error}) + "\n")
        if self.config.parallel == "ddp":
            self.ranks.wait()

    def _shrunk(self, size: Size) -> Any:
        """The method with the radius of this step: from the picture's diagonal down to its own, in whole tokens."""
        left = 1 - min(self.step / self.config.radius_steps, 1.0)
        most = math.hypot(*self.denoising.grid(size)) + 1
        assert isinstance(self.method, ClearAttnProcessor) and isinstance(self.roles.method, ClearAttnProcessor)
        target = self.method.radius
        radius = target if left == 0 else max(target, float(math.ceil(target + left * (most - target))))
        return self.roles.method if radius == self.roles.method.radius else replace(self.method, radius=radius)


def _samples(config: DistillConfig, pipe: Any, ranks: Ranks) -> Samples:
    """The samples of the run; made first if `config.data` is prompts or pictures."""
    folder, source = config.data, config.data
    if source.is_file() or (source.is_dir() and not (source / "dataset.json").is_file()):
        folder = config.out / "data"
        given: dict[str, Any] = {"prompts": read_prompts(source)} if source.is_file() else {"pictures": source}
        part = (ranks.rank, ranks.size)
        make_dataset(pipe, folder, **given, seed=config.seed, part=part, steps=config.validation_steps)
        ranks.wait()
    return Samples(folder)


def _check_type(pipe: Any, config: DistillConfig, ranks: Ranks) -> None:
    dtype = str(pipe.dtype).removeprefix("torch.")
    if dtype != config.precision:
        raise ValueError(f"the pipeline is in {dtype}, the run computes in {config.precision}; load it in that dtype")
    if config.precision == "float16" and ranks.device.type != "cuda":
        raise ValueError(f"float16 trains on CUDA only, got {ranks.device.type}; use precision bfloat16 or float32")


def _cut_log(path: Path, step: int) -> None:
    """Take out lines after the step a run goes on from."""
    if path.exists():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        path.write_text("".join(f"{line}\n" for line in lines))


@contextlib.contextmanager
def _stoppable(token: CancelToken) -> Iterator[CancelToken]:
    """SIGTERM and SIGINT request the token for the length of a with block; a second one acts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield token
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def request(number: int, frame: Any) -> None:
        log.warning("stopping after this step")
        token.request()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield token
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
