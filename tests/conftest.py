"""Everything a test may ask for. No test may touch the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of diffusers or transformers
os.environ["DIFFUSERS_ATTN_CHECKS"] = "1"

from typing import Any

import pytest
import tiny


@pytest.fixture
def sd() -> Any:
    """A tiny Stable Diffusion pipeline of its own for every test."""
    return tiny.fresh(tiny.sd())


@pytest.fixture
def sdxl() -> Any:
    return tiny.fresh(tiny.sdxl())


@pytest.fixture
def sd_controlnet() -> Any:
    return tiny.fresh(tiny.sd_controlnet())


@pytest.fixture
def animatediff() -> Any:
    return tiny.fresh(tiny.animatediff())
