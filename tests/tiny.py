"""Tiny random pipelines of stock diffusers classes, built in memory: no network, no files, a fraction of a second each.

The VAEs shrink by 2, so 32 x 32 pixels are 16 x 16 latents. Every UNet has attention at both of its levels. Weights
are random but seeded: pictures are noise, so compare arrays. The builders are cached; the fixtures in `conftest.py`
hand out `fresh` copies, so a test may change what it gets.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CHANNELS = (32, 64)
TEXT_WIDTH = 32
VAE_FACTOR = 2


@cache
def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per byte, 514 entries."""
    printable = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters = printable + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def text_encoder(seed: int = 0, projection: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=TEXT_WIDTH,
        vocab_size=len(tokenizer()),
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    torch.manual_seed(seed)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


@cache
def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer whose pieces are single ASCII characters, 99 entries."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(chr(i) for i in range(33, 128))]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=512)


def t5_encoder(seed: int = 0, width: int = TEXT_WIDTH) -> torch.nn.Module:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        pad_token_id=t5_tokenizer().pad_token_id,
        eos_token_id=t5_tokenizer().eos_token_id,
    )
    torch.manual_seed(seed)
    return T5EncoderModel(config).eval()


def vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    config = {
        "block_out_channels": CHANNELS,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
    }
    torch.manual_seed(seed)
    return AutoencoderKL(**(config | changes)).eval()


def unet_config(**changes: Any) -> dict[str, Any]:
    """Two levels, both with attention, 7 transformer blocks: down 1 + 1, mid 1, up 2 + 2."""
    return {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": CHANNELS,
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": TEXT_WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    } | changes


def unet(seed: int = 0, **changes: Any) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**unet_config(**changes)).eval()


def controlnet(seed: int = 0) -> torch.nn.Module:
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    net = ControlNetModel(
        in_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        conditioning_embedding_out_channels=(16, 32),
    ).eval()
    for zeroed in [*net.controlnet_down_blocks, net.controlnet_mid_block]:  # else it would change nothing
        torch.nn.init.normal_(zeroed.weight, std=0.1)
    return net


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


@cache
def sd() -> Any:
    from diffusers import StableDiffusionPipeline

    return quiet(StableDiffusionPipeline(**_sd_parts()))


@cache
def sd_controlnet() -> Any:
    from diffusers import StableDiffusionControlNetPipeline

    return quiet(StableDiffusionControlNetPipeline(**_sd_parts(), controlnet=controlnet()))


@cache
def sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    denoiser = unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        cross_attention_dim=2 * TEXT_WIDTH,
    )
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=text_encoder(),
            text_encoder_2=text_encoder(1, projection=True),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=denoiser,
            scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
            add_watermarker=False,
        )
    )


@cache
def sd3_pipeline() -> Any:
    """Stable Diffusion 3 with two joint blocks, the first with a second attention; sides are multiples of 2 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    text_width = 2 * TEXT_WIDTH  # both CLIP encoders side by side; T5 is as wide
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        out_channels=4,
        pos_embed_max_size=64,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    return quiet(
        StableDiffusion3Pipeline(
            vae=_flow_vae(),
            text_encoder=text_encoder(projection=True),
            text_encoder_2=text_encoder(1, projection=True),
            text_encoder_3=t5_encoder(width=text_width),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            tokenizer_3=t5_tokenizer(),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


@cache
def flux_pipeline() -> Any:
    """Flux with one double and one single block; a token is 4 x 4 pixels, so 32 x 48 pixels are 8 x 12 tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * 4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    pipe = FluxPipeline(
        vae=_flow_vae(),
        text_encoder=text_encoder(),
        text_encoder_2=t5_encoder(),
        tokenizer=tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipe.default_sample_size = 16  # 32 x 32 pixels; the class assumes 128 latents and knows no config for it
    return quiet(pipe)


@cache
def animatediff() -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    torch.manual_seed(1)
    adapter = MotionAdapter(
        block_out_channels=CHANNELS, motion_layers_per_block=1, motion_num_attention_heads=4, motion_max_seq_length=32
    )
    parts = _sd_parts()
    parts = {key: parts[key] for key in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    return quiet(AnimateDiffPipeline(**parts, motion_adapter=adapter.eval()))


@cache
def animatediff_sdxl() -> Any:
    from diffusers import AnimateDiffSDXLPipeline, MotionAdapter

    torch.manual_seed(2)
    adapter = MotionAdapter(
        block_out_channels=CHANNELS, motion_layers_per_block=1, motion_num_attention_heads=4, use_motion_mid_block=False
    )
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    parts = {name: sdxl().components[name] for name in names}
    return quiet(AnimateDiffSDXLPipeline(**parts, motion_adapter=adapter.eval()))


@cache
def animatediff_inputs(kind: str, nets: int = 1) -> Any:
    """Another pipeline of the AnimateDiff family, by a part of its name: "ControlNet", "VideoToVideo", "PAG" and so on."""
    import diffusers

    parts = dict(animatediff().components)
    if "Control" in kind:
        found = [controlnet(seed) for seed in range(nets)]
        for net in found:  # else the pictures would change nothing
            torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.5)
        parts["controlnet"] = found[0] if nets == 1 else found
    return quiet(getattr(diffusers, f"AnimateDiff{kind}Pipeline")(**parts))


@cache
def animatediff_sparse(simplified: bool = True) -> Any:
    """AnimateDiff with a sparse ControlNet, which has motion modules of its own."""
    from diffusers import AnimateDiffSparseControlNetPipeline, SparseControlNetModel

    torch.manual_seed(3)
    net = SparseControlNetModel(
        conditioning_channels=4 if simplified else 3,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlockMotion",) * 2,
        conditioning_embedding_out_channels=(16, 32),
        motion_num_attention_heads=4,
        norm_num_groups=8,  # of one channel each, frames without a picture would be constant, and rounding blown up
        use_simplified_condition_embedding=simplified,
    ).eval()
    first = net.controlnet_cond_embedding if simplified else net.controlnet_cond_embedding.conv_out
    for zeroed in [*net.controlnet_down_blocks, net.controlnet_mid_block, first]:  # else it would change nothing
        torch.nn.init.normal_(zeroed.weight, std=0.3)
    return quiet(AnimateDiffSparseControlNetPipeline(**animatediff().components, controlnet=net))


def fresh(pipe: Any) -> Any:
    """A copy with denoisers and scheduler of its own; VAE, text encoders and tokenizers are shared, never edited."""
    shared = [part for name, part in pipe.components.items() if name.startswith(("vae", "text_encoder", "tokenizer"))]
    return copy.deepcopy(pipe, {id(part): part for part in shared if part is not None})


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoise(model: torch.nn.Module, size: tuple[int, int] = (16, 16), batch: int = 1, t: float = 500) -> torch.Tensor:
    """One call of a bare UNet with seeded input at (height, width) latents; much cheaper than a pipeline."""
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4, *size, generator=draw).to(model.dtype)
    text = torch.randn(batch, 77, TEXT_WIDTH, generator=draw).to(model.dtype)
    with torch.no_grad():
        return model(sample, torch.tensor(t), text).sample


def denoise_video(model: torch.nn.Module, frames: int, t: float = 500, batch: int = 1) -> torch.Tensor:
    """One call of a bare AnimateDiff UNet with seeded input of 6 x 8 latents, (B, 4, F, 6, 8)."""
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4, frames, 6, 8, generator=draw).to(model.dtype)
    text = torch.randn(batch * frames, 5, TEXT_WIDTH, generator=draw).to(model.dtype)
    with torch.no_grad():
        return model(sample, torch.tensor(t), text).sample


def image_ids(height: int, width: int, picture: int = 0, corner: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Image ids of FLUX for one picture of height x width tokens, shape (N, 3)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.full_like(rows, picture), rows + corner[0], columns + corner[1]], -1)
    return places.reshape(-1, 3).float()


def denoise_flux(
    model: torch.nn.Module, ids: torch.Tensor, text: int = 7, batch: int = 1, **extra: Any
) -> torch.Tensor:
    """One call of a bare FLUX with seeded input."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(batch, len(ids), 16, generator=draw),
            encoder_hidden_states=torch.randn(batch, text, TEXT_WIDTH, generator=draw),
            pooled_projections=torch.randn(batch, TEXT_WIDTH, generator=draw),
            timestep=torch.full((batch,), 0.5),
            img_ids=ids,
            txt_ids=torch.zeros(text, 3),
            **extra,
        ).sample


def _flow_vae() -> AutoencoderKL:
    return vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.06)


def _sd_parts() -> dict[str, Any]:
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    """Call a pipeline for two seeded steps; latents (or whatever `output_type` says) as a tensor."""
    settings = {
        "prompt": "a blue car on sand",
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }
    if hasattr(pipe, "motion_adapter"):
        settings |= {"num_frames": 4}
    if "Control" in type(pipe).__name__ and "image" not in changes:
        size = (changes.get("height", 32), changes.get("width", 32))
        settings |= {"image": torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        out = pipe(**(settings | changes))
    return getattr(out, "frames" if hasattr(out, "frames") else "images")
