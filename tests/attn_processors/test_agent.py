"""Agent attention in a stock UNet: settings, schedule, random destinations, removal."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F

from reattend.attn_processors import AgentAttnProcessor, install, installed
from reattend.attn_processors.agent import PRESETS, Phase, count_tokens, draw
from reattend.attn_processors.ops.agent import agent_attention_reference
from reattend.attn_processors.ops.merge import match_reference, merge_matrix, split_tokens

AGENTS_AT_16 = Phase(sy=4, sx=4, ratio=0.4, agent_ratio=0.95)
CFG_BATCH = 1e-4  # another batch size is another order of sums in the convolutions, grown over two steps


class Call:
    """What `attend` needs of a LayerCall, in double precision."""

    def __init__(self, grid, batch=1, heads=2, width=8, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        channels = heads * width
        self.grid, self.name, self.heads, self.scale = grid, "layer", heads, width**-0.5
        self.x = torch.randn(batch, grid[0] * grid[1], channels, generator=generator, dtype=torch.float64).to(dtype)
        self.weights = [
            torch.randn(channels, channels, generator=generator, dtype=torch.float64).to(dtype) * channels**-0.5
            for _ in range(3)
        ]
        self.context = SimpleNamespace(slots={})
        self.unmerge = None
        self.seen: list[torch.dtype] = []

    def to_q(self, x):
        return (x @ self.weights[0]).unflatten(-1, (self.heads, -1))

    def to_k(self, x):
        return (x @ self.weights[1]).unflatten(-1, (self.heads, -1))

    def to_v(self, x):
        return (x @ self.weights[2]).unflatten(-1, (self.heads, -1))

    q = property(lambda self: self.to_q(self.x))
    k = property(lambda self: self.to_k(self.x))
    v = property(lambda self: self.to_v(self.x))

    def softmax(self, q, k, v, scale=None):
        self.seen.append(q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale if scale is None else scale).transpose(1, 2)


def attend_reference(call: Call, phase: Phase) -> torch.Tensor:
    """Section by section as the method is described, with one-hot matrices; (B, N, C) after unmerging."""
    tokens = call.x.shape[1]
    matching = match_reference(call.x, *split_tokens(call.grid, (phase.sy, phase.sx)))
    sources = matching.source.shape[0]
    features = merge_matrix(matching, min(sources, int(phase.ratio * tokens)))
    x = (features / features.sum(-1, keepdim=True)) @ call.x
    q, k, v = call.to_q(x), call.to_k(x), call.to_v(x)
    agents = merge_matrix(matching, min(sources, int(phase.agent_ratio * tokens)))
    agents = call.to_q((agents / agents.sum(-1, keepdim=True)) @ call.x)
    if phase.agent_ratio and 2 * agents.shape[1] < x.shape[1]:
        out = agent_attention_reference(q, k, v, agents, p=phase.p, c=phase.c, scale=call.scale)
    else:
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * call.scale
        out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)
    return features.transpose(1, 2) @ out.flatten(2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grid", [(8, 8), (5, 9), (12, 7), (1, 16), (3, 3)], ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize(
    "phase",
    [
        AGENTS_AT_16,
        Phase(sy=2, sx=2, ratio=0.4),
        Phase(sy=2, sx=2, ratio=0.0, agent_ratio=0.7),
        Phase(sy=2, sx=3, ratio=0.2, agent_ratio=0.75, p=1.0, c=0.0),
        Phase(ratio=0.0, agent_ratio=0.0),
    ],
    ids=["agents and merging", "merging", "agents", "plain two-softmax", "neither"],
)
def test_a_layer_equals_its_reference_in_values_and_gradients(phase, grid, batch):
    call = Call(grid, batch)
    inputs = [call.x.requires_grad_(), *(weight.requires_grad_() for weight in call.weights)]
    got = AgentAttnProcessor(phases=(phase,)).attend(call, 0)
    got = call.unmerge(got) if call.unmerge else got
    want = attend_reference(call, phase)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    weight = Call(grid, batch).x.flip(1)
    gradients = torch.autograd.grad((got * weight).sum(), inputs)
    for fast, slow in zip(gradients, torch.autograd.grad((want * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-11, rtol=0)


def test_agents_are_used_only_where_they_save_work():
    assert count_tokens(AGENTS_AT_16, (64, 64)) == (1638, 256)
    assert count_tokens(AGENTS_AT_16, (16, 16)) == (102, 16)
    assert count_tokens(Phase(sy=2, sx=2, ratio=0.4, agent_ratio=0.95), (64, 64)) == (1638, 1024)  # 2048 < 2458
    assert count_tokens(Phase(sy=2, sx=2, ratio=0.6, agent_ratio=0.95), (64, 64)) == (2457, 0)  # 2048 >= 1639
    assert count_tokens(Phase(sy=1, sx=1, ratio=0.4, agent_ratio=0.95), (64, 64)) == (0, 0)  # nobody to merge
    assert count_tokens(Phase(ratio=0.29, agent_ratio=0), (10, 10))[0] == 29  # 0.29 * 100 is 28.999...


def test_logits_can_be_made_in_single_precision():
    call = Call((8, 8), dtype=torch.bfloat16)
    out = AgentAttnProcessor(phases=(AGENTS_AT_16,), fp32_logits=True).attend(call, 0)
    assert call.seen == [torch.float32, torch.float32]
    assert out.dtype == torch.bfloat16


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_default_is_the_published_schedule():
    first, second = AgentAttnProcessor(preset="paper").schedule
    assert dataclasses.astuple(first) == (0.4, 4, 4, 0.4, 0.95, 0.3, 0.075)
    assert (second.until, second.sy, second.sx, second.ratio, second.agent_ratio) == (1.0, 2, 2, 0.4, 0.0)


def test_a_flat_setting_replaces_that_number_in_every_phase():
    schedule = AgentAttnProcessor(ratio=0.25, c=0.0).schedule
    assert [(phase.ratio, phase.c) for phase in schedule] == [(0.25, 0.0)] * 2
    assert [phase.agent_ratio for phase in schedule] == [phase.agent_ratio for phase in PRESETS["paper"]]


@pytest.mark.parametrize(
    "method",
    [
        AgentAttnProcessor(),
        AgentAttnProcessor(ratio=0.3, levels=2, destinations="random", seed=5, fp32_logits=True),
        AgentAttnProcessor(phases=(Phase(until=0.5, ratio=0.1), Phase(ratio=0.6, agent_ratio=0.9))),
    ],
    ids=["default", "flat", "phases"],
)
def test_settings_survive_json(method):
    again = AgentAttnProcessor.from_settings(json.loads(json.dumps(method.settings())))
    assert again == method
    assert again.schedule == method.schedule


def test_settings_are_read_from_command_line_words():
    words = {"ratio": "0.4", "levels": "2", "preset": "paper", "fp32_logits": "true", "destinations": "random"}
    want = AgentAttnProcessor(ratio=0.4, levels=2, preset="paper", fp32_logits=True, destinations="random")
    assert AgentAttnProcessor.from_settings(words) == want
    phases = AgentAttnProcessor.from_settings({"phases": '[{"until": 0.5, "sy": 4}, {"ratio": 0.2}]'}).phases
    assert phases == (Phase(until=0.5, sy=4), Phase(ratio=0.2))


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"ratio": 1.0}, ValueError, r"ratio must be in \[0, 1\), got 1.0"),
        ({"ratio": -0.1}, ValueError, r"ratio must be in \[0, 1\), got -0.1"),
        ({"agent_ratio": float("nan")}, ValueError, r"agent_ratio must be in \[0, 1\), got nan"),
        ({"c": -1}, ValueError, "c must be a finite number >= 0"),
        ({"p": float("inf")}, ValueError, "p must be a finite number >= 0"),
        ({"levels": 0}, ValueError, "levels must be at least 1, got 0"),
        ({"preset": "papr"}, ValueError, "preset.*'paper'.*'papr'"),
        ({"destinations": "some"}, ValueError, "'fixed', 'random'.*'some'"),
        ({"ratio": "much"}, TypeError, "ratio.*float.*'much'"),
        ({"ration": 0.4}, ValueError, "no setting 'ration'.*ratio"),
        ({"phases": ()}, ValueError, "phases must have growing ends"),
        ({"phases": [{"until": 0.4}]}, ValueError, "the last at 1.0"),
        ({"phases": [{"until": 0.6}, {"until": 0.4}, {}]}, ValueError, "growing ends"),
        ({"phases": [{"ratio": 2.0}]}, ValueError, r"ratio must be in \[0, 1\), got 2.0"),
        ({"phases": [{"sx": 0}]}, ValueError, "sx must be at least 1"),
        ({"phases": [{"until": 20}]}, ValueError, "fraction of the steps"),
        ({"phases": [{"sx": 1.5}]}, TypeError, "phases"),
    ],
    ids=str,
)
def test_bad_settings_get_one_clear_sentence(settings, error, says):
    with pytest.raises(error, match=says) as caught:
        AgentAttnProcessor.from_settings(settings)
    assert "\n" not in str(caught.value)


def test_a_phase_checks_its_types():
    with pytest.raises(TypeError, match="ratio wants float"):
        Phase(ratio=None)
    assert Phase(ratio="0.5") == Phase(ratio=0.5)


# -- schedule ---------------------------------------------------------------------------------------------------------


def phases_run(pipe, **call) -> list[int]:
    """The phase of a layer at every call of the UNet."""
    layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor
    seen: list[int] = []
    hook = pipe.unet.register_forward_hook(lambda *_: seen.append(layer.phase))
    tiny.run(pipe, **call)
    hook.remove()
    return seen


def test_the_schedule_switches_exactly_at_step_20_of_50(sd):
    with installed(sd, AgentAttnProcessor()):
        assert phases_run(sd, num_inference_steps=50, height=8, width=8, guidance_scale=1.0) == [0] * 20 + [1] * 30


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 15, 30, 45])
def test_the_first_phase_covers_the_steps_before_its_end(steps):
    method = AgentAttnProcessor()
    phases = [method.phase(step / steps) for step in range(steps)]
    assert phases == [0 if 10 * step < 4 * steps else 1 for step in range(steps)]


def test_image_to_image_starts_where_its_noise_is(sd):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = tiny.quiet(StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False))
    with installed(pipe, AgentAttnProcessor()):
        image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        seen: list[int] = []
        layer = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor
        hook = pipe.unet.register_forward_hook(lambda *_: seen.append(layer.phase))
        for strength in (0.8, 0.5):
            pipe("a car", image=image, strength=strength, num_inference_steps=20, output_type="latent")
        hook.remove()
    assert seen == [0] * 4 + [1] * 12 + [1] * 10  # steps 4 to 19, then 10 to 19, of 20; the switch is at 8


# -- in a pipeline ----------------------------------------------------------------------------------------------------


def test_only_the_highest_levels_are_taken(sd):
    for levels, layers in ((1, 3), (2, 7)):
        handle = install(sd, AgentAttnProcessor(levels=levels))
        assert len(handle.report().layers) == layers
        handle.remove()


@pytest.mark.parametrize(
    "settings",
    [{"ratio": 0, "agent_ratio": 0}, {"ratio": 0, "agent_ratio": 0, "c": 0, "p": 1, "levels": 2}],
    ids=["ratios", "all"],
)
def test_neutral_settings_are_stock_bit_for_bit(sd, settings):
    want = tiny.run(sd)
    with installed(sd, "agent", **settings):
        assert torch.equal(tiny.run(sd), want)


def test_a_neutral_phase_beside_an_active_one_is_stock_bit_for_bit(sd):
    want = tiny.run(sd)
    phases = (Phase(until=0.99, ratio=0.0, agent_ratio=0.0), Phase(ratio=0.5))
    with installed(sd, AgentAttnProcessor(phases=phases, levels=2)):
        assert torch.equal(tiny.run(sd), want)


def test_removal_brings_stock_back_bit_for_bit(sd):
    want = tiny.run(sd)
    handle = install(sd, AgentAttnProcessor(levels=2))
    changed = tiny.run(sd)
    handle.remove()
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, want)
    assert torch.equal(tiny.run(sd), want)


@pytest.mark.parametrize("kind", ["sdxl", "sd_controlnet", "animatediff"])
def test_it_works_in_every_unet_pipeline_and_leaves_no_trace(kind, request):
    pipe = request.getfixturevalue(kind)
    want = tiny.run(pipe)
    with installed(pipe, AgentAttnProcessor(levels=2, destinations="random")):
        changed = tiny.run(pipe)
    assert changed.shape == want.shape
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, want)
    assert torch.equal(tiny.run(pipe), want)


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_sixteen_bit_models_stay_in_sixteen_bits(sd, fp32_logits):
    unet = sd.unet.to(torch.bfloat16)
    noise = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    text = torch.randn(2, 5, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    with installed(unet, AgentAttnProcessor(fp32_logits=fp32_logits)), torch.no_grad():
        for timestep in (900, 100):
            out = unet(noise, timestep, text).sample
            assert out.dtype == torch.bfloat16
            assert torch.isfinite(out).all()


@pytest.mark.parametrize("size", [(30, 22), (18, 46), (2, 34)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("guidance", [1.0, 7.5], ids=["no guidance", "guidance"])
def test_odd_and_non_square_pictures_run(sd, size, guidance):
    # latents of 15 x 11 and so on: neither a multiple of the cells nor of the UNet's halvings
    latents = torch.randn(3, 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(0))
    with installed(sd, AgentAttnProcessor(levels=2, destinations="random")), torch.no_grad():
        out = sd(
            ["a"] * 3, latents=latents, height=16, width=16, guidance_scale=guidance, num_inference_steps=3,
            output_type="latent",
        ).images  # fmt: skip
    assert out.shape == latents.shape
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("destinations", ["fixed", "random"])
def test_same_seed_same_output_whatever_the_global_random_state(sd, destinations):
    with installed(sd, AgentAttnProcessor(destinations=destinations)):
        torch.manual_seed(1)
        first = tiny.run(sd)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        second = tiny.run(sd)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)


def test_random_destinations_depend_on_seed_step_and_layer(sd):
    def destinations(seed: int) -> list[torch.Tensor]:
        seen = []
        with installed(sd, AgentAttnProcessor(destinations="random", seed=seed)):
            context = sd.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor.context
            hook = sd.unet.register_forward_hook(lambda *_: seen.extend(context.slots.values()))
            out = tiny.run(sd)
            hook.remove()
        return [out, *seen]

    (out, *picks), (again, *same), (other, *different) = destinations(0), destinations(0), destinations(1)
    assert len(picks) == 2 * 3  # steps and layers
    assert all(torch.equal(a, b) for a, b in zip(picks, same, strict=True))
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    everything = [tuple(draw.tolist()) for draw in picks + different]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("destinations", ["fixed", "random"])
def test_a_picture_does_not_depend_on_the_batch_it_is_made_in(sd, destinations):
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with installed(sd, AgentAttnProcessor(destinations=destinations)), torch.no_grad():

        def make(which, guidance):
            prompts = [["a car", "a dog", "a cat"][i] for i in which]
            return sd(
                prompts, latents=latents[which], guidance_scale=guidance, num_inference_steps=2, height=32, width=32,
                output_type="latent",
            ).images  # fmt: skip

        for guidance in (1.0, 7.5):
            together = make([0, 1, 2], guidance)
            turned = make([2, 0, 1], guidance)
            torch.testing.assert_close(turned, together[[2, 0, 1]], atol=CFG_BATCH, rtol=0)
            torch.testing.assert_close(make([1], guidance), together[1:2], atol=CFG_BATCH, rtol=0)


def test_gradients_reach_the_weights_and_checkpointing_does_not_change_them(sd):
    unet = sd.unet
    noise = torch.randn(1, 4, 10, 14, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 5, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    weight = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight

    def gradient() -> torch.Tensor:
        (grad,) = torch.autograd.grad(unet(noise, 900, text).sample.square().sum(), weight)
        return grad

    with installed(sd, AgentAttnProcessor(destinations="random")):
        plain = gradient()
        unet.train().enable_gradient_checkpointing()
        again = gradient()
    assert plain.abs().max() > 0
    torch.testing.assert_close(plain, again)


def test_one_graph_per_phase_with_random_destinations(sd):
    from torch._dynamo.testing import CompileCounter

    sd.unet.eval()
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 5, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    layer = sd.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    torch.compiler.reset()
    counter = CompileCounter()
    with installed(sd, AgentAttnProcessor(destinations="random")), torch.no_grad():
        want = [sd.unet(noise, t, text).sample for t in (999, 900, 100, 50)]
        layer.compile(backend=counter, fullgraph=True)
        got = [sd.unet(noise, t, text).sample for t in (999, 900, 100, 50)]
    assert counter.frame_count == 2
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_draws_are_the_same_on_every_machine():
    assert draw("0, step 0, layer", 3).tolist() == [1839822582, 1413571849, 1320758190]
