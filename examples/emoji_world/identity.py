"""Does a film keep showing the same things? The reader looks at every frame and compares it with the first.

Run: python -m reattend.emoji_world.identity out/film.mp4 --frames 512

A frame counts if it shows the kinds and tints of the first frame, no more and no less, wherever they are by then. So all
hangs on that one frame, as it was asked: one that is misread makes all others wrong, and one with something that cannot be
told keeps nothing. So the largest share of frames that show the same is told besides, and how far things moved on the way: a
film that stands still keeps its identity easily. Their world moves at most a lattice cell a frame; more than two is a jump,
as at a cut, and no movement, so it is left out.
"""

from __future__ import annotations

import json as json_text
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from ..pipelines.film import frames_of
from .rates import Rate, rate
from .read import Found, read
from .world import LATTICE

__all__ = ["Identity", "centre_of", "identity", "judge", "name_of"]

SOMETHING = "something"  # that cannot be told
JUMP = 2 / LATTICE  # widths; what goes farther in one frame is another thing of that name, or was put elsewhere


@dataclass(frozen=True)
class Identity:
    """What the reader found in a film."""

    first: tuple[str, ...]  # "tint kind" of what the first frame shows, sorted
    kept: Rate  # frames that show the same, of all frames after the first
    alike: Rate  # frames that show what most of them show, of all frames
    travelled: float  # mean way of the things over the film without jumps, in picture widths

    def __str__(self) -> str:
        return (
            f"{' and '.join(self.first) or 'nothing'}: kept in {self.kept} of frames, {self.alike} are alike, "
            f"moved {self.travelled:.2f} widths"
        )


def identity(frames: Iterable[np.ndarray]) -> Identity:
    """Compare every frame with the first.

    Args:
        frames: uint8 RGB, each (H, W, 3).

    Raises:
        ValueError: for no frames.
    """
    return judge(read(frame).sprites for frame in frames)


def judge(readings: Iterable[Sequence[Found]]) -> Identity:
    """`identity` of frames that were read before: what the reader found in each. Raises ValueError for no frames."""
    first: list[str] | None = None
    shown: Counter[tuple[str, ...]] = Counter()
    before: dict[str, tuple[int, tuple[float, float]]] = {}  # the frame where a thing was last seen, and its centre
    right = asked = 0
    travelled = 0.0
    for frame, sprites in enumerate(readings):
        seen = sorted(name_of(one) for one in sprites)
        shown[tuple(seen)] += 1
        if first is None:
            first = seen
        else:
            asked += 1
            right += seen == first and bool(first) and SOMETHING not in first
        places = {name_of(one): (frame, centre_of(one)) for one in sprites if one.kind}
        for name, (_, (x, y)) in places.items():
            if name in before:
                last, (x0, y0) = before[name]
                way = float(np.hypot(x - x0, y - y0))
                travelled += way if way <= JUMP * (frame - last) else 0.0
        before = before | places
    if first is None:
        raise ValueError("there is no frame to look at; give a film that plays")
    alike = rate(max(shown.values()), shown.total())
    return Identity(tuple(first), rate(right, asked), alike, travelled / max(1, len(first)))


def name_of(one: Found) -> str:
    """ "tint kind", or "something"."""
    return f"{one.tint} {one.kind}" if one.kind else SOMETHING


def centre_of(one: Found) -> tuple[float, float]:
    """Of its square, as fractions of width and height."""
    x0, y0, x1, y1 = one.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def main(film: Annotated[Path, tyro.conf.Positional], frames: int | None = None, json: bool = False) -> None:
    """Tell how well a film keeps what its first frame shows.

    Args:
        film: MP4 of the emoji world.
        frames: look at so many from the first on; all if left out.
        json: print one JSON object.
    """
    found = identity(frames_of(film, frames))
    told = {"first": found.first, "right": found.kept.right, "asked": found.kept.asked, "alike": found.alike.right}
    told["travelled"] = found.travelled
    print(json_text.dumps(told) if json else found)


if __name__ == "__main__":
    tyro.cli(main)
