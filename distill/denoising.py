"""What each kind of denoiser is trained on: its inputs, its noise and its target.

Everything that differs between FLUX, Stable Diffusion 3 and the UNets sits here, so that data, losses and trainer know none
of them. Latents are as the pipeline's loop holds them: (B, N, C) tokens for FLUX, (B, C, H, W) for the others.

With clean latents x, noise e and a noise level s in [0, 1]:

    flow (FLUX, SD 3)    z = (1 - s) x + s e             target e - x             (Esser et al. 2024, arXiv 2403.03206)
    noise (UNets)        z = sqrt(a) x + sqrt(1 - a) e   target e                 a = alpha-bar of timestep s * 1000
    v (UNets)            the same                        target sqrt(a) e - sqrt(1 - a) x      (Salimans and Ho 2022)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..pipelines.filling_in import guided

__all__ = ["Denoising", "denoising_of"]

Size = tuple[int, int]  # width and height in pixels


class Denoising:
    """One pipeline as a thing to train. Base of the kinds; `denoising_of` makes the right one."""

    compares = True  # the pipeline compares with an empty caption (classifier-free guidance)
    denoiser = "transformer"

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.scheduler = pipe.scheduler

    @property
    def model(self) -> nn.Module:
        """The denoiser."""
        return getattr(self.pipe, self.denoiser)

    def encode_text(self, prompts: list[str], length: int | None) -> dict[str, Tensor]:
        """Embeddings of captions, each (B, ...), under names that `inputs` knows; `length` in tokens, see `chosen_length`."""
        raise NotImplementedError

    def sample(self, prompts: list[str], size: Size, generators: list[torch.Generator], steps: int,
               guidance: float | None, length: int | None) -> Tensor:  # fmt: skip
        """Latents that the stock pipeline makes of captions, (B, ...); `length` of the text in tokens, see `chosen_length`."""
        more: dict[str, Any] = {**guided(self.pipe, guidance)}
        if length is not None:
            more["max_sequence_length"] = length
        return self.pipe(prompt=prompts, width=size[0], height=size[1], generator=generators, num_inference_steps=steps,
                         output_type="latent", **more).images  # fmt: skip

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Latents of pictures (B, 3, height, width) in [-1, 1]: the mean of the VAE's distribution."""
        vae = self.pipe.vae
        mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
        return (mean - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    def warp(self, levels: Tensor, tokens: int) -> Tensor:
        """Noise levels in [0, 1] drawn without regard to the sampler -> as its steps visit them."""
        return levels

    def corrupt(self, clean: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """(noisy latents, target), both like `clean`; `levels` (B,)."""
        s = levels.view(-1, *[1] * (clean.ndim - 1))
        return clean + s * (noise - clean), noise - clean

    def inputs(self, noisy: Tensor, levels: Tensor, text: dict[str, Tensor], size: Size, guidance: float) -> dict:
        """Keyword arguments of the denoiser's forward."""
        raise NotImplementedError

    def tokens(self, size: Size) -> int:
        """Tokens of the denoiser's finest level at a size."""
        height, width = self.grid(size)
        return height * width

    def grid(self, size: Size) -> tuple[int, int]:
        """(rows, columns) of these tokens."""
        raise NotImplementedError


class _Flow(Denoising):
    def warp(self, levels: Tensor, tokens: int) -> Tensor:
        """The sampler's shift towards noise, which with dynamic shifting grows with the picture."""
        config = self.scheduler.config
        shift = float(config.get("shift") or 1.0)
        if config.get("use_dynamic_shifting"):
            few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            mu = low + (high - low) * (tokens - few) / (many - few)
            shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
        return shift * levels / (1 + (shift - 1) * levels)


class _Flux(_Flow):
    compares = False

    def __init__(self, pipe: Any):
        super().__init__(pipe)
        self._ids: dict[Any, Tensor] = {}  # the context reads the grid once per object

    def encode_text(self, prompts: list[str], length: int | None) -> dict[str, Tensor]:
        text, pooled, _ = self.pipe.encode_prompt(
            prompts, prompt_2=None, max_sequence_length=length, device=self.model.device
        )
        return {"text": text, "pooled": pooled}

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        latents = super().encode_pictures(pixels)
        return self.pipe._pack_latents(latents, *latents.shape)

    def inputs(self, noisy: Tensor, levels: Tensor, text: dict[str, Tensor], size: Size, guidance: float) -> dict:
        key = (size, noisy.device, noisy.dtype)
        if key not in self._ids:
            rows, columns = self.grid(size)
            self._ids[key] = self.pipe._prepare_latent_image_ids(1, rows, columns, noisy.device, noisy.dtype)
        told = torch.full_like(levels, guidance) if self.model.config.guidance_embeds else None
        return {
            "hidden_states": noisy,
            "timestep": levels,
            "guidance": told,
            "encoder_hidden_states": text["text"],
            "pooled_projections": text["pooled"],
            "img_ids": self._ids[key],
            "txt_ids": torch.zeros(text["text"].shape[1], 3, device=noisy.device, dtype=noisy.dtype),
        }

    def grid(self, size: Size) -> tuple[int, int]:
        cell = 2 * self.pipe.vae_scale_factor
        return size[1] // cell, size[0] // cell


class _SD3(_Flow):
    def encode_text(self, prompts: list[str], length: int | None) -> dict[str, Tensor]:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, device=self.model.device, max_sequence_length=length
        )
        return {"text": text, "pooled": pooled}

    def inputs(self, noisy: Tensor, levels: Tensor, text: dict[str, Tensor], size: Size, guidance: float) -> dict:
        return {
            "hidden_states": noisy,
            "timestep": levels * self.scheduler.config.num_train_timesteps,
            "encoder_hidden_states": text["text"],
            "pooled_projections": text["pooled"],
        }

    def grid(self, size: Size) -> tuple[int, int]:
        cell = self.pipe.vae_scale_factor * self.model.config.patch_size
        return size[1] // cell, size[0] // cell


class _UNet(Denoising):
    denoiser = "unet"

    def encode_text(self, prompts: list[str], length: int | None) -> dict[str, Tensor]:
        text, _ = self.pipe.encode_prompt(prompts, self.model.device, 1, do_classifier_free_guidance=False)
        return {"text": text}

    def corrupt(self, clean: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.scheduler.alphas_cumprod.to(clean.device, torch.float32)
        a = alphas[self.steps(levels)].view(-1, 1, 1, 1)
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        if self.scheduler.config.prediction_type == "v_prediction":
            return noisy, a.sqrt() * noise - (1 - a).sqrt() * clean
        if self.scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"the scheduler predicts {self.scheduler.config.prediction_type!r}; trained are epsilon and v_prediction"
            )
        return noisy, noise

    def steps(self, levels: Tensor) -> Tensor:
        """Timesteps of the training schedule, int64."""
        count = self.scheduler.config.num_train_timesteps
        return (levels * count).long().clamp(0, count - 1)

    def inputs(self, noisy: Tensor, levels: Tensor, text: dict[str, Tensor], size: Size, guidance: float) -> dict:
        return {"sample": noisy, "timestep": self.steps(levels), "encoder_hidden_states": text["text"]}

    def grid(self, size: Size) -> tuple[int, int]:
        return size[1] // self.pipe.vae_scale_factor, size[0] // self.pipe.vae_scale_factor


KINDS = {"FluxPipeline": _Flux, "StableDiffusion3Pipeline": _SD3, "StableDiffusionPipeline": _UNet}


def denoising_of(pipe: Any) -> Denoising:
    """How this pipeline is trained. Raises TypeError naming the classes that can be."""
    kind = KINDS.get(type(pipe).__name__)
    if kind is None:
        raise TypeError(f"{type(pipe).__name__} cannot be distilled yet; {', '.join(KINDS)} can.")
    return kind(pipe)
