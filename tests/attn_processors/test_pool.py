"""Pooled keys are weighted means of cells, and their number and weight in the softmax stay in bounds."""

from __future__ import annotations

import math

import pytest
import torch

from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.pool import Pool, pool_bias, pool_grid, pool_grid_reference

CASES = [  # layout, pool, m
    (TokenLayout(8, 12, before=3), Pool(4), 1),
    (TokenLayout(9, 13, after=5), Pool(4), 1),
    (TokenLayout(17, 23, 2, 2, order="tile"), Pool(4), 1),
    (TokenLayout(17, 23, before=2, order="tile"), Pool(2, budget=12), 3),
    (TokenLayout(9, 13), Pool(3, budget=6), 2),
    (TokenLayout(1, 30, before=1), Pool(4, budget=4), 2),
    (TokenLayout(3, 3), Pool(5), 1),
]


def tokens(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, layout.tokens, 2, 3, generator=generator, dtype=torch.float64)


def weight_map(pool):
    return torch.rand(pool.factor, pool.factor, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "weights"])
@pytest.mark.parametrize(("layout", "pool", "m"), CASES, ids=str)
def test_pooling_equals_the_loop_over_cells(layout, pool, m, mean):
    weights = None if mean else weight_map(pool)
    x = tokens(layout)
    got = pool_grid(x, layout, pool, weights)
    assert pool.merged(layout) == m and got.shape == (2, pool.keys(layout), 2, 3)
    torch.testing.assert_close(got, pool_grid_reference(x, layout, pool, weights), atol=1e-13, rtol=0)


@pytest.mark.parametrize(("layout", "pool", "m"), CASES, ids=str)
def test_constant_tokens_stay_constant_up_to_the_sum_of_weights(layout, pool, m):
    weights = weight_map(pool)
    got = pool_grid(torch.ones_like(tokens(layout)), layout, pool, weights)
    torch.testing.assert_close(got, weights.sum().expand_as(got), atol=1e-13, rtol=0)


def test_gradients_of_tokens_and_weights_are_right():
    layout, pool = TokenLayout(5, 7, before=1, order="tile"), Pool(2, budget=4)
    x, w = tokens(layout).requires_grad_(), weight_map(pool).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: pool_grid(x, layout, pool, w), (x, w))


def test_the_number_of_keys_stays_within_the_budget_and_the_cells_within_the_mass():
    for side in (16, 64, 200, 512):
        layout, pool = TokenLayout(side, side), Pool(4)
        assert pool.keys(layout) <= 1024
        bias = pool_bias(layout, pool)
        mass = pool.keys(layout) if bias is None else float(bias.exp().sum())
        assert mass == pytest.approx(math.ceil(side / 4) ** 2)
    assert Pool(4, budget=None).keys(TokenLayout(512, 512)) == 128**2
    assert Pool(4).merged(TokenLayout(128, 128)) == 1 and Pool(4).merged(TokenLayout(128, 132)) == 2


def test_impossible_pools_and_weight_maps_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Pool(0)
    with pytest.raises(ValueError, match="None means no limit"):
        Pool(4, budget=0)
    layout = TokenLayout(4, 4)
    with pytest.raises(ValueError, match=r"shape \(4, 4\), got \(2, 2\)"):
        pool_grid(tokens(layout), layout, Pool(4), torch.ones(2, 2))
