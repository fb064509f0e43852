"""Beside everything else people do to a pipeline: each once, on tiny pipelines."""

from __future__ import annotations

from typing import Any

import accelerate.hooks
import pytest
import tiny
import torch
from peft import LoraConfig
from small_methods import Exact, Halves, RowMeans, Sharper

from reattend.attn_processors import Displaced, install, installed, pluggable

CLOSE = 1e-5  # fp32, two steps of a pipeline


def close(got: torch.Tensor, want: torch.Tensor, atol: float = CLOSE) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def add_lora(unet: Any) -> None:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"))
    torch.manual_seed(0)
    for name, weight in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)


@pytest.mark.parametrize("order", ["lora first", "lora last"])
def test_lora_acts_inside_our_layers(unet, order):
    plain = tiny.denoise(unet)
    if order == "lora first":
        add_lora(unet)
    handle = install(unet, Exact())
    if order == "lora last":
        add_lora(unet)
    got = tiny.denoise(unet)
    handle.remove()
    want = tiny.denoise(unet)
    close(got, want)
    assert (want - plain).abs().max() > 1e-2


def test_controlnet_beside_and_inside(sd_controlnet):
    pipe = sd_controlnet
    want = tiny.run(pipe)
    with installed(pipe, Exact()) as handle:
        assert {layer.model for layer in handle.report().layers} == {"UNet2DConditionModel"}
        close(tiny.run(pipe), want)
        with installed(pipe.controlnet, Exact()) as second:
            assert len(second.report().layers) == 3
            close(tiny.run(pipe), want)
        with installed(pipe.controlnet, Sharper()):
            assert (tiny.run(pipe) - want).abs().max() > 1e-3
    assert torch.equal(tiny.run(pipe), want)


def ip_adapter(pipe: Any, width: int = 32) -> None:
    """Load random IP-Adapter weights as the loader takes them from a file."""
    torch.manual_seed(0)
    tokens, text = 4, pipe.unet.config.cross_attention_dim
    weights: dict[str, torch.Tensor] = {}
    for index, name in enumerate(pipe.unet.attn_processors):
        if name.endswith("attn2.processor"):
            module = pipe.unet.get_submodule(name.removesuffix(".processor"))
            weights[f"{index}.to_k_ip.weight"] = torch.randn(module.inner_dim, text) * 0.3
            weights[f"{index}.to_v_ip.weight"] = torch.randn(module.inner_dim, text) * 0.3
    projection = {
        "proj.weight": torch.randn(tokens * text, width) * 0.3,
        "proj.bias": torch.zeros(tokens * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    pipe.unet._load_ip_adapter_weights([{"ip_adapter": weights, "image_proj": projection}], low_cpu_mem_usage=False)


def run_with_image(pipe: Any) -> torch.Tensor:
    embeds = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    return tiny.run(pipe, ip_adapter_image_embeds=[embeds])


@pytest.mark.parametrize("plugged", [False, True], ids=["install", "pluggable"])
def test_ip_adapter_before_and_after(sd, plugged):
    plain = tiny.run(sd)
    if plugged:
        pluggable(sd)
    after = install(sd, Sharper())
    ip_adapter(sd)  # makes diffusers call our class without arguments
    got = run_with_image(sd)
    after.verify()
    after.remove()
    want = run_with_image(sd)
    assert (want - got).abs().max() > 1e-3
    with installed(sd, Sharper()) as before:
        assert torch.equal(run_with_image(sd), got)
        sd.unload_ip_adapter()
        before.verify()
    assert torch.equal(tiny.run(sd), plain)


def test_offload_hooks_of_accelerate(sd):
    want = tiny.run(sd)
    handle = install(sd, Exact())
    accelerate.hooks.add_hook_to_module(sd.unet, accelerate.hooks.AlignDevicesHook("cpu", offload=True))
    close(tiny.run(sd), want)
    handle.remove()
    assert torch.equal(tiny.run(sd), want)


def test_group_offload(sd):
    want = tiny.run(sd)
    handle = install(sd, Exact())
    sd.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    close(tiny.run(sd), want)
    handle.remove()
    assert torch.equal(tiny.run(sd), want)


def test_a_step_cache_skips_our_layers_and_breaks_nothing(sd):
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks import apply_pyramid_attention_broadcast

    assert not hasattr(sd.unet, "enable_cache")  # diffusers has that for transformers; the hook itself takes UNets
    calls = []

    class Counted(Exact):
        def attend(self, call, phase):
            calls.append(call.name)
            return super().attend(call, phase)

    install(sd, Counted())
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("attentions",),
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(sd.unet, config)
    assert tiny.run(sd, num_inference_steps=4).isfinite().all()
    assert 0 < len(calls) < 4 * 7


@pytest.mark.parametrize("guidance", [1.0, 7.5], ids=["off", "on"])
def test_guidance_on_and_off(sd, guidance):
    want = tiny.run(sd, guidance_scale=guidance, height=24, width=40)
    with installed(sd, Exact()):
        close(tiny.run(sd, guidance_scale=guidance, height=24, width=40), want, 1e-4)


def test_rows_do_not_influence_each_other(unet):
    install(unet, RowMeans())
    sample, text = torch.randn(2, 4, 8, 12), torch.randn(2, 77, 32)
    with torch.no_grad():
        both = unet(sample, 5, text).sample
        close(both[:1], unet(sample[:1], 5, text[:1]).sample)


def test_callback_and_interruption(sd):
    install(sd, Halves())
    seen = []

    def stop(pipe: Any, step: int, t: Any, tensors: dict) -> dict:
        seen.append(step)
        pipe._interrupt = step == 1
        return tensors

    tiny.run(sd, num_inference_steps=4, callback_on_step_end=stop)
    assert seen == [0, 1]
    full = tiny.run(sd, num_inference_steps=4)
    assert torch.equal(tiny.run(sd, num_inference_steps=4), full)  # the stopped run left nothing behind


def test_an_exception_in_a_layer_leaves_the_pipeline_usable(sd):
    class Fails(Exact):
        def attend(self, call, phase):
            raise ZeroDivisionError

    want = tiny.run(sd)
    handle = install(sd, Fails())
    with pytest.raises(ZeroDivisionError):
        tiny.run(sd)
    handle.remove()
    assert torch.equal(tiny.run(sd), want)


class Counting:
    """A compiler back end that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counting() -> Any:
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


@pytest.fixture
def shallow() -> Any:
    """A UNet of one level, four blocks: compiling costs less."""
    return tiny.unet(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    )


@pytest.mark.parametrize(("method", "graphs"), [(Exact(), 1), (Halves(), 2)], ids=["one phase", "two phases"])
def test_regional_compile_gives_one_graph_per_phase(shallow, counting, method, graphs):
    times = (900, 600, 400, 100)
    handle = install(shallow, method)
    want = [tiny.denoise(shallow, t=t) for t in times]
    shallow.compile_repeated_blocks(fullgraph=True, backend=counting)
    for _ in range(2):
        for t, picture in zip(times, want, strict=True):
            close(tiny.denoise(shallow, t=t), picture)
    assert counting.graphs == graphs  # the four blocks share them
    handle.verify()


def test_whole_model_compile_without_phases_is_one_graph(shallow, counting):
    install(shallow, Exact())
    want = [tiny.denoise(shallow, t=t) for t in (500, 400)]
    shallow.compile(fullgraph=True, backend=counting)
    for t, picture in zip((500, 400), want, strict=True):
        close(tiny.denoise(shallow, t=t), picture)
    assert counting.graphs == 1


def test_gradient_checkpointing_recomputes_the_same(unet):
    def gradients(checkpoint: bool) -> dict[str, torch.Tensor]:
        unet.train()
        unet.zero_grad()
        (unet.enable_gradient_checkpointing if checkpoint else unet.disable_gradient_checkpointing)()
        draw = torch.Generator().manual_seed(0)
        sample, text = torch.randn(2, 4, 6, 10, generator=draw), torch.randn(2, 77, 32, generator=draw)
        unet(sample, torch.tensor(10), text).sample.square().mean().backward()
        return {name: weight.grad.clone() for name, weight in unet.named_parameters() if weight.grad is not None}

    install(unet, RowMeans())
    want, got = gradients(False), gradients(True)
    assert got.keys() == want.keys() and any("attn1.to_v" in name for name in got)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-6, rtol=1e-4, msg=lambda text, name=name: name + text)


def test_perturbed_attention_guidance_takes_its_layers_for_the_call(sd):
    from diffusers import StableDiffusionPAGPipeline

    pipe = tiny.quiet(
        StableDiffusionPAGPipeline(**sd.components, requires_safety_checker=False, pag_applied_layers="mid")
    )
    handle = install(pipe, Sharper())
    assert tiny.run(pipe, pag_scale=3.0).isfinite().all()
    handle.verify()


def test_fusing_projections_afterwards_is_noticed_and_unfusing_brings_ours_back(unet):
    handle = install(unet, Sharper())
    want = tiny.denoise(unet)
    unet.fuse_qkv_projections()
    with pytest.raises(Displaced, match="FusedAttnProcessor2_0"):
        handle.verify()
    unet.unfuse_qkv_projections()
    handle.verify()
    assert torch.equal(tiny.denoise(unet), want)


def test_ours_coming_back_after_removal_are_the_stock_layer_and_no_obstacle(unet):
    want = tiny.denoise(unet)
    handle = install(unet, Sharper())
    unet.fuse_qkv_projections()
    handle.remove()
    unet.unfuse_qkv_projections()  # diffusers kept our objects and sets them again
    assert torch.equal(tiny.denoise(unet), want)
    with installed(unet, Sharper()):
        assert not torch.equal(tiny.denoise(unet), want)
    assert torch.equal(tiny.denoise(unet), want)
