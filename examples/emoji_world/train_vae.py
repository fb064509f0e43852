"""Train the VAE that tiny-sd and tiny-flux share.

Run: python -m reattend.emoji_world.train_vae --out runs/vae --steps 1800

It goes on from the folder if that holds a state. Loss: L1 + MSE on crops picked for content, L1 on coarse averages, a
small L2 on the latents in place of a KL term, and noise on the latents, so that nearby latents decode to nearly the same
picture. Scenes are drawn at 128 and at 256 px.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from ..pipelines.files import written_whole
from . import world

LATENT_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Training of the VAE."""

    out: Path = Path("runs/vae")  # folder of the state, the log and the finished weights
    start_from: Path | None = None  # finished VAE whose weights a new run begins with
    decoder_only: bool = False  # train the decoder alone, so that the latents stay what they are
    steps: int = 1800  # optimiser steps in all
    batch: int = 16  # crops per step
    crop: int = 64  # side of a crop in pixels
    lr: float = 2e-3  # peak learning rate
    latent_noise: float = 0.05  # standard deviation of the noise, relative to the latents' own
    latent_l2: float = 1e-3  # weight of the mean square of the latents
    seed: int = 0
    save_every: int = 100


def build_vae() -> AutoencoderKL:
    """Factor 8, LATENT_CHANNELS channels, no attention: any size decodes in linear time."""
    vae = AutoencoderKL(
        block_out_channels=(12, 24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,  # more groups would forget the colours: each is normalised on its own
        mid_block_add_attention=False,
        sample_size=128,
    )
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            # Every block starts as its shortcut: several dB more in the first steps.
            torch.nn.init.zeros_(module.conv2.weight)
    return vae


def pixels(scene: world.Scene, side: int) -> np.ndarray:
    """A scene as float32 (3, side, side) in [-1, 1]."""
    return np.ascontiguousarray(np.asarray(world.draw(scene, side, side), np.float32).transpose(2, 0, 1)) / 127.5 - 1


def content_crop(rng: np.random.Generator, picture: np.ndarray, crop: int) -> np.ndarray:
    """The crop with the largest variance of four random ones."""
    side = picture.shape[-1]
    corners = rng.integers(0, side - crop + 1, size=(4, 2))
    crops = [picture[:, y : y + crop, x : x + crop] for y, x in corners]
    return max(crops, key=lambda part: part.var())


def crops(rng: np.random.Generator, config: VaeConfig) -> Tensor:
    """One batch; scenes are off the lattice half of the time, so that the VAE serves moving and turning sprites too."""
    parts: list[np.ndarray] = []
    while len(parts) < config.batch:
        scene = world.sample_scene(rng)
        if rng.random() < 0.5:
            jitter = [
                world.moved(s, rng.normal(0, 0.03), rng.normal(0, 0.03), rng.uniform(0.7, 1.3), rng.uniform(-20, 20))
                for s in scene.sprites
            ]
            scene = world.Scene(scene.background, tuple(jitter), scene.light)
        picture = pixels(scene, int(rng.choice((128, 128, 128, 256))))
        parts += [content_crop(rng, picture, config.crop) for _ in range(2)]
    return torch.from_numpy(np.stack(parts[: config.batch]))


def reconstruction_loss(error: Tensor) -> Tensor:
    """L1 + MSE, and L1 of the error averaged over 4 and 8 px: without it, one colour axis is learned last."""
    coarse = sum(F.avg_pool2d(error, side).abs().mean() for side in (4, 8))
    return error.abs().mean() + error.square().mean() + 2 * coarse


def psnr(vae: AutoencoderKL, count: int = 32) -> float:
    """Mean PSNR in dB over whole 128-px pictures that training never draws (its own seed)."""
    rng = np.random.default_rng(10**6)
    batch = torch.from_numpy(np.stack([pixels(world.sample_scene(rng), 128) for _ in range(count)]))
    with torch.no_grad():
        again = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
    mse = (((again - batch) / 2) ** 2).mean(dim=(1, 2, 3))
    return float((-10 * mse.log10()).mean())


def train(config: VaeConfig) -> AutoencoderKL:
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    if config.start_from is None:
        vae = build_vae()
    else:
        vae = AutoencoderKL.from_pretrained(config.start_from, torch_dtype=torch.float32)
    trained = torch.nn.ModuleList([vae.decoder, vae.post_quant_conv]) if config.decoder_only else vae
    vae.requires_grad_(False)
    trained.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    state_file, done = config.out / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]

    start = time.monotonic()
    for step in range(done, config.steps):
        rng = np.random.default_rng((config.seed, step))
        noise = torch.Generator().manual_seed(config.seed * 10**6 + step)
        lr = config.lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        optimizer.param_groups[0]["lr"] = max(lr, config.lr * 0.01)
        batch = crops(rng, config)
        latents = vae.encode(batch).latent_dist.mean
        spread = latents.detach().std()
        noisy = latents + config.latent_noise * spread * torch.randn(latents.shape, generator=noise)
        error = vae.decode(noisy).sample - batch
        loss = reconstruction_loss(error) + config.latent_l2 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            row = {"step": step + 1, "loss": round(loss.item(), 4), "psnr": round(psnr(vae), 2),
                   "spread": round(spread.item(), 3), "seconds": round(time.monotonic() - start, 1)}  # fmt: skip
            with open(config.out / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            print(row, flush=True)
            with written_whole(state_file) as (aside,):
                torch.save({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, aside)
    return vae


def finish(vae: AutoencoderKL, config: VaeConfig, count: int = 200) -> None:
    """Save as a diffusers folder; a trained encoder gets the scaling factor that gives its latents unit variance."""
    if not config.decoder_only:
        rng = np.random.default_rng(1)
        with torch.no_grad():
            batch = torch.from_numpy(np.stack([pixels(world.sample_scene(rng), 128) for _ in range(count)]))
            latents = torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(20)])
        vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=None)
    vae.save_pretrained(config.out / "vae")


if __name__ == "__main__":
    settings = tyro.cli(VaeConfig)
    finish(train(settings), settings)
