"""What changes while a student is trained: its parameters, their running average, the optimiser, and how far the run is.

All of it goes into a checkpoint and comes back bit for bit, so that a run that was stopped is the run that was not.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint
from .config import DistillConfig
from .optimizers import make_optimizer
from .ranks import Ranks
from .shards import Samples

__all__ = ["TrainState"]

log = logging.getLogger(__name__)


class TrainState:
    """The state of one run.

    Attributes:
        trained: parameters by the names under which they are saved.
        step: optimiser steps done.
        seconds: of training, in all sessions of the run; pictures and checkpoints are not counted.
        bad: steps in a row, up to now, whose gradients were no numbers.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter], config: DistillConfig, ranks: Ranks):
        from diffusers.training_utils import EMAModel

        self.trained, self.config, self.ranks = dict(trained), config, ranks
        self.parameters = list(self.trained.values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimizer = ranks.accelerator.prepare_optimizer(make_optimizer(config, self.parameters))
        self.ema = EMAModel(self.parameters, decay=config.ema) if config.ema else None
        self.step, self.bad, self.seconds = 0, 0, 0.0
        self._saved = -1

    def update(self, lr: float) -> float:
        """One optimiser step with the gradients there are; returns their norm.

        Raises:
            RuntimeError: if they were no numbers for `config.bad_steps` steps in a row; such steps change nothing.
        """
        config, ranks = self.config, self.ranks
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
        if not good and ranks.first:
            log.warning("step %d changed nothing: its gradients were no numbers", self.step + 1)
        if self.bad >= config.bad_steps:
            raise RuntimeError(
                f"the gradients were no numbers {self.bad} steps in a row (step {self.step + 1}); the last checkpoint is "
                "good: lower lr, or use precision bfloat16 or float32"
            )
        self.step += 1
        return norm

    def values(self, averaged: bool = True) -> dict[str, Tensor]:
        """The trained values, whole and on the CPU; averaged ones if there are any.

        Every process has to call; others than the first get none.
        """
        found = dict(zip(self.trained, self.ema.shadow_params, strict=True)) if averaged and self.ema else self.trained
        return dict(self._whole(found.items()))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters hold their averages inside the block, if there are any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, samples: Samples, write_student: Callable[[Path], None]) -> None:
        """Write a checkpoint, unless this step has one."""
        if self._saved == self.step:
            return
        config, scaler = self.config, self.ranks.accelerator.scaler
        numbers = {
            "config": json.loads(config.to_json()),
            "samples": samples.digest,
            "bad": self.bad,
            "seconds": self.seconds,
            "ema_steps": self.ema.optimization_step if self.ema else 0,
            "scaler": scaler.state_dict() if scaler is not None else {},
            **self._numbers(),
        }
        checkpoint.save(
            config.out / "checkpoints", self.step, self._whole(self._tensors()), numbers, write_student, keep=config.keep,
            writes=self.ranks.first,
        )  # fmt: skip
        self._saved = self.step
        self.ranks.wait()

    def resume(self, samples: Samples) -> None:
        """Take up the newest checkpoint of the run, if there is one.

        Raises:
            ValueError: if it is of a run with other options or samples, or does not fit.
        """
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
        if about["step"] > config.steps:
            raise ValueError(
                f"the run in {config.out} is at step {about['step']}, asked are steps={config.steps}; ask for as many or more"
            )
        if about["samples"] != samples.digest:
            raise ValueError(f"the run in {config.out} began on other samples than those in {samples.folder}")
        targets: dict[str, Tensor] = {f"trained.{name}": value for name, value in self.trained.items()}
        if self.ema is not None:
            targets |= {f"ema.{name}": value for name, value in zip(self.trained, self.ema.shadow_params, strict=True)}
            self.ema.optimization_step = about["ema_steps"]
        for name, value in checkpoint.restore(file, targets):
            _, key, path = name.split(".", 2)
            parameter = self.trained[path]
            kept = self.optimizer.state.setdefault(parameter, {})
            if value.ndim and value.shape == parameter.shape and value.is_floating_point():
                value = checkpoint.like(value, parameter)
            elif value.ndim:
                value = value.to(parameter.device)
            kept[key] = value
        for path, numbers in about.get("optimizer", {}).items():
            self.optimizer.state.setdefault(self.trained[path], {}).update(numbers)
        self.optimizer.param_groups[0].update(about.get("optimizer_group", {}))
        if about["scaler"] and self.ranks.accelerator.scaler is not None:
            self.ranks.accelerator.scaler.load_state_dict(about["scaler"])
        self.step = self._saved = about["step"]
        self.bad, self.seconds = about["bad"], about.get("seconds", 0.0)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for place, (name, parameter) in enumerate(self.trained.items()):
            yield f"trained.{name}", parameter
            if self.ema is not None:
                yield f"ema.{name}", self.ema.shadow_params[place]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer.{key}.{name}", value

    def _whole(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Gather each; the first process copies it to the CPU, others only take part, and get none."""
        for name, value in tensors:
            gathered = checkpoint.gathered(value)
            if self.ranks.first:
                yield name, gathered.to("cpu", copy=True).contiguous()

    def _numbers(self) -> dict[str, Any]:
        """What optimisers keep as plain numbers, for each parameter and for all: Prodigy's step and learning rate."""
        each = {}
        for name, parameter in self.trained.items():
            kept = self.optimizer.state.get(parameter, {})
            if found := {key: value for key, value in kept.items() if isinstance(value, (int, float))}:
                each[name] = found
        group = self.optimizer.param_groups[0]
        plain = {key: value for key, value in group.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        return {"optimizer": each, "optimizer_group": plain}
