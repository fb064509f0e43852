"""What we know about UNets: the right layers, the right grid, and the contract of the stock processor."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from small_methods import Exact, RowMeans, Sharper

from reattend.attn_processors import LayoutError, install, installed
from reattend.attn_processors.families import family_of

EXACT = 1e-6  # same operations in another order, fp32
BF16 = 3e-2  # 8 bits of mantissa through 7 blocks


def exact_and_stock(model: Any, **call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    want = tiny.denoise(model, **call)
    with installed(model, Exact()):
        return tiny.denoise(model, **call), want


@pytest.mark.parametrize("size", [(16, 16), (9, 14), (7, 5), (1, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_our_path_equals_stock_on_any_grid(unet, size, batch):
    got, want = exact_and_stock(unet, size=size, batch=batch)
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_our_path_equals_stock_in_bfloat16(unet):
    got, want = exact_and_stock(unet.to(torch.bfloat16), size=(9, 14))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), atol=BF16, rtol=0)


def test_sdxl_pipeline_equals_stock(sdxl):
    want = tiny.run(sdxl, height=32, width=48)
    with installed(sdxl, Exact()) as handle:
        got = tiny.run(sdxl, height=32, width=48)
    assert len(handle.report().layers) == 11
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)  # latents reach 100


@pytest.mark.parametrize("size", [(16, 16), (9, 14), (33, 45), (31, 20), (7, 9)], ids=str)
def test_every_layer_gets_the_grid_its_block_really_has(unet, size):
    true, seen = {}, {}

    class Look(Exact):
        def attend(self, call, phase):
            seen[call.name] = call.grid
            return super().attend(call, phase)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: true.update({name: tuple(args[0].shape[-2:])}))
        for name, module in unet.named_modules()
        if type(module).__name__ == "Transformer2DModel"
    ]
    with installed(unet, Look()):
        tiny.denoise(unet, size=size)
    for hook in hooks:
        hook.remove()
    assert {name.rsplit(".transformer_blocks", 1)[0]: grid for name, grid in seen.items()} == true


def test_merged_tokens_come_back_through_unmerge(unet):
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 15, 64)
    install(unet, RowMeans(), layers="^mid")
    attn.processor.context.grids = {15: (5, 3)}
    with torch.no_grad():
        got = attn(x)
        rows = x.view(2, 5, 3, 64).mean(2, keepdim=True).expand(2, 5, 3, 64).reshape(2, 15, 64)
        want = attn.to_out[0](attn.to_v(rows))
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_a_method_that_loses_tokens_is_told(unet):
    class Loses(Exact):
        def attend(self, call, phase):
            return super().attend(call, phase)[:, 1:]

    install(unet, Loses())
    with pytest.raises(ValueError, match="returned 255 of 256 tokens"):
        tiny.denoise(unet)


def test_tokens_that_fit_no_level_raise_or_run_stock_with_one_warning(unet):
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(1, 10, 64)
    want = attn(x)
    with installed(unet, Sharper()):
        tiny.denoise(unet)
        with pytest.raises(LayoutError, match=r"'mid_block.*10 tokens fit no level.*16 x 16, 8 x 8.*layers="):
            attn(x)
    with installed(unet, Sharper(on_mismatch="stock")):
        tiny.denoise(unet)
        with pytest.warns(UserWarning, match="10 tokens fit no level.*the stock layer runs"):
            assert torch.equal(attn(x), want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attn(x)  # said once


def test_a_mask_is_honoured_or_refused(unet):
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 32)
    mask = torch.ones(1, 64)
    mask[:, 40:] = 0
    unet.requires_grad_(False)
    layers = "^down_blocks.0"  # the mask fits this level only, so look at one layer
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    x, bias = torch.randn(1, 64, 32), (1 - mask)[:, None] * -10000.0
    want = attn(x, attention_mask=bias)
    with installed(unet, Exact(), layers=layers):
        unet(sample, 1, text)
        torch.testing.assert_close(attn(x, attention_mask=bias), want, atol=EXACT, rtol=0)
    with installed(unet, Sharper(), layers=layers):
        unet(sample, 1, text)
        with pytest.raises(LayoutError, match="attention_mask, which Sharper cannot honour"):
            attn(x, attention_mask=bias)


CONTRACT = {
    "plain": {},
    "norm_num_groups": {"norm_num_groups": 8, "residual_connection": True, "rescale_output_factor": 2.0, "bias": True},
    "qk_norm": {"qk_norm": "layer_norm"},
    "spatial_norm": {"spatial_norm_dim": 6, "residual_connection": True},
}


@pytest.mark.parametrize("options", CONTRACT.values(), ids=CONTRACT)
@pytest.mark.parametrize("shape", [(3, 15, 32), (3, 32, 5, 3)], ids=["tokens", "picture"])
def test_keeps_the_contract_of_the_stock_processor(unet, options, shape):
    if "spatial_norm_dim" in options and len(shape) == 3:
        shape = (3, 32, 5, 3)
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, dim_head=8, **options).eval()
    x, temb = torch.randn(shape), torch.randn(3, 6, 5, 3)
    want = AttnProcessor2_0()(attn, x, None, None, temb)
    install(unet, Exact(), layers="^mid")
    ours = unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor
    ours.context.grids = {15: (5, 3)}
    torch.testing.assert_close(ours(attn, x, None, None, temb), want, atol=EXACT, rtol=0)


def test_animatediff_takes_spatial_layers_only_and_frames_sit_in_the_batch(animatediff):
    want = tiny.run(animatediff, height=32, width=48)
    handle = install(animatediff, Exact())
    names = [layer.name for layer in handle.report().layers]
    assert len(names) == 7 and not any("motion" in name for name in names)
    got = tiny.run(animatediff, height=32, width=48)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    context = animatediff.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor.context
    assert (context.batch, context.frames) == (2, 4)
    assert context.grids == {16 * 24: (16, 24), 8 * 12: (8, 12)}


def test_text_to_video_takes_spatial_layers_only():
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    model = UNet3DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        layers_per_block=1,
    ).eval()
    sample, text = torch.randn(1, 4, 3, 8, 12), torch.randn(1, 77, 32)
    with torch.no_grad():
        want = model(sample, 1, text).sample
        with installed(model, Exact()) as handle:
            names = [layer.name for layer in handle.report().layers]
            assert len(names) == 4 and not any("temp" in name or "transformer_in" in name for name in names)
            torch.testing.assert_close(model(sample, 1, text).sample, want, atol=1e-5, rtol=0)


def test_unconditional_unet_with_picture_shaped_layers():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    ).eval()
    sample = torch.randn(2, 3, 16, 12)
    with torch.no_grad():
        want = model(sample, 1).sample
        with installed(model, Exact()) as handle:
            torch.testing.assert_close(model(sample, 1).sample, want, atol=EXACT, rtol=0)
    assert {layer.level for layer in handle.report().layers} == {0}


SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SD21 = SD15 | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "layers", "per_level", "top"),
    [
        (SD15, 16, {0: 5, 1: 5, 2: 5, 3: 1}, (8, 320)),
        (SD21, 16, {0: 5, 1: 5, 2: 5, 3: 1}, (5, 320)),
        (SDXL, 70, {0: 10, 1: 60}, (10, 640)),
    ],
    ids=["sd15", "sd21", "sdxl"],
)
def test_finds_every_layer_of_the_full_size_classes(config, layers, per_level, top):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    report = install(model, Exact()).report()
    assert len(report.layers) == layers
    assert {level: sum(layer.level == level for layer in report.layers) for level in per_level} == per_level
    assert all((layer.heads, layer.width) == top for layer in report.layers if layer.level == 0)


def test_a_layer_that_is_cross_attention_is_left_alone():
    config = tiny.unet_config(only_cross_attention=(True, False))
    model = tiny.unet(**config)
    assert not any(info.name.startswith("down_blocks.0") for info, _ in family_of(model).layers(model))
