"""What a step does with gradients that are large, scaled, or no numbers, and who copies the state that it leaves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reattend.distill import distill
from reattend.distill import trainer as trainer_module
from reattend.distill.checkpoint import checkpoints
from reattend.distill.ranks import Ranks
from reattend.distill.state import TrainState


def settings(**changes: Any) -> Any:
    plain = {"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.0, "parallel": "ddp", "ema": 0.5, "clip": 1.0,
             "precision": "float32", "bad_steps": 3}  # fmt: skip
    return SimpleNamespace(**plain | changes)


def one_of(rank: int, size: int = 1) -> Ranks:
    """A process among others, which only tells who it is."""
    return Ranks(SimpleNamespace(
        device=torch.device("cpu"), process_index=rank, num_processes=size, scaler=None,
        prepare_optimizer=lambda optimizer: optimizer, unscale_gradients=lambda optimizer: None,
    ))  # fmt: skip


@pytest.mark.parametrize(("most", "left"), [(0.0, 30.0), (3.0, 3.0), (50.0, 30.0)])
def test_gradients_are_scaled_down_to_the_largest_norm_and_0_is_none(most, left):
    parameter = torch.nn.Parameter(torch.zeros(9))
    parameter.grad = torch.full((9,), 10.0)
    assert one_of(0).clip(None, [parameter], most) == 30.0
    assert float(parameter.grad.norm()) == pytest.approx(left, rel=1e-5)


def test_float16_scales_its_gradients_and_takes_back_the_steps_that_overflow():
    """Its branch, with a scaler for the CPU, where accelerate has none."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState

    class Scaled(Accelerator):
        mixed_precision = property(lambda self: "fp16")

    AcceleratorState._reset_state()
    accelerator = Scaled(cpu=True)
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    accelerator.prepare_optimizer = lambda optimizer: AcceleratedOptimizer(
        optimizer, device_placement=False, scaler=accelerator.scaler
    )
    try:
        parameter = torch.nn.Parameter(torch.ones(4))
        state = TrainState({"x": parameter}, settings(precision="float16"), Ranks(accelerator))
        told = []
        for size in (1.0, math.inf, 1.0):
            before, averaged = parameter.detach().clone(), state.ema.shadow_params[0].clone()
            accelerator.scaler.scale((parameter * size).sum()).backward()
            norm = state.update(0.1)
            moved = not torch.equal(parameter, before), not torch.equal(state.ema.shadow_params[0], averaged)
            told.append((math.isfinite(norm), *moved, state.bad, accelerator.scaler.get_scale()))
            assert norm == pytest.approx(2.0) or size == math.inf  # not of the scaled gradients
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert told == [(True, True, True, 0, 2.0**16), (False, False, False, 1, 2.0**15), (True, True, True, 0, 2.0**15)]
    assert state.step == 3


def test_steps_whose_loss_is_no_number_change_nothing_and_many_of_them_end_the_run(flux, config, monkeypatch):
    wanted = config(steps=4, ema=0.5, log_every=1)
    whole = trainer_module.student_losses

    def broken(*args: Any, **kwargs: Any) -> Any:
        losses = whole(*args, **kwargs)
        return replace(losses, total=losses.total * float("nan"))

    distill(replace(wanted, steps=1), pipe=flux)
    monkeypatch.setattr(trainer_module, "student_losses", broken)
    distill(replace(wanted, steps=2), pipe=flux)
    one, two = (load_file(path / "state.safetensors") for path in reversed(checkpoints(wanted.out / "checkpoints")))
    assert list(one) == list(two) and all(torch.equal(value, two[name]) for name, value in one.items())
    with pytest.raises(RuntimeError, match="no numbers 3 steps in a row"):
        distill(replace(wanted, bad_steps=3, out=wanted.out.with_name("bad")), pipe=flux)


def test_a_skipped_step_is_told_once_and_left_out_of_the_means(flux, config, monkeypatch, caplog):
    wanted = config(steps=5, log_every=1, batch=2, micro_batch=1, lr=0.0)
    distill(wanted, pipe=flux)
    single = lines(wanted.out)
    whole, calls = trainer_module.student_losses, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        losses = whole(*args, **kwargs)
        calls.append(losses)
        bad = len(calls) in (3, 4, 9)  # micro batches of steps 2 and 5
        return replace(losses, total=losses.total * float("nan"), flow=losses.flow * float("inf")) if bad else losses

    monkeypatch.setattr(trainer_module, "student_losses", broken)
    distill(replace(wanted, log_every=4, out=wanted.out.with_name("broken")), pipe=flux)
    four, last = lines(wanted.out.with_name("broken"))
    good = [single[i] for i in (0, 2, 3)]
    for name in ("loss", "flow", "output", "attention"):
        assert four[name] == pytest.approx(sum(line[name] for line in good) / 3, rel=1e-5)
    layer = next(iter(four["layers"]))
    assert four["layers"][layer] == pytest.approx(sum(line["layers"][layer] for line in good) / 3, rel=1e-5)
    assert four["skipped"] == 1 and four["gradient_norm"] > 0
    assert (last["skipped"], last["loss"], last["gradient_norm"], last["layers"][layer]) == (1, None, None, None)
    assert "skipped" not in single[0]
    told = [message for message in caplog.messages if "changed nothing" in message]
    assert told == [f"step {step} changed nothing: its gradients were no numbers" for step in (2, 5)]


def lines(run: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "log.jsonl").read_text().splitlines()]


def test_only_the_first_process_copies_the_state_to_the_host():
    """Without numbers, of which nothing can be copied."""
    with torch.device("meta"):
        parameter = torch.nn.Parameter(torch.ones(4))
        other = TrainState({"x": parameter}, settings(), one_of(1, 2))
        first = TrainState({"x": parameter}, settings(), one_of(0, 2))
    assert other.values() == {} and dict(other._whole(other._tensors())) == {}
    with pytest.raises(NotImplementedError, match="meta"):
        first.values()
