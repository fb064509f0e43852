"""Several processes compute what one does, whole models (DDP) and shared ones (FSDP2), over gloo on the CPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from reattend.distill import distill, load_linear
from reattend.distill.checkpoint import checkpoints
from reattend.pipelines import CancelToken

pytestmark = pytest.mark.slow
ROUNDING = 1e-5  # sums of a batch in another order, fp32, through 6 steps of AdamW with eps 1e-8
WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def runs(flux_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder with ddp and fsdp: 2 processes, stopped once; single: one process with the same batch; some in bfloat16).

    `begun` was begun by one process and ended by two.
    """
    from reattend.distill import DistillConfig

    folder = tmp_path_factory.mktemp("runs")
    settings = DistillConfig(
        model="tiny-random-flux", data=flux_samples, out=folder / "single", steps=6, batch=4, micro_batch=1, lr=1e-3,
        attention={"name": "clear", "radius": 2, "pool": 2}, log_every=2, ema=0.9, checkpointing=True,
        validate_every=3, validation_prompts=("a cat",), validation_steps=1,
    )  # fmt: skip
    settings.write(folder / "config.json")
    token = CancelToken()
    begun = replace(settings, out=folder / "begun")
    assert not distill(
        begun, pipe=tiny.fresh(tiny.flux_pipeline()), cancel=token, on_step=lambda _: token.request()
    ).finished
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=280, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    pipe = tiny.fresh(tiny.flux_pipeline())
    distill(settings, pipe=pipe)
    half = replace(settings, precision="bfloat16", steps=2, out=folder / "single-bfloat16")
    distill(half, pipe=copy.deepcopy(tiny.flux_pipeline()).to(torch.bfloat16))
    return folder


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run / "checkpoints")[0] / "state.safetensors")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "begun"])
def test_two_processes_are_one_with_the_same_batch(runs, parallel):
    got, want = state(runs / parallel), state(runs / "single")
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=ROUNDING, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    moved = [name for name in want if name.startswith("trained.")]
    stock = tiny.flux_pipeline().transformer
    assert any(
        (want[name] - dict(stock.named_parameters()).get(name[8:], want[name])).abs().max() > 1e-3 for name in moved
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "begun"])
def test_pictures_in_between_are_those_of_one_process(runs, parallel):
    def told(name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (runs / name / "log.jsonl").read_text().splitlines()]
        return [line for line in lines if "validation_latent_error" in line]

    got, want = told(parallel), told("single")
    assert [line["step"] for line in got] == [line["step"] for line in want] == [3, 6]
    for line, other in zip(got, want, strict=True):
        assert abs(line["validation_latent_error"] - other["validation_latent_error"]) < 10 * ROUNDING
        name = f"pictures/step-{line['step']:08d}.png"
        pixels = [np.asarray(Image.open(runs / run / name)).astype(int) for run in (parallel, "single")]
        assert abs(pixels[0] - pixels[1]).max() <= 1


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_two_processes_saved_loads_on_one(runs, parallel, flux):
    stock = tiny.run(flux)
    load_linear(flux, runs / parallel / "student")
    got = tiny.run(flux)
    load_linear(flux, runs / "single" / "student")
    torch.testing.assert_close(got, tiny.run(flux), atol=10 * ROUNDING, rtol=0)
    assert (got - stock).abs().max() > 100 * ROUNDING


def test_shared_weights_train_in_16_bits(runs):
    """Frozen weights in bfloat16 beside trained ones in fp32, cut over the processes together."""
    got, want = state(runs / "fsdp-bfloat16"), state(runs / "single-bfloat16")
    assert set(got) == set(want) and {value.dtype for value in got.values()} == {torch.float32}
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=ROUNDING, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    stock = dict(tiny.flux_pipeline().transformer.named_parameters())
    moved = [value - stock[name[8:]].detach().bfloat16() for name, value in got.items() if name[8:] in stock]
    assert max(float(value.abs().max()) for value in moved) > 1e-3
