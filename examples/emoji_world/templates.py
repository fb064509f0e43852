"""Sprites as templates for matching: the colour of a pixel as a linear function of the tint.

A tinted sprite shows `0.3 t` in its darks, `t` in its middle and `t + 0.72 (1 - t)` in its lights, and everything between by
interpolation (`world._tinted`). So its colour times alpha is `A t + B` with two grey maps A and B that depend on the kind
alone. A, B and alpha are all that matching needs, for every tint at once.

After the kinds come a hard and a soft round blob. They stand for the half-formed things that a model draws before it can
draw sprites: where a blob fits about as well as a kind, there is no kind to be seen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .world import CELL, KINDS, MIDDLE, TINTS, _shaded

__all__ = ["SHAPES", "TINT_COLOURS", "Templates", "templates"]

SHAPES = (*KINDS, "hard blob", "soft blob")
TINT_COLOURS = np.array(list(TINTS.values()), np.float32) / 255  # (8, 3)


@dataclass(frozen=True)
class Templates:
    """All shapes at one side (pixels) and angle (degrees); the maps have shape (shapes, side * side)."""

    a: np.ndarray  # alpha times the part of the colour that the tint scales
    b: np.ndarray  # alpha times the white part
    alpha: np.ndarray
    rows_aa: np.ndarray  # sums over each row of alpha * a, shape (shapes, side)
    rows_ab: np.ndarray  # ... of alpha * b
    rows_al: np.ndarray  # ... of alpha * alpha
    sum_aa: np.ndarray  # sum of a * a, shape (shapes,)
    sum_ab: np.ndarray
    sum_bb: np.ndarray


@functools.cache
def _maps(shape: str) -> np.ndarray:
    """A, B and alpha of a shape at full size, shape (3, CELL, CELL)."""
    if shape not in KINDS:
        ramp = (np.arange(CELL, dtype=np.float32) + 0.5) / CELL - 0.5
        radius = np.hypot(ramp[:, None], ramp)
        alpha = np.clip((0.4 - radius) * CELL, 0, 1) if shape == "hard blob" else np.exp(-0.5 * (radius / 0.22) ** 2)
        return np.stack([alpha, np.zeros_like(alpha), alpha]).astype(np.float32)
    grey, alpha = np.moveaxis(_shaded(shape), -1, 0)
    below, above = np.minimum(grey / MIDDLE, 1), np.clip((grey - MIDDLE) / (1 - MIDDLE), 0, 1)
    return np.stack([alpha * (0.3 + 0.7 * below - 0.72 * above), alpha * 0.72 * above, alpha])


@functools.lru_cache(maxsize=16)
def _turned(angle: float) -> list[list[Image.Image]]:
    """`_maps` of all shapes as images turned counter-clockwise by `angle` degrees."""
    planes = [[Image.fromarray(plane) for plane in _maps(shape)] for shape in SHAPES]
    return [[plane.rotate(angle, Image.Resampling.BICUBIC) if angle else plane for plane in maps] for maps in planes]


@functools.lru_cache(maxsize=256)  # about 50 MB
def templates(side: int, angle: float = 0.0) -> Templates:
    """Templates of all shapes, drawn as `world.draw` draws sprites."""
    filter = Image.Resampling.BOX if side <= CELL // 2 else Image.Resampling.BICUBIC
    maps = np.array([[plane.resize((side, side), filter) for plane in planes] for planes in _turned(angle)], np.float32)
    a, b, alpha = maps = np.ascontiguousarray(maps.swapaxes(0, 1))  # each (shapes, side, side)
    return Templates(
        *(plane.reshape(len(SHAPES), -1) for plane in maps),
        *((alpha * plane).sum(axis=-1) for plane in maps),
        *(np.einsum("kyx,kyx->k", p, q) for p, q in ((a, a), (a, b), (b, b))),
    )
