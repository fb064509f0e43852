"""How often the reader is right, on drawn scenes whose content is known.

Run: python -m reattend.emoji_world.check_reader --scenes 1000                    any size and aspect, off the lattice
     python -m reattend.emoji_world.check_reader --scenes 1000 --turn 20          with sprites turned by up to 20 degrees
     python -m reattend.emoji_world.check_reader --scenes 1000 --vae FOLDER       after a VAE has encoded and decoded them
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image

from .read import Found, Reading, read
from .world import Scene, Sprite, draw, sample_scene

__all__ = ["Accuracy", "check", "free_scene", "vae_round_trip"]

SIDES = (96, 512)  # shortest and longest side of a picture in pixels
ASPECTS = (0.5, 2.0)
SCALES = (0.8, 1.3)  # sprite side relative to `world.SIDES`
SHIFT = 0.04  # how far a sprite moves off the lattice at most, in short sides
TRIES = 30


@dataclass(frozen=True)
class Accuracy:
    """Counts of right readings, over `scenes` scenes with `sprites` sprites."""

    scenes: int
    sprites: int
    background: int  # scenes with the right background
    kinds: int  # sprites read with the right kind at the right place
    tints: int  # ... and with the right tint
    kinds_exact: int  # scenes with all kinds right and nothing else read
    all_right: int  # ... with tints and background right too
    seconds: float  # processor time of reading, in all

    def __str__(self) -> str:
        parts = [f"{self.scenes} scenes, {self.sprites} sprites, {1000 * self.seconds / self.scenes:.0f} ms a scene"]
        for field in fields(self)[2:-1]:
            right, of = getattr(self, field.name), self.sprites if field.name in ("kinds", "tints") else self.scenes
            parts.append(f"{field.name.replace('_', ' ')} {100 * right / of:.2f} %")
        return "; ".join(parts)


def free_scene(rng: np.random.Generator, turn: float = 0.0, sides: tuple[int, int] = SIDES) -> tuple[Scene, int, int]:
    """A scene for a picture of random width and height (pixels), its sprites off the lattice and of free size.

    They still stay inside the picture, and their squares apart.
    """
    aspect = float(np.exp(rng.uniform(*np.log(ASPECTS))))
    long = max(1.0, aspect, 1 / aspect)
    short = rng.uniform(sides[0], sides[1] / long)
    width, height = (round(short * stretch) for stretch in (max(aspect, 1.0), max(1 / aspect, 1.0)))
    scene = sample_scene(rng, aspect=aspect)
    sprites = list(scene.sprites)
    for i, sprite in enumerate(sprites):
        others = sprites[:i] + sprites[i + 1 :]
        for _ in range(TRIES):
            dx, dy = rng.uniform(-SHIFT, SHIFT, 2) * min(width, height)
            moved = replace(
                sprite,
                x=sprite.x + dx / width,
                y=sprite.y + dy / height,
                side=sprite.side * rng.uniform(*SCALES),
                angle=rng.uniform(-turn, turn),
            )
            if _fits(moved, others, width, height):
                sprites[i] = moved
                break
    return Scene(scene.background, tuple(sprites), scene.light), width, height


def _fits(sprite: Sprite, others: list[Sprite], width: int, height: int) -> bool:
    short = min(width, height)
    half = sprite.side / 2 * short
    inside = half <= sprite.x * width <= width - half and half <= sprite.y * height <= height - half
    return inside and all(
        max(abs(sprite.x - other.x) * width, abs(sprite.y - other.y) * height) >= (sprite.side + other.side) / 2 * short
        for other in others
    )


def check(
    scenes: int,
    *,
    seed: int = 0,
    turn: float = 0.0,
    sides: tuple[int, int] = SIDES,
    change: Callable[[Image.Image], Image.Image] = lambda picture: picture,
    on_wrong: Callable[[Scene, Image.Image, Reading], None] = lambda *_: None,
) -> Accuracy:
    """Read random scenes.

    Args:
        scenes: how many.
        turn: largest angle of a sprite in degrees.
        sides: shortest and longest side of the pictures in pixels.
        change: applied to every picture before it is read.
        on_wrong: called with scene, picture and reading where not all is right.
    """
    rng = np.random.default_rng(seed)
    counts, seconds = np.zeros(6, int), 0.0
    for _ in range(scenes):
        scene, width, height = free_scene(rng, turn, sides)
        picture = change(draw(scene, width, height))
        start = time.process_time()
        reading = read(picture)
        seconds += time.process_time() - start
        found = [_match(sprite, reading, picture.width, picture.height) for sprite in scene.sprites]
        background = reading.background == scene.background
        kinds = sum(one is not None for one in found)
        tints = sum(one is not None and one.tint == s.tint for one, s in zip(found, scene.sprites, strict=True))
        exact = kinds == len(found) == len(reading.sprites)
        right = exact and tints == len(found) and background
        counts += (len(found), background, kinds, tints, exact, right)
        if not right:
            on_wrong(scene, picture, reading)
    sprites, backgrounds, right_kinds, right_tints, exact_scenes, right_scenes = (int(count) for count in counts)
    return Accuracy(scenes, sprites, backgrounds, right_kinds, right_tints, exact_scenes, right_scenes, seconds)


def _match(sprite: Sprite, reading: Reading, width: int, height: int) -> Found | None:
    """What was read of a sprite: of its kind, and its square shares more than half of the union with the sprite's."""
    half_x, half_y = (sprite.side * min(width, height) / (2 * side) for side in (width, height))
    true = np.array([sprite.x - half_x, sprite.y - half_y, sprite.x + half_x, sprite.y + half_y])
    for one in reading.sprites:
        box = np.array(one.box)
        shared = np.prod(np.maximum(np.minimum(true[2:], box[2:]) - np.maximum(true[:2], box[:2]), 0))
        union = np.prod(true[2:] - true[:2]) + np.prod(box[2:] - box[:2]) - shared
        if one.kind == sprite.kind and shared > 0.5 * union:
            return one
    return None


def vae_round_trip(folder: Path) -> Callable[[Image.Image], Image.Image]:
    """A change for `check`: encode and decode with the AutoencoderKL in `folder`; sides are scaled to multiples of 8."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder).eval()

    @torch.no_grad()
    def change(picture: Image.Image) -> Image.Image:
        picture = picture.resize([round(side / 8) * 8 for side in picture.size], Image.Resampling.BICUBIC)
        values = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        decoded = vae.decode(vae.encode(torch.from_numpy(np.ascontiguousarray(values))).latent_dist.mode()).sample
        pixels = ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    return change


def main(scenes: int = 1000, turn: float = 0.0, seed: int = 0, vae: Path | None = None, verbose: bool = False) -> None:
    """Print how often the reader is right.

    Args:
        scenes: how many scenes to read.
        turn: largest angle of a sprite in degrees.
        seed: of the scenes.
        vae: folder of a VAE that the pictures go through first, then at most 256 px long.
        verbose: also print every scene that was not read right.
    """

    def tell(scene: Scene, picture: Image.Image, reading: Reading) -> None:
        print(f"{picture.size} {scene}\n    -> {reading}", flush=True)

    def stay_silent(*wrong: object) -> None:
        pass

    print(
        check(
            scenes,
            seed=seed,
            turn=turn,
            sides=(SIDES[0], 256) if vae else SIDES,
            change=vae_round_trip(vae) if vae else lambda picture: picture,
            on_wrong=tell if verbose else stay_silent,
        )
    )


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
