"""Samples of the tiny pipelines, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from reattend.distill import DistillConfig, make_dataset

PROMPTS = ["a cat", "a blue car", "two hats on sand"]


@pytest.fixture(scope="session")
def flux_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 samples of tiny FLUX: 8 of 32 x 32 pixels, 4 of 48 x 32. Read them, do not change them."""
    folder = tmp_path_factory.mktemp("samples") / "flux"
    sizes = [(32, 32), (48, 32)]
    pipe = tiny.fresh(tiny.flux_pipeline())
    return make_dataset(pipe, folder, prompts=PROMPTS, samples=12, steps=2, shard=4, sizes=sizes, text_length=16)


@pytest.fixture
def config(flux_samples: Path, tmp_path: Path) -> Any:
    """Makes a configuration: a few steps on tiny FLUX with CLEAR."""

    def make(**changes: Any) -> DistillConfig:
        settings = {
            "model": "tiny-random-flux", "data": flux_samples, "out": tmp_path / "run", "steps": 10, "batch": 4,
            "micro_batch": 2, "lr": 1e-3, "attention": {"name": "clear", "radius": 2}, "log_every": 2, "save_every": 100,
        }  # fmt: skip
        return DistillConfig(**(settings | changes))

    return make
