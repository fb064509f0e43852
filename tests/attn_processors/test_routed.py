"""Bi-level routing: the gathered tiles are the masked softmax, and with all tiles it is the stock layer."""

from __future__ import annotations

import pytest
import torch
from tiny import denoise_flux, image_ids

from reattend.attn_processors import RoutedAttnProcessor, installed
from reattend.attn_processors.ops.local import sdpa
from reattend.attn_processors.ops.routed import routed_attention, routed_reference, routes

EXACT = 1e-12  # fp64, another order of keys
GRIDS = [
    ((4, 6), (2, 3)),
    ((5, 7), (2, 3)),
    ((1, 9), (4, 4)),
    ((3, 3), (8, 8)),
]  # grid, tile: whole, ragged, strip, one tile


def tokens(count, batch=2, heads=3, width=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, count, heads, width, generator=draw, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize(("grid", "tile"), GRIDS, ids=str)
@pytest.mark.parametrize("topk", [1, 2, 9])
@pytest.mark.parametrize("text", ["none", "seen", "padded"])
def test_gathered_tiles_are_the_masked_softmax(grid, tile, topk, text):
    q, k, v = tokens(grid[0] * grid[1])
    _, *others = tokens(5, seed=1)
    seen = torch.tensor([[True, True, False, True, False], [True] * 5]) if text == "padded" else None
    settings = {"tile": tile, "topk": topk, "scale": 0.5, "seen": seen}
    given = (q, k, v, None if text == "none" else tuple(others), grid)
    want = routed_reference(*given, **settings)
    torch.testing.assert_close(routed_attention(*given, **settings, softmax=sdpa), want, atol=EXACT, rtol=0)


@pytest.mark.parametrize(("grid", "tile"), GRIDS[:2], ids=str)
def test_gradients_are_those_of_the_masked_softmax(grid, tile):
    _, *others = tokens(5, seed=1)
    gradients = []
    for form, more in ((routed_attention, {"softmax": sdpa}), (routed_reference, {})):
        inputs = [x.requires_grad_() for x in tokens(grid[0] * grid[1])]
        form(*inputs, tuple(others), grid, tile=tile, topk=2, scale=0.5, **more).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    for name, got, want in zip("qkv", *gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_a_tile_goes_to_the_tile_that_fits_it_wherever_it_lies():
    q, k = torch.zeros(2, 1, 16, 1, 4)  # 4 x 4 tokens, tiles of 2 x 2
    k[0, [10, 11, 14, 15]] = torch.tensor([1.0, 0, 0, 0])  # the last tile
    q[0, [0, 1, 4, 5]] = torch.tensor([1.0, 0, 0, 0])  # the first one
    assert routes(q, k, (4, 4), (2, 2), 1)[0, 0].tolist() == [3]
    q[0, [0, 1, 4, 5]] *= -1
    assert 3 not in routes(q, k, (4, 4), (2, 2), 3)[0, 0]


def test_as_many_tiles_as_there_are_is_the_stock_model(flux):
    model = flux.transformer
    for height, width in ((4, 6), (5, 7)):
        ids = image_ids(height, width)
        want = denoise_flux(model, ids, batch=2)
        with installed(model, RoutedAttnProcessor(tile=(2, 2), topk=100)):
            torch.testing.assert_close(denoise_flux(model, ids, batch=2), want, atol=1e-5, rtol=0)
        with installed(model, RoutedAttnProcessor(tile=(2, 2), topk=1)):
            assert not torch.allclose(denoise_flux(model, ids, batch=2), want, atol=1e-4)


def test_bad_settings_are_one_sentence():
    for settings, words in (
        ({"topk": 0}, "topk must be at least 1, got 0"),
        ({"tile": (0, 4)}, "tile is .rows, columns."),
    ):
        with pytest.raises(ValueError, match=words):
            RoutedAttnProcessor(**settings)
