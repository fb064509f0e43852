"""Everything a test may ask for. No test may touch the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of diffusers or transformers
os.environ["DIFFUSERS_ATTN_CHECKS"] = "1"

import copy
from collections.abc import Iterator
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


@pytest.fixture
def flex_without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block-sparse kernel as torch computes it without its compiler, which takes long."""
    from reattend.attn_processors.ops import flex

    flex._kernel.cache_clear()

    def run(q: Any, k: Any, v: Any, mask: Any, score: Any, scale: float) -> Any:
        return flex.flex_attention(q, k, v, score_mod=score, block_mask=mask, scale=scale)

    monkeypatch.setattr(flex, "compiled_kernel", lambda: run)
    yield
    flex._kernel.cache_clear()
