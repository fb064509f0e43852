"""Stories of the emoji world to be made, and how well their panels keep the characters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..pipelines.script import Panel, Script, Subject
from .read import Reading, score
from .world import BACKGROUNDS, KINDS, TINTS, with_article

__all__ = ["MEASURES", "PANELS", "Tale", "judge", "sample_tales", "tint_of"]

PANELS = 3
SAME_KIND = 0.2  # share of stories with two characters of one kind
MEASURES = ("tint kept", "present", "swapped", "fused", "kinds", "background")


@dataclass(frozen=True)
class Tale:
    """One story to make: (kind, tint) of every character, and the background of every panel."""

    characters: tuple[tuple[str, str], ...]
    backgrounds: tuple[str, ...]
    reference_background: str
    seed: int

    def caption(self, panel: int) -> str:
        return " and ".join(with_article(kind) for kind, _ in self.characters) + f" on {self.backgrounds[panel]}"

    def script(self, steps: int) -> Script:
        """The story, not yet saying who is where."""
        subjects = tuple(
            Subject(
                name=f"{i + 1}",
                phrase=kind,
                looks=f"{tint} {kind}",
                prompt=f"{with_article(f'{tint} {kind}')} on {self.reference_background}",
            )
            for i, (kind, tint) in enumerate(self.characters)
        )
        places = {subject.name: None for subject in subjects}
        panels = tuple(Panel(prompt=self.caption(i), places=dict(places)) for i in range(PANELS))
        return Script(subjects=subjects, panels=panels, steps=steps, seed=self.seed, together=PANELS)


def sample_tales(seed: int, pairs: int, triples: int) -> list[Tale]:
    """Stories of two characters and of three, a fifth of them with two of a kind; tints in a story differ."""
    rng = np.random.default_rng(seed)
    tales = []
    for number, count in enumerate([2] * pairs + [3] * triples):
        kinds = [str(kind) for kind in rng.choice(KINDS, count, replace=False)]
        if rng.random() < SAME_KIND:
            kinds[1] = kinds[0]
        tints = [str(tint) for tint in rng.choice(list(TINTS), count, replace=False)]
        places = [str(place) for place in rng.choice(list(BACKGROUNDS), PANELS + 1, replace=False)]
        tales.append(Tale(tuple(zip(kinds, tints, strict=True)), tuple(places[1:]), places[0], seed + number))
    return tales


def judge(tale: Tale, tints: Sequence[str], panels: Sequence[Reading], places: Sequence[Any]) -> dict[str, Any]:
    """Counts (right, asked) of every measure over the panels of one story, and how far characters move between panels.

    - present: a thing of the character's kind was read; two of a kind need two.
    - tint kept: of those present, with the tint of its reference. Of two of a kind, who is who goes by their places.
    - swapped: of those present, with the tint of another character and not with its own.
    - fused: panels with fewer things than characters, or with something that cannot be told.
    - kinds, background: panels that show what the caption says, and nothing else.

    Args:
        tints: of the characters, see `tint_of`.
        panels: what was read.
        places: for every panel the centre (x, y) of each character, or None where it has no place.
    """
    counts = {measure: [0, 0] for measure in MEASURES}
    centres: dict[int, list[tuple[float, float]]] = {}
    for number, reading in enumerate(panels):
        seen = _who_is_who(tale, reading, places[number])
        for i, sprite in enumerate(seen):
            counts["present"][1] += 1
            if sprite is None:
                continue
            counts["present"][0] += 1
            others = [tint for j, tint in enumerate(tints) if j != i]
            for measure, right in {
                "tint kept": sprite.tint == tints[i],
                "swapped": sprite.tint != tints[i] and sprite.tint in others,
            }.items():
                counts[measure][0] += right
                counts[measure][1] += 1
            box = sprite.box
            centres.setdefault(i, []).append(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        found = score(reading, tale.caption(number))
        unknown = any(sprite.kind is None for sprite in reading.sprites)
        for measure, right in {
            "fused": len(reading.sprites) < len(tale.characters) or unknown,
            "kinds": found.kinds,
            "background": found.background,
        }.items():
            counts[measure][0] += right
            counts[measure][1] += 1
    moves = [math.dist(a, b) for several in centres.values() for a, b in itertools.combinations(several, 2)]
    return {**counts, "moves": moves}


def _who_is_who(tale: Tale, reading: Reading, places: Sequence[Any]) -> list[Any]:
    """What was read of each character: of one kind by nearness to their places, as close in sum as can be."""
    seen: list[Any] = [None] * len(tale.characters)
    for kind in {kind for kind, _ in tale.characters}:
        mine = [i for i, (one, _) in enumerate(tale.characters) if one == kind]
        sprites: list[Any] = [sprite for sprite in reading.sprites if sprite.kind == kind]
        sprites += [None] * (len(mine) - len(sprites))
        best = min(
            itertools.permutations(sprites, len(mine)),
            key=lambda way: sum(_far(sprite, places[i]) for i, sprite in zip(mine, way, strict=True)),
        )
        for i, sprite in zip(mine, best, strict=True):
            seen[i] = sprite
    return seen


def _far(sprite: Any, place: Any) -> float:
    if sprite is None:
        return 2.0  # farther than any two places: a sprite that is there is somebody
    if place is None:
        return 1.0
    box = sprite.box
    return math.dist(place, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))


def tint_of(character: tuple[str, str], reading: Reading) -> str:
    """The tint of a character as its reference picture shows it, or the asked one where its kind was not read."""
    kind, asked = character
    return next((sprite.tint for sprite in reading.sprites if sprite.kind == kind and sprite.tint), asked)
