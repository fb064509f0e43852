"""Tiny random FLUX.2, Qwen-Image and Z-Image transformers of stock classes, and one seeded call of each.

Their text encoders are language models of gigabytes, so the pipelines here have none and take prompt embeddings.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tiny import TEXT_WIDTH, image_ids, quiet
from torch import Tensor, nn

HEADS, HEAD_WIDTH = 2, 16


@cache
def flux2() -> nn.Module:
    """One double and one single block."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()


@cache
def qwenimage(**changes: Any) -> nn.Module:
    """Two double blocks."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    config = {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return QwenImageTransformer2DModel(**(config | changes)).eval()


@cache
def z_image() -> nn.Module:
    """One block that refines the picture, one that refines text, two that see both."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=HEADS * HEAD_WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 64, 64],
    ).eval()
    for token in (model.x_pad_token, model.cap_pad_token):
        nn.init.normal_(token)  # zero at birth, which would hide what filling does
    return model


def denoise_flux2(
    model: nn.Module, size: tuple[int, int], text: int = 7, batch: int = 1, reference: Any = None, **extra: Any
) -> Tensor:
    """One call at size = (rows, columns) of tokens; `reference` is the size of a reference picture."""
    ids = image_ids(*size)
    if reference is not None:
        ids = torch.cat([ids, image_ids(*reference, picture=10)])
    draw = torch.Generator().manual_seed(0)
    words = torch.nn.functional.pad(torch.arange(text).float()[:, None], (3, 0))
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(batch, len(ids), 16, generator=draw),
            encoder_hidden_states=torch.randn(batch, text, TEXT_WIDTH, generator=draw),
            timestep=torch.full((batch,), 0.5),
            guidance=torch.full((batch,), 4.0),
            img_ids=torch.nn.functional.pad(ids, (0, 1)),
            txt_ids=words,
            **extra,
        ).sample


def denoise_qwenimage(
    model: nn.Module, size: tuple[int, int], text: int = 7, batch: int = 1, reference: Any = None, **extra: Any
) -> Tensor:
    """One call at size = (rows, columns) of tokens; `reference` is the size of a reference picture."""
    pictures = [(1, *size)] + ([(1, *reference)] if reference else [])
    tokens = sum(height * width for _, height, width in pictures)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(batch, tokens, 16, generator=draw),
            encoder_hidden_states=torch.randn(batch, text, TEXT_WIDTH, generator=draw),
            timestep=torch.full((batch,), 0.5),
            img_shapes=[pictures] * batch,
            **extra,
        ).sample


def denoise_z_image(
    model: nn.Module, size: tuple[int, int], text: int | tuple[int, ...] = 7, batch: int = 1, **extra: Any
) -> Tensor:
    """One call at size = (rows, columns) of tokens; `text` may be one length for each row."""
    lengths = (text,) * batch if isinstance(text, int) else text
    draws = [torch.Generator().manual_seed(row) for row in range(len(lengths))]
    pictures = [torch.randn(4, 1, 2 * size[0], 2 * size[1], generator=draw) for draw in draws]
    captions = [torch.randn(length, TEXT_WIDTH, generator=draw) for length, draw in zip(lengths, draws, strict=True)]
    with torch.no_grad():
        return torch.stack(model(pictures, torch.full((len(lengths),), 0.5), captions, **extra).sample)


def pipeline(model: nn.Module) -> Any:
    """The stock pipeline around one of these transformers, without text encoder and VAE."""
    import diffusers

    name = {"Flux2Transformer2DModel": "Flux2Pipeline", "QwenImageTransformer2DModel": "QwenImagePipeline"}
    cls = getattr(diffusers, name.get(type(model).__name__, "ZImagePipeline"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return quiet(cls(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=model))


def run(pipe: Any, steps: int = 2, height: int = 96, width: int = 128) -> Tensor:
    """Latents of a seeded run; 16 pixels are a token, so this is 6 x 8 of them."""
    draw = torch.Generator().manual_seed(0)
    embeds: Any = torch.randn(1, 9, TEXT_WIDTH, generator=draw)
    more: dict[str, Any] = {}
    if type(pipe).__name__ == "ZImagePipeline":
        embeds = [embeds[0]]
        more = {"negative_prompt_embeds": [embeds[0].flip(0)[:4]]}  # guidance needs it
    elif type(pipe).__name__ == "QwenImagePipeline":
        other = torch.randn(1, 5, TEXT_WIDTH, generator=draw)
        more = {"negative_prompt_embeds": other, "negative_prompt_embeds_mask": torch.ones(1, 5)}
        more |= {"prompt_embeds_mask": (torch.arange(9) < 6).long()[None]}
    with torch.no_grad():
        return pipe(
            prompt_embeds=embeds, num_inference_steps=steps, height=height, width=width, output_type="latent",
            generator=draw, **more,
        ).images  # fmt: skip
