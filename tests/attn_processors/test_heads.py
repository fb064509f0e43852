"""A mixture of heads: gates are those of the formula, heads that are off add nothing, and the trainer hears of the balance."""

from __future__ import annotations

import pytest
import torch
from tiny import denoise_flux, image_ids
from torch.nn import Parameter

from reattend.attn_processors import ClearAttnProcessor, LayerInfo, MixtureOfHeadsAttnProcessor, install, installed
from reattend.attn_processors.layer import TOLD
from reattend.attn_processors.ops.heads import balance, gates, gates_reference, head_scores

EXACT = 1e-5  # fp32, through a few blocks
HERE = {"radius": 2, "shared": 0.0, "active": 0.5}  # one of the two heads of tiny FLUX


@pytest.mark.parametrize(("shared", "routed"), [(0, 1), (0, 3), (1, 2), (2, 4), (3, 1)])
@pytest.mark.parametrize("grouped", [False, True])
def test_gates_are_those_of_the_formula(shared, routed, grouped):
    draw = torch.Generator().manual_seed(0)
    trained, scores = torch.randn(2, 2, 5, 6, generator=draw, dtype=torch.float64)
    groups = torch.randn(2, 5, 2, generator=draw, dtype=torch.float64) if grouped else None
    got = gates(trained, scores, shared, routed, groups)
    for b in range(2):
        for n in range(5):
            want = gates_reference(
                trained[b, n], scores[b, n], shared, routed, None if groups is None else groups[b, n]
            )
            torch.testing.assert_close(got[b, n], want, atol=1e-12, rtol=0)
    assert ((got > 0).sum(-1) == shared + routed).all()
    if groups is None:
        assert torch.allclose(got.sum(-1), torch.tensor(float(shared + routed), dtype=torch.float64))


def test_open_gates_are_one_before_training_and_long_queries_choose():
    q = torch.ones(1, 3, 4, 2)
    q[0, 1, 3] = 5.0
    gate = gates(*head_scores(q, torch.zeros(4), torch.zeros(4, 2)), 1, 1)
    assert gate[0].tolist() == [[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]


def test_the_balance_is_one_if_heads_are_used_evenly_and_more_if_not():
    even = torch.eye(4)[None] * 3
    assert balance(even, even, 0, 1) == pytest.approx(1)
    one = torch.tensor([[[9.0, 0, 0, 0]] * 4])
    gate = torch.tensor([[[1.0, 0, 0, 0]] * 4])
    assert balance(one, gate, 0, 1) > 3.9
    scores = one.clone().requires_grad_()
    balance(scores, gate, 0, 1).backward()
    assert scores.grad[0, 0, 0] > 0 > scores.grad[0, 0, 1]  # what is used too much goes down


@pytest.mark.parametrize("route", ["token", "sample"])
def test_with_all_heads_on_it_is_local_attention(route, flux):
    model, ids = flux.transformer, image_ids(4, 6)
    with installed(model, ClearAttnProcessor(radius=2)):
        want = denoise_flux(model, ids, batch=2)
    with installed(model, MixtureOfHeadsAttnProcessor(radius=2, active=1.0, route=route)):
        torch.testing.assert_close(denoise_flux(model, ids, batch=2), want, atol=EXACT, rtol=0)
    with installed(model, MixtureOfHeadsAttnProcessor(**HERE, route=route)):
        assert not torch.allclose(denoise_flux(model, ids, batch=2), want, atol=1e-4)


def test_a_head_that_is_off_adds_nothing_and_the_saving_form_is_the_plain_one(flux):
    """With a bias that settles the choice for everybody both routes switch the same head off."""
    model, ids, outs = flux.transformer, image_ids(4, 6), []
    for route in ("token", "sample"):
        handle = install(model, MixtureOfHeadsAttnProcessor(**HERE, route=route))
        ((_, item),) = handle.parts
        for swap in item.swaps:
            swap.module.reattend_router = Parameter(torch.tensor([-50.0, 50.0]))
            swap.module.reattend_router_weight = Parameter(torch.zeros(2, 16))
        outs.append(denoise_flux(model, ids, batch=2))
        handle.remove()
    torch.testing.assert_close(outs[0], outs[1], atol=EXACT, rtol=0)

    class First(ClearAttnProcessor):
        name = "first"

        def attend(self, call, phase):
            out = super().attend(call, phase).unflatten(-1, (2, -1)).clone()
            out[:, call.layout.grid, 0] = 0
            return out.flatten(2)

    with installed(model, First(radius=2)):
        torch.testing.assert_close(denoise_flux(model, ids, batch=2), outs[0], atol=EXACT, rtol=0)


@pytest.mark.parametrize("route", ["token", "sample"])
def test_with_all_heads_on_it_is_local_attention_also_where_the_softmax_is_rescaled(flux, route):
    model, ids = flux.transformer, image_ids(4, 6)
    with installed(model, ClearAttnProcessor(radius=2, scale="tokens")):
        want = denoise_flux(model, ids, batch=2)
    with installed(model, MixtureOfHeadsAttnProcessor(radius=2, scale="tokens", shared=0.0, active=1.0, route=route)):
        torch.testing.assert_close(denoise_flux(model, ids, batch=2), want, atol=EXACT, rtol=0)


def test_layers_tell_their_balance_to_a_listener_only(flux):
    model, ids = flux.transformer, image_ids(4, 6)
    handle = install(model, MixtureOfHeadsAttnProcessor(**HERE))
    ((context, _),) = handle.parts
    call = {
        "hidden_states": torch.randn(1, 24, 16), "encoder_hidden_states": torch.randn(1, 7, 32), "txt_ids": torch.zeros(7, 3),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.full((1,), 0.5), "img_ids": ids,
    }  # fmt: skip
    model(**call)
    assert TOLD not in context.slots
    context.slots[TOLD] = {}
    model(**call)
    told = context.slots.pop(TOLD)
    assert list(told) == ["transformer_blocks.0.attn.balance", "single_transformer_blocks.0.attn.balance"]
    assert all(0.009 < value.item() < 0.021 and value.requires_grad for value in told.values())


def test_parameters_follow_the_number_of_heads():
    method = MixtureOfHeadsAttnProcessor()
    assert [method.counts(heads) for heads in (1, 2, 4, 24)] == [(0, 1), (0, 2), (1, 2), (6, 12)]
    info = LayerInfo(name="a", role="joint", level=0, heads=4, width=32)
    shapes = {name: tuple(value.shape) for name, value in method.new_parameters(info).items()}
    assert shapes == {"router": (4,), "router_weight": (4, 8), "groups": (2,), "groups_weight": (2, 8)}


def test_bad_settings_are_one_sentence():
    for shared, active in ((0.8, 0.5), (0.0, 0.0), (1.0, 1.0), (0.25, 1.5)):
        with pytest.raises(ValueError, match="shared and active are shares of the heads"):
            MixtureOfHeadsAttnProcessor(shared=shared, active=active)
    with pytest.raises(ValueError, match="balance is a weight >= 0, got -1"):
        MixtureOfHeadsAttnProcessor(balance=-1)
