"""What the trainings of the bundled models share: two stages, one loop, averaged weights, resuming.

Close-ups are small pictures filled by one sprite: they teach what each kind looks like at a fraction of the cost. Scenes
are the pictures of the base size; where `large` says so, a share of the steps sees them at twice the side. The learning
rate is flat and falls over the last fifth, so a run can be lengthened: give a larger --steps. Any number of processes
(`torchrun --nproc-per-node 2 -m ...`) gives the same training up to rounding; on a CPU one per core is fastest, and the
run does not stall when another program takes a core. With CUDA each process trains on a card of its own.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ..distill.ranks import TIMEOUT
from ..pipelines.files import written_whole
from . import captions, world
from .batches import CLOSE_UP, Batch, caption_of, encode, learnable, made_ahead, sample_close_up, sample_times
from .muon import Muon

__all__ = ["Trainer", "TrainingConfig", "start_processes"]

Pool = tuple[list[world.Scene], Tensor]  # scenes and their latents

COSTS = {"close-ups": 1 / 3, "scenes": 1, "large": 4}  # of a picture; a batch has that many fewer of them


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training of a bundled model; each has its own defaults."""

    out: Path  # folder of the pools, the state, the log and the finished pipeline
    vae: Path = Path("runs/vae/vae")  # diffusers folder of the VAE
    start_from: Path | None = None  # finished pipeline whose weights a new run begins with
    steps: int = 20000  # optimiser steps in all
    close_up_steps: int = 4000  # how many of them are on close-ups
    pool: int = 12000  # pictures drawn and encoded per stage
    batch: int = 16  # scenes per step; three times as many close-ups
    lr: float = 1e-3  # peak learning rate
    dropout: float = 0.1  # how often the caption is left out, for guidance
    ema: float = 0.999  # decay of the averaged weights
    seed: int = 0
    save_every: int = 200


class Trainer:
    """Models, averaged weights and optimisers of one run; `state.pt` in the run's folder holds them all.

    A model derives from this, sets `side`, and defines `build`, `loss` and `pipeline`.
    """

    side: int  # of a scene, in pixels
    lean: float  # to the noisy side, see `sample_times`
    large = 0.0  # share of the steps after the close-ups that see scenes of twice the side
    tokenizer: CLIPTokenizer  # set by `build`
    parts: dict[str, nn.Module]  # the modules that are trained, by their names in the pipeline

    def __init__(self, config: Any):
        self.config = config
        self.device = own_device()
        torch.manual_seed(config.seed)
        self.vae = AutoencoderKL.from_pretrained(config.vae).eval().requires_grad_(False).to(self.device)
        self.parts = {name: part.to(self.device) for name, part in self.build().items()}
        if config.start_from is not None:
            known = DiffusionPipeline.from_pretrained(config.start_from, torch_dtype=torch.float32)
            for name, part in self.parts.items():
                if name in known.components:
                    part.load_state_dict(getattr(known, name).state_dict())
        every = [p for part in self.parts.values() for p in part.parameters() if p.requires_grad]
        self.parameters = list(dict.fromkeys(every))
        self.ema = EMAModel(self.parameters, decay=config.ema, use_ema_warmup=True, power=0.75, foreach=True)
        modules = [module for part in self.parts.values() for module in part.modules()]
        embeddings = {id(p) for module in modules if isinstance(module, nn.Embedding) for p in module.parameters()}
        matrices = [p for p in self.parameters if p.ndim >= 2 and id(p) not in embeddings]
        others = [p for p in self.parameters if p.ndim < 2 or id(p) in embeddings]
        self.optimizers = {
            "muon": Muon(matrices, lr=config.lr),
            "adamw": torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
        }
        self.done = 0
        if self.state_file.exists():
            state = torch.load(self.state_file, weights_only=True, map_location=self.device)
            for name, kept in {**self.parts, **self.optimizers, "ema": self.ema}.items():
                kept.load_state_dict(state[name])
            self.done = state["step"]

    def build(self) -> dict[str, nn.Module]:
        """The modules to train, with fresh weights, by their names in the pipeline."""
        raise NotImplementedError

    def ids(self, words: list[str]) -> dict[str, Tensor]:
        """Token ids of captions, (B, tokens) for each text encoder; here for CLIP alone."""
        return {"text_encoder": torch.from_numpy(captions.tokenize(self.tokenizer, words))}

    def labels(self, batch: Batch, scenes: list[world.Scene]) -> dict[str, dict[str, Tensor]]:
        """What parts that tell something of a batch are to tell; none here."""
        return {}

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch, which is on the device."""
        raise NotImplementedError

    def pipeline(self) -> DiffusionPipeline:
        """The stock pipeline in half precision, with the averaged weights of `averaged`."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Which of the processes this is; the first one writes."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def state_file(self) -> Path:
        return self.config.out / "state.pt"

    def save(self, step: int) -> None:
        kept = {**self.parts, **self.optimizers, "ema": self.ema}
        with written_whole(self.state_file) as (aside,):
            torch.save({**{name: part.state_dict() for name, part in kept.items()}, "step": step}, aside)

    def averaged(self) -> dict[str, nn.Module]:
        """Copies of the trained modules in half precision, with the averaged weights."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            copies = self.build()
            for name, part in self.parts.items():
                copies[name].load_state_dict(part.state_dict())
        finally:
            self.ema.restore(self.parameters)
        return {name: part.half().eval() for name, part in copies.items()}

    def encode(self, scenes: list[world.Scene], side: int) -> Tensor:
        """What is learned from: scaled latents of the scenes drawn at `side` px, one entry per scene, in fp16."""
        return encode(self.vae, scenes, side)

    def pool(self, name: str) -> Pool:
        """The scenes and latents of a stage; latents are encoded once and kept beside the state."""
        draw_scene, side, count = {
            "close-ups": (sample_close_up, self.side // world.LATTICE * CLOSE_UP, self.config.pool),
            "scenes": (world.sample_scene, self.side, self.config.pool),
            "large": (world.sample_scene, 2 * self.side, self.config.pool // COSTS["large"]),
        }[name]
        rng = np.random.default_rng((self.config.seed, side))
        scenes = [draw_scene(rng) for _ in range(count)]
        file = self.config.out / f"{name}.pt"
        if file.exists():
            latents = torch.load(file, weights_only=True)
            if len(latents) != len(scenes):
                raise ValueError(
                    f"{file} holds {len(latents)} pictures, the run wants {len(scenes)}; give that --pool, or delete it"
                )
        else:
            latents = self.encode(scenes, side)
            with written_whole(file) as (aside,):
                torch.save(latents, aside)
        keep = [i for i, scene in enumerate(scenes) if learnable(scene)]
        return [scenes[i] for i in keep], latents[keep]

    def stage(self, step: int) -> str:
        """Which pool a step learns from."""
        if step < self.config.close_up_steps:
            return "close-ups"
        return "large" if np.random.default_rng((self.config.seed, step, 2)).random() < self.large else "scenes"

    def choose(self, scenes: list[world.Scene], count: int, rng: np.random.Generator) -> np.ndarray:
        """Which scenes of a pool a step learns from, (count,): each as often as it has sprites, for three are harder than one."""
        sprites = np.cumsum([len(scene.sprites) for scene in scenes])
        return np.searchsorted(sprites, rng.integers(sprites[-1], size=count), side="right")

    def times(self, step: int, count: int, generator: torch.Generator) -> Tensor:
        """The times of a step's batch, (count,) in [0, 1)."""
        return sample_times(count, generator, self.lean)

    def pools(self, steps: range) -> dict[str, Pool]:
        """Those of the stages that the steps visit; the first process encodes what is missing, the others read."""
        names = sorted({self.stage(step) for step in steps})
        if self.rank:
            dist.barrier()
        pools = {name: self.pool(name) for name in names}
        if dist.is_initialized() and not self.rank:
            dist.barrier()
        return pools

    def batch(self, step: int, pool: Pool) -> Batch:
        """What this process learns from in a step."""
        config, (scenes, latents) = self.config, pool
        ranks, stage = dist.get_world_size() if dist.is_initialized() else 1, self.stage(step)
        rng = np.random.default_rng((config.seed, step))
        generator = torch.Generator().manual_seed(config.seed * 10**7 + step)
        count = max(1, round(config.batch / COSTS[stage]))
        if count < ranks:
            raise ValueError(f"{ranks} processes need a larger --batch: {stage} come {count} at a time")
        chosen = self.choose(scenes, count, rng)
        words = [caption_of(scenes[i], rng) if rng.random() >= config.dropout else "" for i in chosen]
        noise = torch.randn((count, *latents.shape[1:]), generator=generator)
        times = self.times(step, count, generator)
        mine = slice(self.rank * count // ranks, (self.rank + 1) * count // ranks)
        words = words[mine]
        own = latents[chosen[mine]], noise[mine].clone(), times[mine]  # of a view all would be sent on
        batch = Batch(*own, words, step, len(words) / count, self.ids(words))
        return replace(batch, labels=self.labels(batch, [scenes[i] for i in chosen[mine]]))

    def train(self) -> None:
        """Run to the end, from where the state is."""
        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        start, losses = time.monotonic(), []
        steps = range(self.done, config.steps)
        pools = self.pools(steps)
        for batch in made_ahead(lambda step: self.batch(step, pools[self.stage(step)]), steps, self.device):
            loss = self.learn(batch.to(self.device))
            self.done = batch.step + 1
            if self.rank:
                continue
            losses.append(loss)
            if self.done % 50 == 0:
                row = {
                    "step": self.done,
                    "loss": round(torch.stack(losses).mean().item(), 5),
                    "seconds": round(time.monotonic() - start, 1),
                }
                losses.clear()
                print(row, flush=True)
                with open(config.out / "log.jsonl", "a") as log:
                    log.write(json.dumps(row) + "\n")
            if self.done % config.save_every == 0 or self.done == config.steps:
                self.save(self.done)
                self.pipeline().save_pretrained(config.out / "pipeline")

    def learn(self, batch: Batch) -> Tensor:
        """One optimiser step of all processes; the mean loss of this one's batch."""
        scale = schedule(batch.step, self.config.steps)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * scale
        loss = self.loss(batch)
        (loss * batch.share).backward()
        if dist.is_initialized():
            add_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.ema.step(self.parameters)
        return loss.detach()


def own_device() -> torch.device:
    """The card of this process, or the CPU where there is none. Raises ValueError where there are more processes than cards."""
    local, cards = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if cards and local >= cards:
        raise ValueError(
            f"process {local + 1} has no card, there are {cards}; start one for each card, or hide them: CUDA_VISIBLE_DEVICES="
        )
    return torch.device("cuda", local) if cards else torch.device("cpu")


def start_processes() -> None:
    """Join the other processes if torchrun started this one."""
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def add_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients of all processes in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def schedule(step: int, steps: int) -> float:
    """Warm-up over 200 steps, flat, then linear to 1 % over the last fifth."""
    return min(1.0, (step + 1) / 200) * max(0.01, min(1.0, (steps - step) / (0.2 * steps)))
