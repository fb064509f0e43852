"""A run that is killed in the middle and started again is the run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from reattend.distill.checkpoint import checkpoints
from reattend.ui.cli import main

pytestmark = pytest.mark.slow
PATIENCE = 300  # seconds


def last_step(log: Path) -> int:
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def test_kill_9_and_go_on_gives_the_same_weights(flux_samples, tmp_path, capsys):
    tiny.flux_pipeline().save_pretrained(tmp_path / "model")
    run = ["distill", "run", "--model", str(tmp_path / "model"), "--data", str(flux_samples), "--batch", "4",
           "--micro-batch", "2", "--attention", "clear", "radius=2", "--lr", "1e-3",
           "--set", "log_every=1", "save_every=3", "ema=0.9"]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as this process: sums must be cut into the same pieces
    command = [sys.executable, "-m", "reattend.ui.cli", *run, "--out", str(killed), "--steps", "1000000"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + PATIENCE
        while last_step(killed / "log.jsonl") < 5 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        process.kill()  # SIGKILL: nothing of ours hears of it
    said = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, said
    kept = int(checkpoints(killed / "checkpoints")[0].name.removeprefix("step-"))
    assert kept >= 3, said
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for out in (killed, whole):
            assert main([*run, "--out", str(out), "--steps", str(kept + 4)]) == 0
    finally:
        torch.set_num_threads(threads)
    for name in ("student/student.safetensors", "student-raw/student.safetensors"):
        a, b = (load_file(out / name) for out in (killed, whole))
        assert list(a) == list(b) and [name for name in a if not torch.equal(a[name], b[name])] == []
    a, b = (load_file(checkpoints(out / "checkpoints")[0] / "state.safetensors") for out in (killed, whole))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    steps = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, kept + 5))  # what was logged after the checkpoint is told once
