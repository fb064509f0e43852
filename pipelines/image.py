"""The picture job: recipe in, picture out, through the stock pipeline call with our attention inside.

Load, install, call, take everything out again. The pipeline's own code makes the picture; we only choose the generator,
listen after each step and keep what is needed to make the same picture once more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .events import CancelToken, StepEvent
from .recipe import Recipe

__all__ = ["Picture", "generate", "preview"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A finished picture and the recipe that makes it again: nothing in the recipe is left to chance or defaults."""

    image: Image.Image
    recipe: Recipe


def generate(
    recipe: Recipe,
    *,
    pipe: Any = None,
    on_step: Callable[[StepEvent], None] | None = None,
    cancel: CancelToken | None = None,
) -> Picture:
    """Make the picture that `recipe` describes. (Signature fixed; the body follows.)"""
    raise NotImplementedError


def preview(latents: torch.Tensor, pipe: Any, side: int = 256) -> Image.Image:
    """A small picture of unfinished `latents` (B, C, H, W), at most `side` pixels wide and high. (Body follows.)"""
    raise NotImplementedError
