"""Linear forms: each equals the form with its N x N weights written out, and runs in every kind of layer."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from tiny import denoise_flux, image_ids

from reattend.attn_processors import (
    ATTN_PROCESSORS,
    AgentJointAttnProcessor,
    ClearAttnProcessor,
    InLineAttnProcessor,
    LayerInfo,
    NeighborhoodAttnProcessor,
    install,
    installed,
)
from reattend.attn_processors.agent_joint import pool_queries
from reattend.attn_processors.layer import EXTRA
from reattend.attn_processors.linear_forms import LinearForm
from reattend.attn_processors.ops.linear import (
    depthwise,
    flow_attention,
    flow_reference,
    inline_attention,
    inline_reference,
    kernel_attention,
    kernel_reference,
)

FORMS = {
    "linear": (kernel_attention, kernel_reference),
    "inline": (partial(inline_attention, scale=0.4), partial(inline_reference, scale=0.4)),
    "flow": (flow_attention, flow_reference),
}
TRAINED = ["linear", "inline", "flow", "agent-joint", "routed"]
SETTINGS = {
    "neighborhood": {"radius": 2},
    "mixture-of-heads": {"radius": 2, "active": 0.5},
    "routed": {"tile": (2, 3), "topk": 2},
}
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 2e-2,
}  # fp64: sums of 100 terms, eps in quotients
EXACT = 1e-5  # same operations in another order, fp32, through a few blocks


def qkv(batch=2, tokens=35, heads=3, width=6, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, width, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 35, 128])
@pytest.mark.parametrize("name", FORMS)
def test_the_fast_form_is_the_explicit_one(name, tokens, dtype):
    fast, reference = FORMS[name]
    q, k, v = qkv(tokens=tokens, dtype=dtype)
    torch.testing.assert_close(fast(q, k, v), reference(q, k, v), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert fast(q, k, v).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_autocast_does_not_take_the_sums_back_to_16_bits(name, dtype):
    fast, _ = FORMS[name]
    q, k, v = qkv(tokens=128, dtype=dtype)
    want = fast(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(q, k, v), want)


@pytest.mark.parametrize("name", FORMS)
def test_gradients_are_those_of_the_explicit_form(name):
    fast, reference = FORMS[name]
    gradients = []
    for form in (fast, reference):
        inputs = [x.requires_grad_() for x in qkv(tokens=12)]
        form(*inputs).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-6)
    small = [x.requires_grad_() for x in qkv(batch=1, tokens=5, heads=1, width=3)]
    assert torch.autograd.gradcheck(fast, small, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "inline"])
def test_weights_sum_to_one(name):
    q, k, v = qkv()
    ones = torch.ones_like(v)
    torch.testing.assert_close(FORMS[name][0](q, k, ones), ones, atol=1e-6, rtol=0)  # eps in the kernel's quotient


@pytest.mark.parametrize("name", FORMS)
def test_the_order_of_the_tokens_does_not_matter(name):
    q, k, v = qkv()
    order = torch.randperm(35, generator=torch.Generator().manual_seed(1))
    got = FORMS[name][0](q[:, order], k[:, order], v[:, order])
    torch.testing.assert_close(got, FORMS[name][0](q, k, v)[:, order], atol=1e-12, rtol=1e-12)


def test_the_kernel_form_has_no_negative_weights():
    q, k, v = qkv()
    assert kernel_attention(q, k, v.abs()).min() >= 0


def test_the_convolution_stays_in_its_channel_and_knows_the_grid():
    v = torch.zeros(1, 15, 2, 3)
    v[0, 7, 1, 2] = 1  # row 1, column 2 of 3 x 5
    kernels = torch.arange(2 * 3 * 9.0).view(1, 2, 3, 3, 3)
    out = depthwise(v, (3, 5), kernels).view(3, 5, 2, 3)
    assert torch.equal(out[0:3, 1:4, 1, 2], kernels[0, 1, 2].flip(0, 1))
    assert out[..., 0, :].abs().max() == 0 and out[..., 1, :2].abs().max() == 0


@pytest.mark.parametrize("pipe", ["flux", "sd3", "sd"])
@pytest.mark.parametrize("name", [*TRAINED, "neighborhood", "mixture-of-heads"])
def test_every_form_runs_in_every_kind_of_layer_and_leaves_without_a_trace(name, pipe, request):
    pipe = request.getfixturevalue(pipe)
    want = tiny.run(pipe, height=32, width=48)
    with installed(pipe, name, **SETTINGS.get(name, {})):
        got = tiny.run(pipe, height=32, width=48)
    assert got.isfinite().all() and not torch.allclose(got, want, atol=1e-4)
    assert torch.equal(tiny.run(pipe, height=32, width=48), want)


def test_neighborhood_is_clear_in_squares(flux):
    with installed(flux, NeighborhoodAttnProcessor(radius=3)):
        got = tiny.run(flux, height=32, width=48)
    with installed(flux, ClearAttnProcessor(radius=3, pattern="square")):
        assert torch.equal(tiny.run(flux, height=32, width=48), got)


@pytest.mark.parametrize("name", [*TRAINED, "mixture-of-heads"])
def test_new_parameters_change_nothing_before_they_are_trained(name, flux):
    model, ids = flux.transformer, image_ids(4, 6)
    handle = install(model, name, **SETTINGS.get(name, {}))
    want = denoise_flux(model, ids, batch=2)
    ((_, item),) = handle.parts
    added = []
    for swap in item.swaps:
        for key, value in item.method.new_parameters(swap.info).items():
            swap.module.register_parameter(EXTRA + key, torch.nn.Parameter(value))
            added.append(swap.module.get_parameter(EXTRA + key))
    assert added
    torch.testing.assert_close(denoise_flux(model, ids, batch=2), want, atol=EXACT, rtol=0)
    for parameter in added:
        parameter.data.add_(0.5)
    assert not torch.allclose(denoise_flux(model, ids, batch=2), want, atol=1e-4)


def test_a_gate_wide_open_or_shut_is_picture_or_text_alone(flux):
    model, ids = flux.transformer, image_ids(3, 5)

    class Zero(LinearForm):
        name = "zero"

        def mix(self, call, q, k, v):
            return torch.zeros_like(v)

    handle = install(model, Zero())
    ((_, item),) = handle.parts
    for bias, same in ((30.0, False), (-30.0, True)):
        for swap in item.swaps:
            width = swap.info.width // swap.info.heads
            swap.module.reattend_gate = torch.nn.Parameter(torch.full((swap.info.heads,), bias))
            swap.module.reattend_gate_weight = torch.nn.Parameter(torch.zeros(swap.info.heads, width))
        out = denoise_flux(model, ids)
        handle.remove()
        with installed(model, TextOnly()):
            want = denoise_flux(model, ids)
        handle = install(model, Zero())
        ((_, item),) = handle.parts
        assert torch.allclose(out, want, atol=EXACT) == same


class TextOnly(LinearForm):
    """Grid tokens see the text only, by one masked softmax."""

    name = "text-only"

    def attend(self, call, phase):
        layout = call.layout
        mask = torch.ones(1, 1, layout.tokens, layout.tokens, dtype=torch.bool)
        mask[..., layout.grid, layout.grid] = False
        return call.softmax(call.q, call.k, call.v, mask=mask).flatten(2)


def test_padded_text_is_not_seen(sd3):
    """A masked text token may hold anything, in layers that are given a mask."""
    from reattend.attn_processors.families.joint import JointLayer
    from reattend.attn_processors.ops.layout import TokenLayout

    class Call:
        def __init__(self, seed):
            draw = torch.Generator().manual_seed(0)
            self.layout, self.grid, self.scale = TokenLayout(3, 4, after=5), (3, 4), 0.5
            self.q, self.k, self.v = torch.randn(3, 2, 17, 2, 4, generator=draw).unbind(0)
            noise = torch.randn(3, 2, 17, 2, 4, generator=torch.Generator().manual_seed(seed))
            self.k[:, 15:], self.v[:, 15:] = noise[0, :, 15:], noise[1, :, 15:]
            self.mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
            self.mask[..., 15:] = False
            self.unrotated_q = self.q
            self.softmax = lambda q, k, v, scale=0.5, mask=None: torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=scale
            ).transpose(1, 2)
            self.rotated = lambda x, places: x
            self.extra = lambda name: None

    assert JointLayer.text_first  # the stand-in has text after the picture, as SD3
    for name in TRAINED:
        method = ATTN_PROCESSORS[name]()
        a, b = (method.attend(Call(seed), 0)[:, :15] for seed in (1, 2))
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_an_agent_for_every_token_reads_what_the_tokens_would(flux):
    """With a cell per token agents are the queries, so the gathered values are stock attention's output."""
    model, ids = flux.transformer, image_ids(4, 6)
    seen = {}

    class Spy(AgentJointAttnProcessor):
        def attend(self, call, phase):
            agents, centres = pool_queries(call.unrotated_q[:, call.layout.grid], call.grid, self.agents)
            rotated = call.rotated(agents, centres + call.layout.before)
            seen[call.name] = (rotated, call.q[:, call.layout.grid], centres)
            return super().attend(call, phase)

    with installed(model, Spy(agents=64, p=1.0, c=0.0)):
        denoise_flux(model, ids)
    assert len(seen) == 2
    for rotated, q, centres in seen.values():
        torch.testing.assert_close(rotated, q, atol=1e-6, rtol=0)
        assert torch.equal(centres, torch.arange(24))


def test_agents_are_means_of_cells_at_their_centres():
    q = torch.arange(24.0).view(1, 24, 1, 1)  # 4 x 6
    agents, centres = pool_queries(q, (4, 6), 2)
    assert agents.flatten().tolist() == [4.0, 7.0, 16.0, 19.0]
    assert centres.tolist() == [1, 4, 13, 16]
    ragged, places = pool_queries(torch.zeros(2, 35, 3, 4), (5, 7), 3)
    assert ragged.shape == (2, 9, 3, 4) and places.shape == (9,) and int(places.max()) < 35


def test_bad_settings_are_one_sentence():
    with pytest.raises(ValueError, match="agents must be at least 1, got 0"):
        AgentJointAttnProcessor(agents=0)
    with pytest.raises(ValueError, match="p "):
        AgentJointAttnProcessor(p=-1)
    info = LayerInfo(name="a", role="spatial", level=0, heads=2, width=8)
    assert list(InLineAttnProcessor().new_parameters(info)) == ["local_in", "local_out"]
