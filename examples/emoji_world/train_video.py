"""Train tiny-video: motion modules between the layers of tiny-sd, on clips of moving sprites.

Run: torchrun --nproc-per-node 2 -m reattend.emoji_world.train_video --out runs/video --steps 6000     (goes on from runs/video)

tiny-sd itself stays as it is, and is not written again (`adapter` in the run's folder is what ships): every motion module
begins as nothing (its last layer is zero), so the first step already makes the pictures of tiny-sd, and what is learned is
how they follow each other (AnimateDiff, arXiv 2307.04725). Sprites go to and fro along the lattice of the world, which is
the grid of the latents.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    MotionAdapter,
    UNetMotionModel,
)
from torch import Tensor, nn

from ..pipelines.files import written_whole
from ..pipelines.load import TINY
from . import world
from .batches import Batch, encode
from .train_sd import NOISE, sampler
from .training import Trainer, TrainingConfig, start_processes

__all__ = ["VideoConfig", "VideoTrainer", "moving", "write_adapter"]

TRIES = 60  # to find motions that keep sprites apart; in the later half some of them rest
PACES = (2, 3, 4)  # frames per lattice step


@dataclass(frozen=True, kw_only=True)
class VideoConfig(TrainingConfig):
    """Training of tiny-video."""

    out: Path = Path("runs/video")
    vae: Path = TINY / "tiny-sd" / "vae"
    base: Path = TINY / "tiny-sd"  # pipeline whose pictures are set in motion
    frames: int = 16  # of a clip
    heads: int = 4  # of the motion modules
    steps: int = 6000
    close_up_steps: int = 0
    pool: int = 2000  # clips
    batch: int = 2  # clips per step


def moving(scene: world.Scene, frames: int, rng: np.random.Generator) -> list[world.Scene]:
    """A scene over time: every sprite goes to and fro on its way, one lattice step in `PACES` frames.

    The clip begins anywhere on the way: a frame's number says nothing of when a sprite turns, for in a long film it is the
    number in the window. Sprites never overlap and keep their order from left to right, which is that of the caption. Where
    that leaves no way, all stay where they are.
    """
    for trial in range(TRIES):
        moves = rng.random(len(scene.sprites)) < (1.0 if trial < TRIES // 2 else 0.5)
        rest = [(0.0, 0.0)] * frames
        ways = [_way(one, frames, rng) if goes else rest for one, goes in zip(scene.sprites, moves, strict=True)]
        clip = [
            world.Scene(scene.background, tuple(_placed(scene.sprites, ways, k)), light=scene.light)
            for k in range(frames)
        ]
        if any(any(place != (0, 0) for place in way) for way in ways) and all(
            _apart(one) and _order(one) == _order(scene) for one in clip
        ):
            return clip
    return [scene] * frames


def _way(sprite: world.Sprite, frames: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """How far a sprite is from its place in each frame, as fractions of the picture."""
    room = round((1 - sprite.side) * world.LATTICE)
    pace, way = int(rng.choice(PACES)), []
    late = int(rng.integers(pace))  # frames that it has been on its first step
    direction = (0, 0)
    while direction == (0, 0):
        direction = (int(rng.integers(-1, 2)), int(rng.integers(-1, 2)))
    for centre, step in zip((sprite.x, sprite.y), direction, strict=True):
        begin = round((centre - sprite.side / 2) * world.LATTICE)
        ahead, behind = (room - begin, begin) if step > 0 else (begin, room - begin)  # lattice steps to the edges
        far = int(rng.integers(min(1, ahead), ahead + 1))  # where it turns
        back = int(rng.integers(behind + 1))  # where it turns on the way back
        steps = [_there_and_back(back + (k + late) // pace, back + far) - back for k in range(frames)]
        way.append([step * count / world.LATTICE for count in steps])
    return list(zip(*way, strict=True))


def _there_and_back(step: int, turn: int) -> int:
    """0, 1, ..., turn, turn - 1, ..., 0, 1, ..."""
    if turn == 0:
        return 0
    step %= 2 * turn
    return min(step, 2 * turn - step)


def _placed(sprites: tuple[world.Sprite, ...], ways: list[list[tuple[float, float]]], frame: int) -> list[world.Sprite]:
    return [world.moved(sprite, *way[frame]) for sprite, way in zip(sprites, ways, strict=True)]


def _apart(scene: world.Scene) -> bool:
    sprites = scene.sprites
    for i, one in enumerate(sprites):
        for other in sprites[i + 1 :]:
            near = (one.side + other.side) / 2 - 1e-6
            if abs(one.x - other.x) < near and abs(one.y - other.y) < near:
                return False
    return True


def _order(scene: world.Scene) -> list[int]:
    """The sprites from left to right."""
    return sorted(range(len(scene.sprites)), key=lambda i: scene.sprites[i].x)


class VideoTrainer(Trainer):
    """tiny-video: motion modules in tiny-sd's UNet, at 128 px."""

    side = 128
    lean = 1.0  # what a frame shows is decided early, and that is what frames have to agree on

    def build(self) -> dict[str, nn.Module]:
        base = DiffusionPipeline.from_pretrained(self.config.base, torch_dtype=torch.float32)
        self.tokenizer = base.tokenizer
        self.text_encoder = base.text_encoder.eval().requires_grad_(False).to(self.device)
        self.noising = DDPMScheduler(num_train_timesteps=1000, **NOISE)
        adapter = MotionAdapter(
            block_out_channels=base.unet.config.block_out_channels,
            motion_layers_per_block=base.unet.config.layers_per_block,
            motion_norm_num_groups=base.unet.config.norm_num_groups,
            motion_num_attention_heads=self.config.heads,
            motion_max_seq_length=2 * self.config.frames,
        )
        unet = UNetMotionModel.from_unet2d(base.unet, adapter)
        unet.freeze_unet2d_params()
        for name, module in unet.named_modules():
            if ".motion_modules." in name and name.endswith(".proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        return {"unet": unet}

    def encode(self, scenes: list[world.Scene], side: int) -> Tensor:
        """Clips, (count, F, C, side/8, side/8) in fp16."""
        frames: list[world.Scene] = []
        for i, scene in enumerate(scenes):
            frames += moving(scene, self.config.frames, np.random.default_rng((self.config.seed, side, i)))
        return encode(self.vae, frames, side).unflatten(0, (len(scenes), self.config.frames))

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch of clips, (B, F, C, H, W), all frames of one at the same time."""
        t = (batch.times * 1000).long()
        with torch.no_grad():
            text = self.text_encoder(batch.ids["text_encoder"]).last_hidden_state
        noisy = self.noising.add_noise(batch.clean, batch.noise, t).transpose(1, 2)
        guess = self.parts["unet"](noisy, t, text.repeat_interleave(batch.clean.shape[1], dim=0)).sample
        return (guess.transpose(1, 2) - self.noising.get_velocity(batch.clean, batch.noise, t)).square().mean()

    def pipeline(self) -> AnimateDiffPipeline:
        return AnimateDiffPipeline(
            **self.averaged(),
            vae=AutoencoderKL.from_pretrained(self.config.vae).half(),
            text_encoder=copy.deepcopy(self.text_encoder).half().cpu(),
            tokenizer=self.tokenizer,
            motion_adapter=None,  # its modules are in the UNet
            scheduler=sampler(),
        )

    def train(self) -> None:
        super().train()
        if self.rank == 0:
            write_adapter(self.pipeline(), self.config.out / "adapter")


def write_adapter(pipe: AnimateDiffPipeline, folder: Path) -> None:
    """The pipeline without what tiny-sd has: index, scheduler and motion modules, as `load` takes them of a bundled model."""
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.unet.save_motion_modules(folder / "motion_adapter")
    index = {name: origin for name, origin in pipe.config.items() if not name.startswith("_")}
    index |= {"_class_name": type(pipe).__name__, "unet": ["diffusers", "UNet2DConditionModel"]}
    index["motion_adapter"] = ["diffusers", "MotionAdapter"]
    with written_whole(folder / "model_index.json") as (path,):
        path.write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    settings = tyro.cli(VideoConfig)
    start_processes()
    VideoTrainer(settings).train()
