"""Read a picture of the emoji world back: which background, which sprites, in which tint and where.

The reader never sees the caption, so it can judge pictures that a model made from one. It explains a picture with the
world's own drawing rule (the mathematics is in `matching.py`):

1. Background: the gradient and light that most pixels agree with; what differs from it is foreground.
2. Proposals, at a small size: squares whose foreground some sprite explains, best first, not overlapping.
3. Refinement, at a larger size: every kind at near-by places and sides, beside plain round blobs. A sprite has a kind only
   if that kind explains most of the square *and* clearly more than the next shape.
4. What is not surely read is tried again with turned sprites. Foreground that is still unexplained and as large as a
   sprite is listed with kind None: there is something, but it cannot be told what.

`score` then compares a reading with a caption. Needs only NumPy and Pillow.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from .matching import OVERLAP, Square, fit_background, leftover, look, overlap, proposals, split, to_size
from .world import Clause, parse_caption

__all__ = ["Found", "Reading", "Score", "read", "score"]

COARSE, FINE = 24, 44  # short side in pixels for proposals and for refinement
SURE, ENOUGH = 0.4, 0.16  # confidence at which an upright sprite is taken at once; at which a kind is named at all
UPRIGHT, TURNED, FINER = (0.0,), (-14.0, 0.0, 14.0), (-6.0, 6.0)  # degrees of proposals, and tried around them
BACKING = 0.2  # share of the picture that must agree with a background for it to be named
MOST = 8  # things listed at most


@dataclass(frozen=True)
class Found:
    """One thing seen in a picture."""

    kind: str | None  # None: it cannot be told what it is
    tint: str | None  # None if the kind is
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 of its square, as fractions of width and height
    confidence: float  # 0 to 1: how much the kind explains, and how far the next shape is behind; 0 if unknown


@dataclass(frozen=True)
class Reading:
    """What a picture shows; sprites from left to right."""

    background: str | None  # None: no background fits a fifth of the picture
    sprites: tuple[Found, ...]


@dataclass(frozen=True)
class Score:
    """How a reading agrees with a caption; see `score`."""

    kinds: bool  # the kinds read are exactly those of the caption: none missing, none more, nothing unknown
    background: bool
    sprites: int  # sprites in the caption
    sprites_right: int  # ... that were read with their kind
    extra: int  # things read beyond those, unknown things among them
    named: int  # tints that the caption names
    tints_right: int  # ... that were read on a sprite of their kind


def read(image: Image.Image | np.ndarray) -> Reading:
    """Read a picture of any size and aspect.

    Args:
        image: a PIL image, or uint8 RGB of shape (H, W, 3).
    """
    image = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    small = to_size(image, COARSE)
    background, backing, line = fit_background(small)
    coarse, fine = split(small, line), split(to_size(image, FINE), line)
    seen: list[tuple[Square, str | None, str | None, float]] = []
    for turns, around, enough in ((UPRIGHT, (), SURE), (TURNED, FINER, ENOUGH)):
        left = coarse.without([one[0] for one in seen])
        if leftover(left) is None:
            break
        for proposal in proposals(left, turns):
            square, kind, tint, confidence = look(fine, proposal, around)
            if kind and confidence >= enough and all(overlap(square, other[0]) < OVERLAP for other in seen):
                seen.append((square, kind, tint, confidence))
    left = coarse.without([one[0] for one in seen])
    while len(seen) < MOST and (rest := leftover(left)):
        seen.append((rest, None, None, 0.0))
        left = left.without([rest])
    width, height = (side / min(image.size) for side in image.size)
    sprites = [Found(kind, tint, _box(square, width, height), confidence) for square, kind, tint, confidence in seen]
    sprites.sort(key=lambda one: one.box[0] + one.box[2])
    return Reading(background if backing >= BACKING else None, tuple(sprites))


def _box(square: Square, width: float, height: float) -> tuple[float, float, float, float]:
    x, y, side, _ = square
    left, right = (min(1.0, max(0.0, float(edge) / width)) for edge in (x - side / 2, x + side / 2))
    top, bottom = (min(1.0, max(0.0, float(edge) / height)) for edge in (y - side / 2, y + side / 2))
    return left, top, right, bottom


def score(reading: Reading, caption: str) -> Score:
    """Compare a reading with the caption its picture was made from. Places and order do not count.

    - A sprite of the caption is right if something of its kind was read; two sprites of a kind need two.
    - The picture's kinds are right if all its sprites are and nothing else was read.
    - A named tint is right if it was read on a sprite of its kind. Where several of a kind were read, they are given to the
      caption's sprites in the way that makes most tints right. A sprite that was missed has its tint wrong.

    Raises:
        ValueError: the caption is not of this world.
    """
    clauses, background = parse_caption(caption)
    wanted: Counter[str | None] = Counter(clause.kind for clause in clauses)
    found: Counter[str | None] = Counter(one.kind for one in reading.sprites)
    tints = sum(
        _tints_right([c for c in clauses if c.kind == kind], [s.tint for s in reading.sprites if s.kind == kind])
        for kind in wanted
    )
    right = (wanted & found).total()
    return Score(
        kinds=wanted == found,
        background=reading.background == background,
        sprites=len(clauses),
        sprites_right=right,
        extra=len(reading.sprites) - right,
        named=sum(clause.tint is not None for clause in clauses),
        tints_right=tints,
    )


def _tints_right(clauses: list[Clause], tints: list[str | None]) -> int:
    """Most named tints that any assignment of read tints to clauses makes right."""
    padded = tints + [None] * (len(clauses) - len(tints))
    ways = permutations(padded, len(clauses))
    return max(sum(c.tint is not None and c.tint == t for c, t in zip(clauses, way, strict=True)) for way in ways)
