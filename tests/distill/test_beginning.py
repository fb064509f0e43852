"""What comes before the first step: samples that have to be made, and a folder that nobody else works in."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from holding import held_elsewhere
from PIL import Image

from reattend.distill import distill
from reattend.distill.checkpoint import checkpoints
from reattend.distill.shards import Samples


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_prompts_in_place_of_samples_are_sampled_first_and_pictures_are_compared(flux, config, tmp_path):
    (tmp_path / "prompts.txt").write_text("# two\na cat\n\na dog\n")
    settings = config(
        data=tmp_path / "prompts.txt", steps=2, batch=2, micro_batch=2, validate_every=2, validation_prompts=("a cat", "a hat"),
        validation_steps=2, trackers=("tensorboard",),
    )  # fmt: skip
    told: list[tuple[int, int]] = []
    distill(settings, pipe=flux, on_sample=lambda *counts: told.append(counts))
    assert set(told) == {(2, 2)}
    assert len(Samples(settings.out / "data")) == 2
    with Image.open(settings.out / "pictures" / "step-00000002.png") as picture:
        assert picture.size == (2 * 32, 2 * 32)  # a row for each prompt: teacher, student
    assert "validation_latent_error" in lines(settings.out)[-1]
    assert list(settings.out.rglob("events.out.tfevents*"))
    shard = settings.out / "data" / "shard-00000.safetensors"
    made = shard.stat().st_mtime_ns
    assert distill(replace(settings, steps=3, validation_steps=1), pipe=flux).step == 3  # its samples are as they were
    assert shard.stat().st_mtime_ns == made


def test_a_signal_ends_the_making_of_samples_at_once(flux, config, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"cat {i}\n" for i in range(6)))
    settings = config(data=tmp_path / "prompts.txt", steps=1, batch=2, micro_batch=2, validation_steps=1)
    told: list[tuple[int, int]] = []

    def interrupt(*counts: int) -> None:
        told.append(counts)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(settings, pipe=flux, on_sample=interrupt)
    assert told == [(4, 6)] and not checkpoints(settings.out / "checkpoints")
    assert distill(settings, pipe=flux).finished


def test_two_processes_do_not_train_in_one_folder(flux, config):
    settings = config(steps=1)
    with held_elsewhere(settings.out):
        with pytest.raises(ValueError, match=r"another process works in .*run; wait for its end, or choose another"):
            distill(settings, pipe=flux)
        assert not (settings.out / "log.jsonl").exists()
    assert distill(settings, pipe=flux).finished  # the other was killed
