"""Train tiny-sd: UNet and text encoder together, on scenes encoded once by the VAE.

Run: torchrun --nproc-per-node 2 -m reattend.emoji_world.train_sd --out runs/sd --steps 20000     (goes on from runs/sd)

The prediction target is v (Salimans & Ho 2022), with its plain mean square error: min-SNR weights all but hide the noisy
steps, and only there do captions matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from . import captions
from .batches import Batch
from .training import Trainer, TrainingConfig, start_processes

NOISE = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}


@dataclass(frozen=True, kw_only=True)
class SdConfig(TrainingConfig):
    """Training of tiny-sd."""

    out: Path = Path("runs/sd")


def sampler() -> DPMSolverMultistepScheduler:
    """What pictures and films are made with."""
    return DPMSolverMultistepScheduler(num_train_timesteps=1000, timestep_spacing="trailing", steps_offset=1, **NOISE)


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


class SdTrainer(Trainer):
    """tiny-sd: a UNet and a CLIP text encoder, at 128 px."""

    side = 128
    lean = 0.7  # as it was last trained

    def build(self) -> dict[str, nn.Module]:
        self.tokenizer = captions.build_tokenizer()
        self.noising = DDPMScheduler(num_train_timesteps=1000, **NOISE)
        unet, text = build_unet(self.vae.config.latent_channels), captions.build_text_encoder(self.tokenizer)
        return {"unet": unet, "text_encoder": text}

    def loss(self, batch: Batch) -> Tensor:
        t = (batch.times * 1000).long()
        text = self.parts["text_encoder"](batch.ids["text_encoder"]).last_hidden_state
        guess = self.parts["unet"](self.noising.add_noise(batch.clean, batch.noise, t), t, text).sample
        return (guess - self.noising.get_velocity(batch.clean, batch.noise, t)).square().mean()

    def pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            **self.averaged(),
            vae=AutoencoderKL.from_pretrained(self.config.vae).half(),
            tokenizer=self.tokenizer,
            scheduler=sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


if __name__ == "__main__":
    settings = tyro.cli(SdConfig)
    start_processes()
    SdTrainer(settings).train()
