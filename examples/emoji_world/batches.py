"""What the training steps of the bundled models learn from: scenes, their latents and captions, and batches of them.

A batch depends on the seed and the step alone. Where a graphics card trains, other processes draw the scenes and make the
batches, since a card would wait for one; a CPU makes them between its steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import world
from .train_vae import pixels

__all__ = [
    "CLOSE_UP",
    "Batch",
    "caption_of",
    "encode",
    "learnable",
    "made_ahead",
    "sample_close_up",
    "sample_times",
    "stratified",
]

CLOSE_UP = 8  # side of a close-up in lattice steps
MOST_WORKERS = 8  # processes that make batches for one card


@dataclass(frozen=True)
class Batch:
    """What one step of one process learns from."""

    clean: Tensor  # scaled latents, (B, C, H, W), or (B, F, C, H, W) for clips; fp16 until they are where they are used
    noise: Tensor  # as clean, fp32
    times: Tensor  # (B,) in [0, 1), 1 is all noise
    words: list[str]  # captions, some of them empty
    step: int
    share: float = 1.0  # of what all processes learn from in the step
    ids: dict[str, Tensor] = field(default_factory=dict)  # of the captions, (B, tokens) for each text encoder
    labels: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what a part that tells something is to tell

    def to(self, device: torch.device) -> Batch:
        """On the device, with `clean` in fp32."""
        from accelerate.utils import send_to_device

        batch = Batch(**send_to_device(vars(self), device))
        return replace(batch, clean=batch.clean.float())


class Made(Dataset):
    """The answers of a function, by place."""

    def __init__(self, make: Callable[[Any], Any], of: Sequence[Any]):
        self.make, self.of = make, of

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, place: int) -> Any:
        return self.make(self.of[place])


def made_ahead(make: Callable[[Any], Any], of: Sequence[Any], device: torch.device) -> Iterable[Any]:
    """make(one) for each in order; for a card by other processes, one ahead each, which has to fit into shared memory."""
    if device.type == "cpu":
        return map(make, of)
    return DataLoader(
        Made(make, of), batch_size=None, num_workers=min(MOST_WORKERS, os.cpu_count() or 1), prefetch_factor=1,
        multiprocessing_context="fork",
    )  # fmt: skip


@torch.no_grad()
def encode(vae: AutoencoderKL, scenes: Sequence[world.Scene], side: int) -> Tensor:
    """Scaled latents of scenes drawn at `side` px, (count, C, side/8, side/8) in fp16."""

    def drawn(start: int) -> Tensor:
        return torch.from_numpy(np.stack([pixels(scene, side) for scene in scenes[start : start + 50]]))

    parts = []
    for batch in made_ahead(drawn, range(0, len(scenes), 50), vae.device):
        latents = vae.encode(batch.to(vae.device)).latent_dist.mean * vae.config.scaling_factor
        parts.append(latents.half().cpu())
    return torch.cat(parts)


def sample_times(count: int, generator: torch.Generator, lean: float) -> Tensor:
    """Stratified times in [0, 1): a third uniform, the rest logit-normal(lean, 1) as in Esser et al. 2024, section 3.1.

    They lean to the noisy side, for only there does a caption tell what the noisy picture does not.
    """
    uniform = stratified(count, generator)
    third = int(count / 3 + float(torch.rand((), generator=generator)))  # on the average, also of two
    spread = torch.sigmoid(lean + torch.special.ndtri(uniform[third:].clamp(1e-4, 1 - 1e-4)))
    return torch.cat([uniform[:third], spread]).clamp(max=1 - 1e-6)


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """One number from each of `count` equal stretches of [0, 1), in any order."""
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return uniform[torch.randperm(count, generator=generator)]


def sample_close_up(rng: np.random.Generator) -> world.Scene:
    """One sprite of any of the usual sides on a picture of CLOSE_UP lattice steps."""
    side = int(rng.choice(list(world.SIDES.values())))
    x, y = (rng.integers(CLOSE_UP - side + 1, size=2) + side / 2) / CLOSE_UP
    sprite = world.Sprite(
        str(rng.choice(world.KINDS)), str(rng.choice(list(world.TINTS))), float(x), float(y), side / CLOSE_UP
    )
    return world.Scene(str(rng.choice(list(world.BACKGROUNDS))), (sprite,), light=float(rng.uniform(-1, 1)))


def caption_of(scene: world.Scene, rng: np.random.Generator) -> str:
    """A caption that names each tint or not, drawn anew, and that is not held out."""
    while True:
        named = [replace(sprite, named=bool(rng.random() < world.NAMED_TINT)) for sprite in scene.sprites]
        caption = replace(scene, sprites=tuple(named)).caption
        if not world.is_held_out(caption):
            return caption


def learnable(scene: world.Scene) -> bool:
    """Whether the scene has a caption that training may use."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        named = [replace(sprite, named=bool(rng.random() < 0.5)) for sprite in scene.sprites]
        if not world.is_held_out(replace(scene, sprites=tuple(named)).caption):
            return True
    return False
