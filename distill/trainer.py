"""The training loop: for each batch noise, teacher, student, loss, step; now and then log, pictures, checkpoint.

Everything random depends on (seed, step, place in the batch): the order of the samples, noise, noise levels, left-out
captions. So a run that was stopped goes on bit for bit on a CPU with as many threads, to rounding on a card, and the number
of processes changes only who computes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attn_processors import ClearAttnProcessor
from ..pipelines.events import CancelToken, stoppable
from ..pipelines.files import check_writable, hold
from .batches import Batches, learning_rate
from .config import DistillConfig
from .data import mixed, samples_of
from .denoising import Denoising, Size, denoising_of
from .linear_folder import save_linear
from .losses import Losses, matched_layers, student_losses
from .progress import Meter, RunLog, TrainEvent, plain
from .ranks import Ranks
from .roles import TwoRoles
from .shards import Samples
from .sparing import Damages, Sparing
from .state import TrainState
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
    on_sample: Callable[[int, int], None] | None = None,
    cancel: CancelToken | None = None,
) -> Trained:
    """Train a linear student of `config.model`, or go on where the run in `config.out` stopped.

    Under torchrun all processes share the work. SIGTERM and SIGINT, or `cancel`, end the run after the step, with a
    checkpoint. Afterwards the pipeline is stock again, bit for bit (with parallel="fsdp" it is of no further use).

    Args:
        config: what to do.
        pipe: a loaded pipeline, used in place of `config.model`.
        on_step: called after each logged step, on the first process.
        on_sample: called with (samples done, samples in all) of the first process, where samples have to be made first. A
            signal ends that at once; what is missing is made when the run is started again.
        cancel: asked after each step.

    Raises:
        ValueError: for bad input, samples or checkpoints that do not fit, or a folder that another process works in.
        RuntimeError: if the loss is no number for `config.bad_steps` steps in a row.
    """
    check_writable(config.out)
    if not config.data.exists():
        raise ValueError(f"there is nothing at {config.data}; make samples with: reattend distill data")
    with Ranks.joined(config) as ranks, hold(config.out) if ranks.first else contextlib.nullcontext():
        own = pipe is None
        if pipe is None:
            from ..pipelines.load import load

            pipe = load(config.model, device=ranks.device, dtype=config.precision)
        _check_type(pipe, config, ranks)
        samples = samples_of(config, pipe, ranks, on_sample)
        if own and not config.validate_every:  # text encoders and VAE have done their work
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module) and part is not denoising_of(pipe).model:
                    part.to("cpu")
        stop = cancel or CancelToken()
        with stoppable(stop, lambda _: log.warning("stopping after this step")):
            run = Run(config, pipe, samples, ranks)
            try:
                return run.train(on_step, stop)
            finally:
                run.close()
                del run, pipe


class Run:
    """One run: teacher and student, samples, and the state that training changes."""

    def __init__(self, config: DistillConfig, pipe: Any, samples: Samples, ranks: Ranks):
        self.config, self.pipe, self.samples, self.ranks = config, pipe, samples, ranks
        self.denoising: Denoising = denoising_of(pipe)
        self.log = RunLog(config.out)
        self.batches = Batches(samples.groups(), config.batch, config.seed)
        self.damages = Damages(samples)
        ranks.accumulation(config)  # raises
        self.method = config.method
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
            self.state = TrainState(self.roles.trained(), config, ranks)
            self.state.resume(samples)
        except BaseException:
            self.close()
            raise

    # -- the loop -----------------------------------------------------------------------------------------------------

    def train(self, on_step: Callable[[TrainEvent], None] | None, stop: CancelToken) -> Trained:
        config, ranks, state = self.config, self.ranks, self.state
        if ranks.first:
            config.write(config.out / "config.json")
            self.log.cut(state.step)
        ranks.track(config)
        meter = Meter(state.step, ranks, state.seconds)
        stopped = False
        for size, micros in self.read():
            if stopped := ranks.any(stop.requested):
                break
            lr = learning_rate(config, state.step)
            norm = self.learn(size, micros, lr, meter)
            if state.step % config.log_every == 0 or state.step == config.steps:
                numbers = {"step": state.step, **meter.read(state.step, config.batch), "gradient_norm": norm, "lr": lr}
                self._tell(numbers, on_step, meter)
            if config.validate_every and state.step % config.validate_every == 0:
                meter.count(state.step)
                self._validate()
                meter.rest(state.step)
            if state.step % config.save_every == 0:
                self._save(meter)
        self._save(meter)
        finished = state.step >= config.steps and not stopped
        student = config.out / "student"
        self.write_student(student)
        if config.ema and finished:
            self.write_student(config.out / "student-raw", averaged=False)
        return Trained(state.step, finished, student)

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
        norm = self.state.update(lr)
        meter.end(math.isfinite(norm))
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
            attention_weight=config.attention_weight, own=list(roles.told.values()),
        )  # fmt: skip

    def draw(self, places: list[int], shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (B, *shape), noise levels (B,) in (0, 1), left-out captions (B,), each by step and place alone."""
        config = self.config
        share = (0.1 if self.denoising.compares else 0.0) if config.dropout is None else config.dropout
        noises, levels, dropped = [], [], []
        for place in places:
            generator = torch.Generator().manual_seed(mixed(config.seed, self.state.step, place))
            normal = torch.randn(1, generator=generator)
            uniform, chance = torch.rand(2, 1, generator=generator).unbind(0)
            levels.append((normal + config.logit_mean).sigmoid() if config.times == "logit-normal" else uniform)
            dropped.append(chance < share)
            noises.append(torch.randn(shape, generator=generator))
        return torch.stack(noises), torch.cat(levels), torch.cat(dropped)

    def read(self) -> Iterator[tuple[Size, Iterator[tuple[dict[str, Tensor], list[int]]]]]:
        """From the present step on: the size of each batch, and this process's micro batches with their places."""
        config, ranks = self.config, self.ranks
        places = ranks.places(config)
        steps = (self.batches.at(step) for step in range(self.state.step, config.steps))
        plan, read, asked = itertools.tee(steps, 3)  # the loader may be ahead by a few
        loader = torch.utils.data.DataLoader(
            Sparing(self.samples), batch_sampler=_micros(read, places), num_workers=config.workers,  # type: ignore[arg-type]
            pin_memory=ranks.device.type == "cuda",
        )  # fmt: skip
        batches = map(self.damages.taken, loader, _micros(asked, places))
        for size, _ in plan:
            yield size, ((next(batches), micro) for micro in places)

    # -- keeping ------------------------------------------------------------------------------------------------------

    def write_student(self, folder: Path, averaged: bool = True) -> None:
        """The folder that `load_linear` installs, with the averaged weights if there are any."""
        tensors = self.state.values(averaged)
        if self.ranks.first:
            info = {"base": self.config.model, "steps": self.state.step, "batch": self.config.batch}
            stored, layers = self.roles.stored(tensors), self.roles.layers
            save_linear(folder, self.roles.model, self.method, stored, layers=layers, info=info)

    def close(self) -> None:
        """Leave the pipeline as it was found."""
        model = self.roles.model
        if self.config.checkpointing and not self._checkpointed:
            model.disable_gradient_checkpointing()
        if self.config.parallel == "ddp":
            self.roles.remove()

    def _save(self, meter: Meter) -> None:
        meter.count(self.state.step)
        self.state.seconds = meter.total
        self.state.save(self.samples, self.write_student)
        meter.rest(self.state.step)

    # -- telling ------------------------------------------------------------------------------------------------------

    def _tell(self, numbers: dict[str, Any], on_step: Callable[[TrainEvent], None] | None, meter: Meter) -> None:
        if not self.ranks.first:
            return
        if self.damages.met:
            numbers["damaged_samples"] = len(self.damages.met)  # that this process met
        self.log.add(numbers)
        known = plain(numbers)
        flat = {key: value for key, value in known.items() if isinstance(value, (int, float)) and key != "step"}
        flat |= {f"layers/{name}": loss for name, loss in known["layers"].items()}
        self.ranks.accelerator.log(flat, step=self.state.step)
        if on_step is not None:
            on_step(
                TrainEvent(self.state.step, self.config.steps, numbers, meter.eta(self.config.steps - self.state.step))
            )

    def _validate(self) -> None:
        """Pictures of the student beside the teacher; sharded models need every process for them."""
        if self.config.parallel == "ddp" and not self.ranks.first:
            self.ranks.wait()
            return
        with self.state.averaged():
            error = validate(
                self.pipe, self.roles, self.samples, self.config, self.state.step,
                autocast=self.ranks.accelerator.autocast, writes=self.ranks.first,
            )  # fmt: skip
        if self.ranks.first:
            told = {"validation_latent_error": error}
            self.log.add({"step": self.state.step, **told})
            self.ranks.accelerator.log(told, step=self.state.step)
        if self.config.parallel == "ddp":
            self.ranks.wait()

    def _shrunk(self, size: Size) -> Any:
        """The method with the radii of this step: from the picture's diagonal down to their own, in whole tokens."""
        left = 1 - min(self.state.step / self.config.radius_steps, 1.0)
        most = math.hypot(*self.denoising.grid(size)) + 1
        assert isinstance(self.method, ClearAttnProcessor) and isinstance(self.roles.method, ClearAttnProcessor)

        def now(own: float) -> float:
            return own if left == 0 else max(own, float(math.ceil(own + left * (most - own))))

        radius, radii = now(self.method.radius), tuple((layers, now(own)) for layers, own in self.method.radii)
        same = (radius, radii) == (self.roles.method.radius, self.roles.method.radii)
        return self.roles.method if same else replace(self.method, radius=radius, radii=radii)


def _micros(steps: Iterator[tuple[Size, np.ndarray]], places: list[list[int]]) -> Iterator[list[int]]:
    """The samples of each micro batch: of every step those at these places of its batch."""
    for _, indices in steps:
        yield from ([int(indices[place]) for place in micro] for micro in places)


def _check_type(pipe: Any, config: DistillConfig, ranks: Ranks) -> None:
    dtype = str(pipe.dtype).removeprefix("torch.")
    if dtype != config.precision:
        raise ValueError(f"the pipeline is in {dtype}, the run computes in {config.precision}; load it in that dtype")
    if config.precision == "float16" and ranks.device.type != "cuda":
        raise ValueError(f"float16 trains on CUDA only, got {ranks.device.type}; use precision bfloat16 or float32")
