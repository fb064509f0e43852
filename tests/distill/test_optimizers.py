"""Optimisers by name: they train, go on bit for bit, and say what to install."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reattend.distill import distill
from reattend.distill.checkpoint import checkpoints
from reattend.distill.plan import memory_plan

STUDENT = "student/student.safetensors"


class Restless(torch.optim.Optimizer):
    """Keeps all that optimisers keep: moments, other tensors, whole numbers, and a learning rate of its own."""

    def __init__(self, params: Any, lr: float, weight_decay: float, safeguard_warmup: bool):
        print("hello")
        super().__init__(params, {"lr": lr, "d": 1e-4, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        for p in group["params"]:
            kept = self.state[p]
            if not kept:
                kept |= {"step": 0, "moment": torch.zeros_like(p), "codes": torch.zeros(3, dtype=torch.uint8)}
                kept["first"] = p.flatten()[:2].clone()
            kept["step"] += 1
            kept["moment"].lerp_(p.grad, 0.1)
            kept["codes"] += kept["step"]
            pull = 1e-3 * float(kept["codes"][0]) * kept["first"].mean()
            p.add_(kept["moment"] + pull, alpha=-group["lr"] * group["d"])
        group["k"] += 1
        group["d"] *= 1.5 + 0.1 * group["k"]


def assert_goes_on(settings: Any, pipe: Any) -> None:
    parts = replace(settings, out=settings.out.with_name("parts"))
    distill(settings, pipe=pipe)
    distill(replace(parts, steps=settings.steps // 2), pipe=pipe)
    distill(parts, pipe=pipe)
    a, b = (load_file(run.out / STUDENT) for run in (settings, parts))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    a, b = (load_file(checkpoints(run.out / "checkpoints")[0] / "state.safetensors") for run in (settings, parts))
    assert list(a) == list(b) and [name for name in a if not torch.equal(a[name], b[name])] == []


def test_all_that_an_optimiser_keeps_comes_back(flux, config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prodigyopt", SimpleNamespace(Prodigy=Restless))
    assert_goes_on(config(optimizer="prodigy", lr=1.0, steps=6), flux)
    assert capsys.readouterr().out == ""


def test_prodigy_trains_and_goes_on(flux, config):
    pytest.importorskip("prodigyopt", reason="the optional package prodigyopt is not installed")
    assert_goes_on(config(optimizer="prodigy", lr=1.0, steps=6, warmup=2), flux)


class EightBit(Restless):
    """As bitsandbytes' AdamW8bit: moments are codes, and what it computes on shows in its first step."""

    devices: tuple[str, ...] = ("cpu",)

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0):
        super().__init__(params, lr, weight_decay, safeguard_warmup=False)

    def step(self, closure: Any = None) -> None:
        if (device := self.param_groups[0]["params"][0].device.type) not in self.devices:
            raise NotImplementedError(f"no kernel\nfor {device}.")
        super().step()


def test_eight_bits_run_where_their_package_does(flux, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=EightBit)))
    assert_goes_on(config(optimizer="adamw-8bit", steps=4), flux)
    monkeypatch.setattr(EightBit, "devices", ("cuda",))
    steps: list[Any] = []
    words = r"'adamw-8bit' does not run on cpu with this bitsandbytes \(no kernel for cpu\): pip install -U"
    settings = config(optimizer="adamw-8bit", out=config().out.with_name("refused"), log_every=1)
    with pytest.raises(ValueError, match=words):
        distill(settings, pipe=flux, on_step=steps.append)
    assert steps == [] and not (settings.out / "log.jsonl").exists()


def test_what_is_not_there_is_told(flux, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(
        ValueError, match=r"optimizer='prodigy' needs the package prodigyopt .*: pip install prodigyopt, or use"
    ):
        distill(config(optimizer="prodigy", lr=1.0), pipe=flux)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes .*: pip install bitsandbytes, or use"):
        distill(config(optimizer="adamw-8bit"), pipe=flux)
    with pytest.raises(ValueError, match=r"finds the learning rate itself .* got lr=0.001; set lr=1"):
        config(optimizer="prodigy")
    with pytest.raises(ValueError, match="wants one of 'adamw', 'adamw-8bit', 'prodigy', got 'sgd'"):
        config(optimizer="sgd")


def test_memory_follows_the_optimiser(config):
    flux = "black-forest-labs/FLUX.1-dev"
    plans = {
        name: memory_plan(config(model=flux, optimizer=name, lr=1.0)) for name in ("adamw", "adamw-8bit", "prodigy")
    }
    sizes = {name: plan.optimizer_bytes / plan.trained for name, plan in plans.items()}
    assert sizes == {"adamw": 8, "adamw-8bit": 2, "prodigy": 16}
