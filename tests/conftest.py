"""Everything a test may ask for. No test may touch the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of diffusers or transformers
os.environ["DIFFUSERS_ATTN_CHECKS"] = "1"

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny


@pytest.fixture
def sd() -> Any:
    """A tiny Stable Diffusion pipeline of its own for every test."""
    return tiny.fresh(tiny.sd())


@pytest.fixture
def unet() -> Any:
    """The denoiser of `sd` alone."""
    return copy.deepcopy(tiny.sd().unet)


@pytest.fixture
def sdxl() -> Any:
    return tiny.fresh(tiny.sdxl())


@pytest.fixture
def sd3() -> Any:
    return tiny.fresh(tiny.sd3_pipeline())


@pytest.fixture
def flux() -> Any:
    return tiny.fresh(tiny.flux_pipeline())


@pytest.fixture
def sd_controlnet() -> Any:
    return tiny.fresh(tiny.sd_controlnet())


@pytest.fixture
def animatediff() -> Any:
    return tiny.fresh(tiny.animatediff())


@pytest.fixture(scope="session")
def animatediff_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny AnimateDiff pipeline as a diffusers folder; read it, do not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-films"
    tiny.animatediff().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion pipeline as a diffusers folder; read it, do not change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny.sd().save_pretrained(folder)
    return folder
