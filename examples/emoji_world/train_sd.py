"""Train tiny-sd: UNet and text encoder together, on scenes encoded once by the VAE.

Run: torchrun --nproc-per-node 2 -m reattend.emoji_world.train_sd --vae runs/vae/vae --out runs/sd --steps 20000
It goes on from runs/sd. Any number of processes gives the same training up to rounding; one per core is fastest.

Two stages share one loop. Close-ups are small pictures filled by one sprite: they teach what each kind looks like at a
quarter of the cost. Scenes are the pictures of the base size. The prediction target is v (Salimans & Ho 2022), the times
lean to the noisy side, where captions matter. The learning rate is flat and falls over the last fifth, so a run can be
lengthened: give a larger --steps.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from torch import Tensor

from ..pipelines.files import written_whole
from . import captions, world
from .muon import Muon
from .train_vae import pixels

CLOSE_UP = 8  # side of a close-up in lattice steps
NOISE = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


@dataclass(frozen=True, kw_only=True)
class SdConfig:
    """Training of tiny-sd."""

    vae: Path = Path("runs/vae/vae")  # diffusers folder of the VAE
    out: Path = Path("runs/sd")  # folder of the pools, the state, the log and the finished pipeline
    start_from: Path | None = None  # finished pipeline whose weights a new run begins with
    steps: int = 20000  # optimiser steps in all
    close_up_steps: int = 8000  # how many of them are on close-ups
    pool: int = 12000  # pictures drawn and encoded per stage
    batch: int = 16  # scenes per step; three times as many close-ups
    lr: float = 1e-3  # peak learning rate
    dropout: float = 0.1  # how often the caption is left out, for guidance
    ema: float = 0.999  # decay of the averaged weights
    seed: int = 0
    save_every: int = 200


def build_unet(latent_channels: int) -> UNet2DConditionModel:
    """Two levels, 16 x 16 and 8 x 8 latents at the base size, with attention at both."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=captions.WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def sample_close_up(rng: np.random.Generator) -> world.Scene:
    """One sprite of any of the usual sides on a picture of CLOSE_UP lattice steps."""
    side = int(rng.choice(list(world.SIDES.values())))
    x, y = (rng.integers(CLOSE_UP - side + 1, size=2) + side / 2) / CLOSE_UP
    sprite = world.Sprite(
        str(rng.choice(world.KINDS)), str(rng.choice(list(world.TINTS))), float(x), float(y), side / CLOSE_UP
    )
    return world.Scene(str(rng.choice(list(world.BACKGROUNDS))), (sprite,), light=float(rng.uniform(-1, 1)))


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL, draw_scene: Callable[[np.random.Generator], world.Scene], side: int, count: int, seed: int
) -> tuple[list[world.Scene], Tensor]:
    """Draw `count` scenes at `side` px and encode them: scenes and scaled latents (count, C, side/8, side/8) in fp16."""
    rng = np.random.default_rng((seed, side))
    scenes = [draw_scene(rng) for _ in range(count)]
    parts = []
    for start in range(0, count, 50):
        batch = torch.from_numpy(np.stack([pixels(scene, side) for scene in scenes[start : start + 50]]))
        parts.append((vae.encode(batch).latent_dist.mean * vae.config.scaling_factor).half())
    return scenes, torch.cat(parts)


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


def sample_times(count: int, generator: torch.Generator) -> Tensor:
    """Stratified times in 0..999: a third uniform, the rest logit-normal(0.5, 1) as in Esser et al. 2024, section 3.1."""
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    uniform = uniform[torch.randperm(count, generator=generator)]
    third = count // 3
    spread = torch.sigmoid(0.5 + torch.special.ndtri(uniform[third:].clamp(1e-4, 1 - 1e-4)))
    return (torch.cat([uniform[:third], spread]) * 1000).long().clamp(max=999)


def loss_of(
    unet: UNet2DConditionModel, noising: DDPMScheduler, latents: Tensor, text: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Mean square error of v. Min-SNR weights all but hide the noisy steps, and only there do captions matter."""
    noisy = noising.add_noise(latents, noise, t)
    return (unet(noisy, t, text).sample - noising.get_velocity(latents, noise, t)).square().mean()


def add_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum the gradients of all processes in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def schedule(step: int, steps: int) -> float:
    """Warm-up over 200 steps, flat, then linear to 1 % over the last fifth."""
    return min(1.0, (step + 1) / 200) * max(0.01, min(1.0, (steps - step) / (0.2 * steps)))


class Trainer:
    """Models, averaged weights and optimiser of one run; `state.pt` in the run's folder holds them all."""

    def __init__(self, config: SdConfig):
        self.config = config
        torch.manual_seed(config.seed)
        self.vae = AutoencoderKL.from_pretrained(config.vae).eval().requires_grad_(False)
        self.tokenizer = captions.build_tokenizer()
        self.text = captions.build_text_encoder(self.tokenizer)
        self.unet = build_unet(self.vae.config.latent_channels)
        if config.start_from is not None:
            known = DiffusionPipeline.from_pretrained(config.start_from, torch_dtype=torch.float32)
            self.text.load_state_dict(known.text_encoder.state_dict())
            self.unet.load_state_dict(known.unet.state_dict())
        self.noising = DDPMScheduler(num_train_timesteps=1000, **NOISE)
        self.parameters = [*self.unet.parameters(), *self.text.parameters()]
        self.ema = EMAModel(self.parameters, decay=config.ema, use_ema_warmup=True, power=0.75)
        embeddings = {id(p) for m in self.text.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
        matrices = [p for p in self.parameters if p.ndim >= 2 and id(p) not in embeddings]
        others = [p for p in self.parameters if p.ndim < 2 or id(p) in embeddings]
        self.optimizers = {
            "muon": Muon(matrices, lr=config.lr),
            "adamw": torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
        }
        self.done = 0
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True)
            self.unet.load_state_dict(state["unet"])
            self.text.load_state_dict(state["text"])
            self.ema.load_state_dict(state["ema"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state[name])
            self.done = state["step"]

    @property
    def state_file(self) -> Path:
        return self.config.out / "state.pt"

    def save(self, step: int) -> None:
        state = {"unet": self.unet.state_dict(), "text": self.text.state_dict(), "ema": self.ema.state_dict(),
                 "step": step, **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}}  # fmt: skip
        with written_whole(self.state_file) as (aside,):
            torch.save(state, aside)

    def pool(self, name: str) -> tuple[list[world.Scene], Tensor]:
        """The scenes and latents of a stage; latents are encoded once and kept beside the state."""
        draw_scene, side = {"close-ups": (sample_close_up, 8 * CLOSE_UP), "scenes": (world.sample_scene, 128)}[name]
        file = self.config.out / f"{name}.pt"
        if file.exists():
            rng = np.random.default_rng((self.config.seed, side))
            scenes, latents = [draw_scene(rng) for _ in range(self.config.pool)], torch.load(file, weights_only=True)
            if len(latents) != len(scenes):
                raise ValueError(
                    f"{file} holds {len(latents)} pictures, the run wants {len(scenes)}; give that --pool, or delete it"
                )
        else:
            scenes, latents = encode_pool(self.vae, draw_scene, side, self.config.pool, self.config.seed)
            with written_whole(file) as (aside,):
                torch.save(latents, aside)
        keep = [i for i, scene in enumerate(scenes) if learnable(scene)]
        return [scenes[i] for i in keep], latents[keep]

    def train(self) -> None:
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        stage, latents, start, losses = "", torch.empty(0), time.monotonic(), []
        scenes: list[world.Scene] = []
        for step in range(self.done, config.steps):
            wanted = "close-ups" if step < config.close_up_steps else "scenes"
            if wanted != stage:
                if rank:
                    dist.barrier()  # the first process encodes, the others read
                stage, (scenes, latents) = wanted, self.pool(wanted)
                if ranks > 1 and not rank:
                    dist.barrier()
            rng = np.random.default_rng((config.seed, step))
            generator = torch.Generator().manual_seed(config.seed * 10**7 + step)
            batch = config.batch * (3 if stage == "close-ups" else 1)
            chosen = rng.integers(len(scenes), size=batch)
            words = [caption_of(scenes[i], rng) if rng.random() >= config.dropout else "" for i in chosen]
            clean = latents[chosen].float()
            noise = torch.randn(clean.shape, generator=generator)
            t = sample_times(batch, generator)

            scale = schedule(step, config.steps)
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * scale
            mine = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
            states = self.text(torch.from_numpy(captions.tokenize(self.tokenizer, words[mine]))).last_hidden_state
            loss = loss_of(self.unet, self.noising, clean[mine], states, t[mine], noise[mine])
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            (loss * len(t[mine]) / batch).backward()
            if ranks > 1:
                add_gradients(self.parameters)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.ema.step(self.parameters)

            losses.append(loss.item())
            if rank:
                continue
            if (step + 1) % 50 == 0:
                row = {
                    "step": step + 1,
                    "loss": round(float(np.mean(losses)), 5),
                    "seconds": round(time.monotonic() - start, 1),
                }
                losses.clear()
                print(row, flush=True)
                with open(config.out / "log.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                self.save(step + 1)
                self.pipeline().save_pretrained(config.out / "tiny-sd")

    def pipeline(self) -> StableDiffusionPipeline:
        """The stock pipeline with the averaged weights, in fp16 for saving."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            unet, text = build_unet(self.vae.config.latent_channels), captions.build_text_encoder(self.tokenizer)
            unet.load_state_dict(self.unet.state_dict())
            text.load_state_dict(self.text.state_dict())
        finally:
            self.ema.restore(self.parameters)
        vae = AutoencoderKL.from_pretrained(self.config.vae)
        return StableDiffusionPipeline(
            vae=vae.half(), text_encoder=text.half(), tokenizer=self.tokenizer, unet=unet.half(),
            scheduler=DPMSolverMultistepScheduler(num_train_timesteps=1000, timestep_spacing="trailing", steps_offset=1, **NOISE),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


if __name__ == "__main__":
    settings = tyro.cli(SdConfig)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    Trainer(settings).train()
