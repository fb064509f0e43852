"""Agent attention equals the product of its two softmax matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reattend.attn_processors.ops.agent import agent_attention, agent_attention_reference, agents_pay_off

SIZES = [(1, 9, 9, 4, 2, 5), (3, 35, 21, 6, 3, 8), (1, 17, 17, 1, 1, 40)]  # B, N_q, N_k, n, h, d
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}  # bf16: 8 bits, two products


def softmax(q, k, v, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def qkva(batch, queries, keys, agents, heads, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, n, heads, width, generator=generator, dtype=torch.float64).to(dtype)
        for n in (queries, keys, keys, agents)
    ]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_with_p_one_and_no_shortcut_it_is_the_explicit_two_softmax_product(size):
    q, k, v, agents = qkva(*size)
    scale = size[-1] ** -0.5
    got = agent_attention(q, k, v, agents, p=1.0, c=0.0, scale=scale, softmax=softmax)
    for b in range(size[0]):
        for h in range(size[4]):
            s1 = (agents[b, :, h] @ k[b, :, h].T * scale).softmax(dim=1)
            s2 = (q[b, :, h] @ agents[b, :, h].T * scale).softmax(dim=1)
            torch.testing.assert_close(got[b, :, h], s2 @ s1 @ v[b, :, h], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("p", "c"), [(0.3, 0.075), (1.0, 0.0), (0.0, 1.0)])
def test_the_fused_form_equals_the_reference(p, c, dtype):
    q, k, v, agents = qkva(2, 30, 30, 5, 3, 8)
    want = agent_attention_reference(q, k, v, agents, p=p, c=c, scale=8**-0.5)
    cast = [x.to(dtype) for x in (q, k, v, agents)]
    got = agent_attention(*cast, p=p, c=c, scale=8**-0.5, softmax=softmax)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_gradients_equal_those_of_the_reference():
    inputs = [x.requires_grad_() for x in qkva(2, 12, 12, 3, 2, 4)]
    settings = {"p": 0.3, "c": 0.075, "scale": 0.5}
    weight = qkva(2, 12, 12, 3, 2, 4)[1]
    got = torch.autograd.grad((agent_attention(*inputs, **settings, softmax=softmax) * weight).sum(), inputs)
    want = torch.autograd.grad((agent_attention_reference(*inputs, **settings) * weight).sum(), inputs)
    for name, fast, slow in zip(["q", "k", "v", "agents"], got, want, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_the_second_scale_is_d_to_the_minus_half_p():
    q, k, v, agents = qkva(1, 6, 6, 2, 1, 16)
    seen = []

    def recording(q, k, v, scale):
        seen.append(scale)
        return softmax(q, k, v, scale)

    agent_attention(q, k, v, agents, p=0.3, c=0.0, scale=16**-0.5, softmax=recording)
    assert seen == pytest.approx([16**-0.5, 16 ** (-0.3 / 2)])


def test_constant_values_pass_through_unchanged():
    q, k, v, agents = qkva(1, 20, 20, 4, 2, 8)
    got = agent_attention(q, k, torch.ones_like(v), agents, p=0.3, c=0.0, scale=8**-0.5, softmax=softmax)
    torch.testing.assert_close(got, torch.ones_like(v), atol=1e-12, rtol=0)


def test_agents_pay_off_only_below_half_the_queries():
    assert agents_pay_off(4, 9)
    assert not agents_pay_off(4, 8)
    assert not agents_pay_off(5, 8)
