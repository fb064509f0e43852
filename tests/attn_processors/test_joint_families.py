"""What we know about FLUX, Stable Diffusion 3 and PixArt: the right layers, the right order of tokens, stock results."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from small_methods import Exact, Halves, Recording
from tiny import denoise_flux, image_ids
from torch import Tensor

from reattend.attn_processors import AgentAttnProcessor, LayerCall, LayoutError, install, installed
from reattend.attn_processors.families.flux import raster

EXACT = 1e-5  # same operations in another order, fp32, through two blocks


@dataclass(frozen=True, kw_only=True)
class ExactJoint(Exact):
    """Stock attention by our path, in every layer a transformer has."""

    roles: ClassVar[tuple[str, ...]] = ("spatial", "joint")


@dataclass(frozen=True, kw_only=True)
class Looking(ExactJoint):
    """Keeps the layout of every call."""

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        call.context.slots.setdefault("layouts", {})[call.name] = call.layout
        return super().attend(call, phase)


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (1, 5)], ids=str)
@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("batch", [1, 2])
def test_flux_equals_stock_on_any_grid_and_text(flux, size, text, batch):
    model = flux.transformer
    want = denoise_flux(model, image_ids(*size), text, batch)
    with installed(model, Looking()):
        got = denoise_flux(model, image_ids(*size), text, batch)
        layouts = next(iter(model._forward_pre_hooks.values())).slots["layouts"]
    assert {(*layout.shape, layout.before, layout.after) for layout in layouts.values()} == {(*size, text, 0)}
    assert len(layouts) == 2
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)
    assert torch.equal(denoise_flux(model, image_ids(*size), text, batch), want)


def test_reference_pictures_are_global_tokens(flux):
    model = flux.transformer
    ids = torch.cat([image_ids(6, 9), image_ids(4, 5, picture=1)])
    want = denoise_flux(model, ids)
    with installed(model, Looking()):
        got = denoise_flux(model, ids)
        layouts = next(iter(model._forward_pre_hooks.values())).slots["layouts"]
    assert {(*layout.shape, layout.before, layout.after) for layout in layouts.values()} == {(6, 9, 7, 20)}
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_raster_reads_the_first_picture_or_refuses():
    assert raster(image_ids(6, 9)) == (6, 9)
    assert raster(image_ids(6, 9, corner=(3, 4))) == (6, 9)
    assert raster(torch.cat([image_ids(6, 9), image_ids(6, 9, picture=1)])) == (6, 9)
    assert raster(image_ids(6, 9)[:-1]) is None
    assert raster(image_ids(6, 9).flip(0)) is None


def test_ids_that_are_no_raster_raise_or_run_stock(flux):
    model, ids = flux.transformer, image_ids(6, 9).flip(0)
    want = denoise_flux(model, ids)
    with installed(model, ExactJoint()), pytest.raises(LayoutError, match="transformer_blocks.0.attn.*full raster"):
        denoise_flux(model, ids)
    with installed(model, ExactJoint(on_mismatch="stock")), pytest.warns(UserWarning, match="full raster"):
        assert torch.equal(denoise_flux(model, ids), want)


def test_masks_that_hide_whole_keys_are_honoured(flux):
    model, ids = flux.transformer, image_ids(4, 5)
    mask = torch.ones(1, 1, 1, 7 + 20, dtype=torch.bool)
    mask[..., 4:7] = False
    extra = {"joint_attention_kwargs": {"attention_mask": mask}}
    want = denoise_flux(model, ids, **extra)
    assert not torch.allclose(want, denoise_flux(model, ids))  # the mask does reach the layers
    with installed(model, ExactJoint()):
        got = denoise_flux(model, ids, **extra)
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_pipelines_equal_stock_at_several_sizes(name, request):
    pipe = request.getfixturevalue(name)
    sizes = [{"height": 32, "width": 48}, {"height": 32, "width": 32}, {"height": 32, "width": 48}]
    want = [tiny.run(pipe, **size) for size in sizes]
    with installed(pipe, ExactJoint()) as handle:
        got = [tiny.run(pipe, **size) for size in sizes]
    assert len(handle.report().layers) == {"flux": 2, "sd3": 3}[name]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=10 * EXACT, rtol=0)
    assert torch.equal(tiny.run(pipe, **sizes[0]), want[0])


def test_sd3_has_text_after_the_picture(sd3):
    with installed(sd3, Looking()):
        tiny.run(sd3, height=32, width=48)
        layouts = next(iter(sd3.transformer._forward_pre_hooks.values())).slots["layouts"]
    assert layouts["transformer_blocks.0.attn2"].global_tokens == 0
    joint = layouts["transformer_blocks.1.attn"]
    assert joint.shape == (16, 24) and joint.before == 0 and joint.after > 77


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flux_finds_its_step_also_in_half_precision(flux, dtype):
    pipe = copy.deepcopy(flux).to(dtype)  # the fixture shares its encoders with other tests

    @dataclass(frozen=True, kw_only=True)
    class Steps(Recording):
        roles: ClassVar[tuple[str, ...]] = ("joint",)

    with installed(pipe, Steps()):
        tiny.run(pipe, num_inference_steps=6, height=32, width=48)
        seen = next(iter(pipe.transformer._forward_pre_hooks.values())).slots["seen"]
    assert [step for _, step in seen] == list(range(6))


def test_phases_switch_in_a_flux_pipeline(flux):
    @dataclass(frozen=True, kw_only=True)
    class Both(Halves):
        roles: ClassVar[tuple[str, ...]] = ("joint",)

    want = tiny.run(flux)
    with installed(flux, Both()):
        assert not torch.equal(tiny.run(flux), want)


def test_agent_attention_is_not_for_joint_layers(flux):
    with pytest.raises(ValueError, match="no layer for 'agent'.*joint"):
        install(flux, AgentAttnProcessor())


def test_agents_may_merge_tokens_where_sd3_looks_at_the_picture_alone(sd3):
    want = tiny.run(sd3)
    with installed(sd3, AgentAttnProcessor(ratio=0.4)) as handle:
        assert [layer.name for layer in handle.report().layers] == ["transformer_blocks.0.attn2"]
        assert not torch.equal(tiny.run(sd3), want)
    assert torch.equal(tiny.run(sd3), want)


def test_pixart_equals_stock_on_any_grid():
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=16, patch_size=2, caption_channels=16, use_additional_conditions=False,
    ).eval()  # fmt: skip

    def call() -> Tensor:
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return model(
                torch.randn(2, 4, 12, 20, generator=draw),
                encoder_hidden_states=torch.randn(2, 5, 16, generator=draw),
                timestep=torch.tensor([500, 500]),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample

    want = call()
    with installed(model, Looking()) as handle:
        got = call()
        layouts = next(iter(model._forward_pre_hooks.values())).slots["layouts"]
    assert len(handle.report().layers) == 2
    assert {layout.shape for layout in layouts.values()} == {(6, 10)}
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_full_size_models_show_all_their_layers():
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
        medium = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, caption_projection_dim=1536, out_channels=16, pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        )  # fmt: skip
    layers = install(flux, ExactJoint()).report().layers
    assert len(layers) == 19 + 38 and {(layer.heads, layer.width) for layer in layers} == {(24, 3072)}
    layers = install(medium, ExactJoint()).report().layers
    assert [layer.role for layer in layers].count("joint") == 24
    assert [layer.role for layer in layers].count("spatial") == 13


def test_processors_we_cannot_imitate_are_refused_by_name(flux):
    flux.transformer.transformer_blocks[0].attn.processor = torch.nn.Identity()
    with pytest.raises(ValueError, match="transformer_blocks.0.attn.*Identity"):
        install(flux, ExactJoint())
