"""Near keys tile by tile and all others at once: the same numbers as in one softmax, wherever no gradient is wanted."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from attention_oracle import oracle, qkv, some_valid
from diffusers import attention_backend

from reattend.attn_processors import installed
from reattend.attn_processors.ops import halo, local, near_far
from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.local import local_attention, sdpa
from reattend.attn_processors.ops.patterns import Disc, Square
from reattend.attn_processors.ops.pool import Pool

CPU = torch.device("cpu")
LAYOUTS = [
    TokenLayout(13, 19, before=7),
    TokenLayout(13, 19, before=4, after=3, order="tile"),
    TokenLayout(12, 16, after=77),
    TokenLayout(9, 10, before=512),
    TokenLayout(1, 45, before=7),
]


@pytest.fixture
def taken(monkeypatch) -> Mock:
    """Takes the way in two parts however few the other keys are; counts how often."""
    spy = Mock(wraps=near_far.attend_near_far)
    monkeypatch.setattr(near_far, "LEAST", 1)
    monkeypatch.setattr(local, "attend_near_far", spy)
    monkeypatch.setattr(local, "default_side", lambda *_: 4)
    monkeypatch.setitem(halo.CHUNK_BYTES, "cpu", 40_000)  # several chunks
    return spy


@pytest.mark.parametrize(
    ("dtype", "exact"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str
)  # rounding, doubled
@pytest.mark.parametrize("pool", [None, Pool(4), Pool(2, budget=6)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_both_parts_together_are_one_softmax(layout, pool, dtype, exact, taken):
    for pattern, batch in ((Disc(3), 1), (Square(5, "shift"), 3)):
        valid = some_valid(layout, batch) if batch > 1 else None
        q, k, v = qkv(layout, batch)
        want = oracle(q, k, v, layout, pattern, pool, valid=valid)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        got = local_attention(q, k, v, layout, pattern, pool=pool, key_valid=valid, backend="halo")
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=exact, rtol=0)
    assert taken.call_count == 2


def test_where_all_others_are_hidden_only_near_keys_count(taken):
    layout = TokenLayout(7, 9, before=5)
    valid = torch.ones(1, layout.tokens, dtype=torch.bool)
    valid[:, :5] = False
    q, k, v = qkv(layout)
    got = local_attention(q, k, v, layout, Disc(2), key_valid=valid, backend="halo")[:, layout.grid]
    alone = TokenLayout(7, 9)
    want = local_attention(*(x[:, layout.grid] for x in (q, k, v)), alone, Disc(2), backend="reference")
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    assert taken.call_count == 1


def test_any_strides_will_do(taken):
    layout = TokenLayout(7, 9, before=5)
    q, k, v = qkv(layout)
    swapped = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    shared = [x[:, :, :1].expand(-1, -1, 2, -1) for x in (q, k, v)]  # one head for all
    for inputs in (swapped, shared):
        got = local_attention(*inputs, layout, Disc(2), backend="halo")
        torch.testing.assert_close(got, oracle(*inputs, layout, Disc(2)), atol=1e-12, rtol=0)
    assert taken.call_count == 2


def test_autocast_gets_what_it_gets_of_one_softmax(taken):
    layout = TokenLayout(7, 9, before=5)
    q, k, v = (x.float() for x in qkv(layout))
    with torch.autocast("cpu", torch.bfloat16):
        assert local_attention(q, k, v, layout, Disc(2), backend="halo").dtype == sdpa(q, k, v, scale=1.0).dtype
    assert not taken.called


def test_gradients_are_never_asked_of_it(taken):
    layout, pool = TokenLayout(6, 7, before=5), Pool(2)
    q, k, v = qkv(layout)
    weights = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)  # the one thing that is trained
    out = local_attention(q, k, v, layout, Disc(2), pool=pool, pool_weights=weights, backend="halo")
    want = oracle(q, k, v, layout, Disc(2), pool, weights)
    (got_grad,), (want_grad,) = (torch.autograd.grad(x.square().sum(), weights) for x in (out, want))
    torch.testing.assert_close(got_grad, want_grad, atol=1e-12, rtol=0)
    for x in (q, k, v):
        x.requires_grad_()
        local_attention(q, k, v, layout, Disc(2), backend="halo").sum().backward()
        x.requires_grad_(False)
    assert taken.call_count == 0


def test_it_is_not_planned_where_it_would_not_pay():
    few, many = TokenLayout(8, 8, before=near_far.LEAST - 1), TokenLayout(8, 8, before=near_far.LEAST)

    def planned(layout, dtype=torch.float32, device=CPU, pool=None):
        return near_far.plan_near_far(layout, Disc(2), 4, pool, device, dtype) is not None

    assert planned(many) and planned(few, pool=Pool(4))
    assert not planned(few) and not planned(many, torch.bfloat16) and not planned(many, device=torch.device("meta"))


def test_a_softmax_that_was_given_computes_everything(taken):
    layout = TokenLayout(6, 7, before=5)
    q, k, v = qkv(layout)
    given = Mock(wraps=sdpa)
    local_attention(q, k, v, layout, Disc(2), backend="halo", softmax=given)
    assert given.called and not taken.called


def test_clear_takes_it_unless_the_user_chose_a_backend(taken, flux):
    def run():
        generator = torch.Generator().manual_seed(0)
        return flux("", height=96, width=64, num_inference_steps=1, generator=generator, output_type="latent").images

    with installed(flux, "clear", radius=1.5, backend="halo"):
        run()
        assert taken.called
        taken.reset_mock()
        with attention_backend("_native_math"):
            run()
        assert not taken.called
