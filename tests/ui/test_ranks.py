"""`reattend image` under torchrun: the picture of one process, written once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from PIL import Image

from reattend.pipelines import Recipe, generate
from reattend.ui.ranks import Ranks, joined

SPLIT = ["--width", "48", "--height", "64", "--steps", "2", "--attention", "clear", "radius=3"]


def test_one_process_is_left_alone():
    recipe = Recipe(prompt="a cat on sand")
    with joined(None) as ranks:
        assert ranks == Ranks() and ranks.speaks and not ranks.split
        assert ranks.device("cuda:3") == "cuda:3" and ranks.device(None) is None
        assert ranks.seeded(recipe) is recipe


class Started(Exception):
    """In place of a process group."""


@pytest.fixture
def starting(monkeypatch) -> None:
    """Two processes that torchrun started on this host, of which this is the second; they get no further than to a group."""

    def group(backend, **kwargs):
        raise Started(backend, os.environ.get("TORCH_NCCL_BLOCKING_WAIT"))

    monkeypatch.setattr(dist, "init_process_group", group)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCH_NCCL_BLOCKING_WAIT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT")
    monkeypatch.setenv("LOCAL_RANK", "1")


@pytest.mark.parametrize("given", [None, "0"])
def test_messages_between_cards_are_waited_for_unless_one_says_otherwise(given, starting, monkeypatch):
    if given is not None:
        monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", given)
    with pytest.raises(Started) as asked, joined(None):
        pass
    assert asked.value.args[1] == (given or "1")


def test_processes_on_a_cpu_want_no_cards_and_those_on_cards_one_each(starting, monkeypatch):
    taken, cards = [], 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    with pytest.raises(Started) as asked, joined("cpu"):
        pass
    assert asked.value.args[0] == "gloo" and not taken
    for wanted in (None, "cuda"):
        with (
            pytest.raises(ValueError, match="2 processes, 1 GPUs; start at most 1 .*, or use --device cpu"),
            joined(wanted),
        ):
            pass
    cards = 2
    with pytest.raises(Started) as asked, joined("cuda"):
        pass
    assert asked.value.args[0] == "cpu:gloo,cuda:nccl" and taken == [1]


def test_two_processes_make_and_write_the_picture_of_one(tmp_path):
    folder = tmp_path / "tiny-flux"
    tiny.flux_pipeline().save_pretrained(folder)
    out = tmp_path / "cat.png"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += [
        "reattend.ui.cli",
        "image",
        "a cat on sand",
        "--model",
        str(folder),
        "--out",
        str(out),
        "--json",
        *SPLIT,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # one process speaks
    recipe = Recipe.read(out)
    assert recipe.seed == json.loads(line)["recipe"]["seed"]  # drawn once, for all
    alone = np.asarray(generate(recipe).image, dtype=int)
    assert np.abs(alone - np.asarray(Image.open(out), dtype=int)).max() <= 1  # rounding to bytes
