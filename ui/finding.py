"""Finds the characters of the bundled models in their pictures, with the reader of the emoji world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from ..pipelines.load import bundled

__all__ = ["finder"]


def finder(model: str) -> Callable[[Image.Image, list[str]], Sequence[Any]] | None:
    """What `story` takes as `find` for a model: the reader for bundled models, None (attention maps) for others."""
    return find_emoji if model in bundled() else None


def find_emoji(picture: Image.Image, phrases: list[str]) -> list[tuple[float, float, float, float] | None]:
    """The box of each phrase, which ends in a kind of the emoji world; of two of a kind the left one is the first."""
    from ..emoji_world.read import read

    seen = list(read(picture).sprites)  # from left to right
    boxes = []
    for phrase in phrases:
        kind = phrase.lower().split()[-1]
        one = next((sprite for sprite in seen if sprite.kind == kind), None)
        boxes.append(None if one is None else one.box)
        if one is not None:
            seen.remove(one)
    return boxes
