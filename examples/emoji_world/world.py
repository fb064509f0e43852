"""The emoji world: small pictures whose content is known, and the captions that tell it.

A scene is one background and one to three tinted sprites. Its caption names the sprites from left to right, for example
`a blue car and a cat on sand`. A tint may be left out of the caption: the sprite still has one, but the text does not
give it away, so only what a picture is made *with* (a reference) can keep it.

Sizes and places are fractions of the picture, so a scene can be drawn at any size and aspect. They lie on a lattice of a
sixteenth of the short side, which is one latent cell of the bundled models at their base size of 128 px.

Needs only NumPy and Pillow.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = [
    "BACKGROUNDS", "KINDS", "LATTICE", "TINTS", "Clause", "Scene", "Sprite",
    "draw", "is_held_out", "parse_caption", "sample_captions", "sample_scene", "tinted_sprite",
]  # fmt: skip

CELL = 128  # side of one sprite on the sheet, in pixels
COLUMNS = 4
MIDDLE = 0.55  # grey value that shows as the plain tint
LATTICE = 16  # lattice steps along the short side

KINDS = (
    "car", "cat", "dog", "fish", "duck", "butterfly", "balloon", "boat",
    "house", "tree", "star", "flower", "apple", "mushroom", "crown", "rocket",
)  # fmt: skip
TINTS = {
    "red": (222, 38, 38),
    "orange": (246, 138, 20),
    "yellow": (248, 214, 30),
    "green": (46, 164, 54),
    "cyan": (30, 196, 208),
    "blue": (44, 84, 226),
    "purple": (134, 56, 190),
    "pink": (246, 122, 186),
}
BACKGROUNDS = {  # colour at the top and at the bottom
    "sand": ((240, 222, 178), (214, 180, 122)),
    "grass": ((196, 226, 150), (116, 160, 76)),
    "sea": ((150, 206, 232), (52, 112, 164)),
    "snow": ((250, 251, 253), (206, 218, 232)),
    "night": ((14, 16, 40), (48, 46, 92)),
    "dusk": ((96, 58, 92), (222, 150, 128)),
}
SIDES = {1: 8, 2: 7, 3: 6}  # sprite side in lattice steps, by the number of sprites
COUNT_WEIGHTS = (0.4, 0.4, 0.2)  # how often a scene has one, two, three sprites
NAMED_TINT = 0.75  # how often a caption names a sprite's tint


@dataclass(frozen=True)
class Sprite:
    """One sprite. `x`, `y` are its centre and `side` its side, as fractions of the picture's width, height and short side."""

    kind: str
    tint: str
    x: float
    y: float
    side: float
    angle: float = 0.0  # degrees, counter-clockwise
    named: bool = True  # whether the caption names the tint

    @property
    def noun(self) -> str:
        return with_article(f"{self.tint} {self.kind}" if self.named else self.kind)


def with_article(words: str) -> str:
    """Words of a caption with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


@dataclass(frozen=True)
class Scene:
    """Sprites over a background; `light` shifts the background's brightness (-1 to 1)."""

    background: str
    sprites: tuple[Sprite, ...]
    light: float = 0.0

    @property
    def caption(self) -> str:
        ordered = sorted(self.sprites, key=lambda sprite: sprite.x)
        return " and ".join(sprite.noun for sprite in ordered) + f" on {self.background}"


@dataclass(frozen=True)
class Clause:
    """What a caption says of one sprite; `tint` is None where it is left open."""

    kind: str
    tint: str | None


def parse_caption(caption: str) -> tuple[tuple[Clause, ...], str]:
    """The clauses and the background of a caption; raises ValueError for text that is not of this world."""
    body, found, background = caption.strip().lower().rpartition(" on ")
    if not found or background not in BACKGROUNDS:
        raise ValueError(f"caption {caption!r} must end in 'on' and one of {', '.join(BACKGROUNDS)}")
    clauses = []
    for noun in body.split(" and "):
        match = re.fullmatch(r"an? (?:(\w+) )?(\w+)", noun.strip())
        if not match or match[2] not in KINDS or (match[1] and match[1] not in TINTS):
            raise ValueError(f"caption {caption!r}: cannot read {noun!r}; write 'a [tint] kind' with known words")
        clauses.append(Clause(match[2], match[1]))
    return tuple(clauses), background


def is_held_out(caption: str) -> bool:
    """True for the tenth of all captions that no model is trained on."""
    return hashlib.blake2s(caption.encode()).digest()[0] % 10 == 0


@functools.cache
def _sheet() -> np.ndarray:
    with Image.open(Path(__file__).with_name("sprites.png")) as sheet:
        return np.asarray(sheet.convert("RGBA"), dtype=np.float32) / 255


@functools.cache
def _shaded(kind: str) -> np.ndarray:
    """Grey value and alpha of a sprite, shape (CELL, CELL, 2); grey is spread over 0 to 1 with its median at MIDDLE."""
    i = KINDS.index(kind)
    rgba = _sheet()[i // COLUMNS * CELL :, i % COLUMNS * CELL :][:CELL, :CELL]
    grey, alpha = rgba[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32), rgba[..., 3]
    low, high = np.percentile(grey[alpha > 0.5], (2, 98))
    grey = np.clip((grey - low) / (high - low), 0, 1)
    middle = np.clip(np.median(grey[alpha > 0.5]), 0.2, 0.8)  # most of the sprite then shows the tint itself
    return np.stack([np.interp(grey, (0, middle, 1), (0, MIDDLE, 1)).astype(np.float32), alpha], axis=-1)


def tinted_sprite(kind: str, tint: str) -> Image.Image:
    """A sprite in one tint on a transparent square of CELL px: darks go to a deep shade, lights towards white."""
    return Image.fromarray(_tinted(kind, tint), "RGBA")


@functools.cache
def _tinted(kind: str, tint: str) -> np.ndarray:
    shade = _shaded(kind)
    colour = np.array(TINTS[tint], np.float32) / 255
    dark, light = colour * 0.3, colour + (1 - colour) * 0.72
    grey = shade[..., :1]
    below = dark + (colour - dark) * np.minimum(grey / MIDDLE, 1)
    rgb = below + (light - colour) * np.clip((grey - MIDDLE) / (1 - MIDDLE), 0, 1)
    return np.round(np.concatenate([rgb, shade[..., 1:]], axis=-1) * 255).astype(np.uint8)


def _gradient(background: str, light: float, width: int, height: int) -> np.ndarray:
    top, bottom = (np.array(colour, np.float32) for colour in BACKGROUNDS[background])
    t = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None, None]
    rows = top + (bottom - top) * t + 10 * light
    return np.broadcast_to(rows, (height, width, 3))


def draw(scene: Scene, width: int = 128, height: int = 128) -> Image.Image:
    """Draw a scene as an RGB picture of the given size in pixels."""
    picture = Image.fromarray(np.clip(_gradient(scene.background, scene.light, width, height), 0, 255).astype(np.uint8))
    for sprite in scene.sprites:
        side = max(1, round(sprite.side * min(width, height)))
        image = tinted_sprite(sprite.kind, sprite.tint)
        if sprite.angle:
            image = image.rotate(sprite.angle, Image.Resampling.BICUBIC)
        image = image.resize((side, side), Image.Resampling.BOX if side <= CELL // 2 else Image.Resampling.BICUBIC)
        picture.paste(image, (round(sprite.x * width - side / 2), round(sprite.y * height - side / 2)), image)
    return picture


def _place(rng: np.random.Generator, sides: list[int], columns: int, rows: int) -> list[tuple[int, int]] | None:
    """Top-left lattice corners for squares that do not overlap, or None if this draw found none."""
    corners: list[tuple[int, int]] = []
    for side in sides:
        free = [
            (x, y)
            for x in range(columns - side + 1)
            for y in range(rows - side + 1)
            if all(
                x + side <= a or a + s <= x or y + side <= b or b + s <= y
                for (a, b), s in zip(corners, sides, strict=False)
            )
        ]
        if not free:
            return None
        corners.append(free[rng.integers(len(free))])
    return corners


def sample_scene(rng: np.random.Generator, count: int | None = None, aspect: float = 1.0) -> Scene:
    """Draw a random scene.

    Args:
        rng: the only source of chance.
        count: number of sprites, 1 to 3; None draws it.
        aspect: width over height of the picture the scene is for.
    """
    if count is None:
        count = 1 + int(rng.choice(3, p=COUNT_WEIGHTS))
    columns, rows = (round(LATTICE * max(aspect, 1)), round(LATTICE * max(1 / aspect, 1)))
    corners = None
    while corners is None:
        sides = [SIDES[count]] * count
        corners = _place(rng, sides, columns, rows)
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        look = (str(rng.choice(KINDS)), str(rng.choice(list(TINTS))))
        if look not in looks:
            looks.append(look)
    sprites = tuple(
        Sprite(
            kind,
            tint,
            (x + side / 2) / columns,
            (y + side / 2) / rows,
            side / LATTICE,
            named=bool(rng.random() < NAMED_TINT),
        )
        for (kind, tint), (x, y), side in zip(looks, corners, sides, strict=True)
    )
    return Scene(str(rng.choice(list(BACKGROUNDS))), sprites, light=float(rng.uniform(-1, 1)))


def sample_captions(rng: np.random.Generator, count: int, held_out: bool = True) -> list[str]:
    """Captions drawn like those of `sample_scene`, from the held-out tenth or from the rest, without repeats."""
    captions: dict[str, None] = {}
    while len(captions) < count:
        caption = sample_scene(rng).caption
        if is_held_out(caption) == held_out:
            captions[caption] = None
    return list(captions)


def moved(sprite: Sprite, dx: float = 0.0, dy: float = 0.0, grow: float = 1.0, turn: float = 0.0) -> Sprite:
    """The same sprite moved by fractions of the picture, scaled and turned (degrees)."""
    return replace(sprite, x=sprite.x + dx, y=sprite.y + dy, side=sprite.side * grow, angle=sprite.angle + turn)
