"""Train tiny-flux: a FLUX transformer with its CLIP and T5 encoders, on the captions and the VAE of tiny-sd.

Run: torchrun --nproc-per-node 2 -m reattend.emoji_world.train_flux --out runs/flux --steps 20000   (goes on from runs/flux)

The base size is 256 px, 16 x 16 tokens, one per lattice step of the world. The target is the velocity of a straight flow,
noise - picture (Liu et al. 2023; Esser et al. 2024). Two things make a plain `pipe("...")` right:

- FluxPipeline pads the T5 text to 512 tokens and masks nothing, so a share of the steps trains with that length.
- It makes one call per step, without an empty caption to compare with. So the last `guided_steps` learn the guided
  velocity of the averaged weights as they were before (`guiding`): guidance is built in, and a step costs one call.

Before the first picture T5 learns to read captions (`clauses`), and goes on telling what it read. Until the guided steps
the hidden states half-way through the transformer also learn to tell what is where (`layout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..pipelines.files import written_whole
from ..pipelines.upscaling import ROPE_THETA_SCALE, rotary_base
from . import captions, world
from .batches import Batch, stratified
from .clauses import ClauseHead, word_labels
from .guiding import SHIFT, Drawing, guided_mean, sampler_times
from .layout import LayoutHead, cell_labels
from .training import Trainer, TrainingConfig, start_processes

T5_TOKENS = 24  # the longest caption of the world has 15
TEXT_LENGTHS = (T5_TOKENS, 64, 512)  # to which captions are padded
LENGTH_WEIGHTS = (0.8, 0.15, 0.05)  # 512 costs four times as much as 24
GUIDED_LENGTH_WEIGHTS = (0.5, 0.2, 0.3)  # in the guided steps
LAYOUT = 0.1  # weight of telling what is where
CLAUSES = 0.1  # weight of telling what the caption says of a word
MOST_NOISE = 0.9  # in large scenes: upscaling begins with a picture
CAPTIONS = 64  # per step before the first picture
GUIDED_EMA = 0.99  # decay of the averaged weights in the guided steps: they must leave those of before behind


@dataclass(frozen=True, kw_only=True)
class FluxConfig(TrainingConfig):
    """Training of tiny-flux."""

    out: Path = Path("runs/flux")
    guided_steps: int = 2000  # how many of the last steps learn the guided velocity, where their scenes are not large
    guidance: float = 4.5  # that they learn
    text_steps: int = 1000  # of T5 on captions alone, before the first of `steps`


def build_transformer(latent_channels: int) -> FluxTransformer2DModel:
    """Two double and four single blocks, 4 heads of 48 channels, 5 million parameters."""
    return FluxTransformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=captions.WIDTH,
        pooled_projection_dim=captions.WIDTH,
        axes_dims_rope=(8, 20, 20),
    )


class FluxTrainer(Trainer):
    """tiny-flux: transformer, CLIP and T5, at 256 px."""

    side = 256
    lean = 1.0  # what goes wrong is which sprites there are, and that is decided early
    large = 0.2  # upscaling draws sprites of twice as many tokens

    def __init__(self, config: FluxConfig):
        super().__init__(config)
        self.teacher: dict[str, nn.Module] | None = None
        self.drawing: Drawing | None = None
        self.parts["transformer"].single_transformer_blocks[0].register_forward_hook(self._keep_hidden)
        self.parts["text_encoder_2"].register_forward_hook(self._keep_text)

    def _keep_hidden(self, block: nn.Module, given: tuple, answer: tuple[Tensor, Tensor]) -> None:
        """Of the image tokens, half-way through the transformer."""
        self.hidden = answer[1]

    def _keep_text(self, encoder: nn.Module, given: tuple, answer: Any) -> None:
        """What T5 gives to the transformer."""
        self.text = answer.last_hidden_state

    def build(self) -> dict[str, nn.Module]:
        self.tokenizer, self.t5_tokenizer = captions.build_tokenizer(), captions.build_t5_tokenizer()
        transformer = build_transformer(self.vae.config.latent_channels)
        return {
            "transformer": transformer,
            "text_encoder": captions.build_text_encoder(self.tokenizer),
            "text_encoder_2": captions.build_t5_encoder(self.t5_tokenizer),
            "clauses": ClauseHead(captions.WIDTH),
            "layout": LayoutHead(transformer.config.num_attention_heads * transformer.config.attention_head_dim),
        }

    def ids(self, words: list[str]) -> dict[str, Tensor]:
        t5 = captions.tokenize(self.t5_tokenizer, words, T5_TOKENS)
        return super().ids(words) | {"text_encoder_2": torch.from_numpy(t5)}

    def labels(self, batch: Batch, scenes: list[world.Scene]) -> dict[str, dict[str, Tensor]]:
        if self.is_guided(batch.step):
            return {}
        labels = {"clauses": word_labels(self.t5_tokenizer, batch.words, batch.ids["text_encoder_2"])}
        rows, columns = batch.clean.shape[2] // 2, batch.clean.shape[3] // 2
        if rows <= world.LATTICE:  # its cells are the tokens of the base size
            labels["layout"] = cell_labels(scenes, rows, columns)
        return labels

    def loss(self, batch: Batch) -> Tensor:
        if self.is_guided(batch.step):
            return self.guided_loss(batch)
        times, length = batch.times, self.text_length(batch.step, LENGTH_WEIGHTS)
        mixed = batch.clean.lerp(batch.noise, times.view(-1, 1, 1, 1))
        target = batch.noise - batch.clean
        velocity = self.velocity(self.parts, mixed, batch.ids, times, length, self.theta_scale(batch))
        loss = (velocity - target).square().mean()
        told = {"clauses": (CLAUSES, self.text[:, :T5_TOKENS]), "layout": (LAYOUT, self.hidden)}
        for name, labels in batch.labels.items():
            weight, hidden = told[name]
            loss = loss + weight * self.parts[name](hidden, labels)
        return loss

    def guided_loss(self, batch: Batch) -> Tensor:
        """On pictures that the model is drawing itself, one sampler step per call; `batch` begins those that come next."""
        if self.teacher is None:
            self.teacher = self.frozen_teacher()
            self.ema.decay = GUIDED_EMA
            self.drawing = Drawing(batch)
        assert self.drawing is not None
        self.drawing.renew(batch)
        mixed, ids, times = self.drawing.mixed, self.drawing.ids, self.drawing.stops()[0]
        teacher = partial(self.velocity, self.teacher, length=T5_TOKENS)
        empty = {name: ids.to(self.device) for name, ids in self.ids([""]).items()}
        target = guided_mean(self.drawing, teacher, self.config.guidance, empty)
        length = self.text_length(batch.step, GUIDED_LENGTH_WEIGHTS)
        velocity = self.velocity(self.parts, mixed, ids, times, length)
        self.drawing.move(velocity.detach())
        return (velocity - target).square().mean()

    def text_length(self, step: int, weights: tuple[float, ...]) -> int:
        """Of a step's T5 tokens, the same in every process."""
        return int(np.random.default_rng((self.config.seed, step, 1)).choice(TEXT_LENGTHS, p=weights))

    def theta_scale(self, batch: Batch) -> float:
        """Of the rotary base: half of the large scenes are seen as `upscale` shows them, half as the stock pipeline does."""
        if batch.clean.shape[-1] <= self.side // 8:
            return 1.0
        return ROPE_THETA_SCALE if np.random.default_rng((self.config.seed, batch.step, 4)).random() < 0.5 else 1.0

    def is_guided(self, step: int) -> bool:
        """Whether a step learns the guided velocity: of the last ones those on scenes of the base size."""
        return step >= self.config.steps - self.config.guided_steps and self.stage(step) != "large"

    def times(self, step: int, count: int, generator: torch.Generator) -> Tensor:
        """Of large scenes those that `upscale` visits; in the guided steps the sampler's, where the first drawings begin."""
        if self.stage(step) == "large":
            return MOST_NOISE * stratified(count, generator)
        if not self.is_guided(step):
            return super().times(step, count, generator)
        return sampler_times(stratified(count, generator))

    def train(self) -> None:
        if self.done == 0:
            self.learn_to_read()
        super().train()

    def learn_to_read(self) -> float:
        """T5 on captions alone, the same in every process; the loss of the last step."""
        encoder, head, loss = self.parts["text_encoder_2"], self.parts["clauses"], torch.zeros(())
        optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=self.config.lr)
        rng = np.random.default_rng((self.config.seed, 3))
        for _ in range(self.config.text_steps):
            words = world.sample_captions(rng, CAPTIONS, held_out=False)
            ids = self.ids(words)["text_encoder_2"]
            labels = {name: each.to(self.device) for name, each in word_labels(self.t5_tokenizer, words, ids).items()}
            loss = head(encoder(ids.to(self.device)).last_hidden_state, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*encoder.parameters(), *head.parameters()], 1.0)
            optimizer.step()
        return loss.item()

    def frozen_teacher(self) -> dict[str, nn.Module]:
        """The averaged weights at the beginning of the guided steps, kept in a file so that a resumed run has them."""
        file = self.config.out / "teacher.pt"
        teacher = self.averaged()
        if self.rank == 0 and not file.exists():
            with written_whole(file) as (aside,):
                torch.save({name: part.state_dict() for name, part in teacher.items()}, aside)
        if dist.is_initialized():
            dist.barrier()  # the first process writes, all read
        for name, state in torch.load(file, weights_only=True).items():
            teacher[name].load_state_dict(state)
        return {name: part.float().requires_grad_(False).to(self.device) for name, part in teacher.items()}

    def velocity(
        self,
        parts: dict[str, nn.Module],
        mixed: Tensor,
        ids: dict[str, Tensor],
        times: Tensor,
        length: int,
        theta_scale: float = 1.0,
    ) -> Tensor:
        """The transformer's answer, unpacked: (B, C, H, W). In bfloat16, which is nearly twice as fast on a CPU that has it."""
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # for a CPU, too
        # Fused attention is slower backwards on a CPU, and torch's choice on an H200 gave gradients that are no numbers.
        math, numbers = sdpa_kernel(SDPBackend.MATH), torch.autocast(mixed.device.type, torch.bfloat16)
        with rotary_base(parts["transformer"], theta_scale), numbers, math:
            return self._velocity(parts, mixed, ids, times, length).float()

    def _velocity(
        self, parts: dict[str, nn.Module], mixed: Tensor, ids: dict[str, Tensor], times: Tensor, length: int
    ) -> Tensor:
        pooled = parts["text_encoder"](ids["text_encoder"]).pooler_output
        short = ids["text_encoder_2"]
        padded = nn.functional.pad(short, (0, length - short.shape[1]), value=self.t5_tokenizer.pad_token_id)
        text = parts["text_encoder_2"](padded).last_hidden_state
        rows, columns = mixed.shape[2] // 2, mixed.shape[3] // 2
        grid = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
        out = parts["transformer"](
            hidden_states=pack(mixed),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=times,
            img_ids=grid.to(mixed.device),
            txt_ids=torch.zeros(length, 3, device=mixed.device),
        ).sample
        return unpack(out, rows, columns)

    def pipeline(self) -> FluxPipeline:
        vae = AutoencoderKL.from_pretrained(self.config.vae).half()
        vae.register_to_config(
            shift_factor=0.0, sample_size=self.side
        )  # FluxPipeline adds the one, `load` reads the other
        parts = self.averaged()
        del parts["layout"], parts["clauses"]
        return FluxPipeline(
            **parts,
            vae=vae,
            tokenizer=self.tokenizer,
            tokenizer_2=self.t5_tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        )


def pack(latents: Tensor) -> Tensor:
    """2 x 2 latents to a token, as FluxPipeline does: (B, C, H, W) -> (B, H/2 * W/2, 4 C)."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The way back: (B, rows * columns, 4 C) -> (B, C, 2 rows, 2 columns)."""
    cells = tokens.view(len(tokens), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(len(tokens), -1, 2 * rows, 2 * columns)


if __name__ == "__main__":
    settings = tyro.cli(FluxConfig)
    start_processes()
    FluxTrainer(settings).train()
