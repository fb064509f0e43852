"""Tokens are where their layout says, in raster and in tile order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reattend.attn_processors.ops.layout import TokenLayout, inverse, tile_order

sides = st.integers(1, 40)


def tile_order_reference(height, width, rows, columns):
    return [
        y * width + x
        for top in range(0, height, rows)
        for left in range(0, width, columns)
        for y in range(top, min(top + rows, height))
        for x in range(left, min(left + columns, width))
    ]


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 9), st.integers(1, 17))
def test_tile_order_goes_through_tiles_in_raster_order_and_through_tokens_inside(height, width, rows, columns):
    got = tile_order(height, width, (rows, columns))
    assert got.tolist() == tile_order_reference(height, width, rows, columns)


@settings(max_examples=20, deadline=None)
@given(sides, sides)
def test_the_inverse_undoes_tile_order(height, width):
    order = tile_order(height, width)
    raster = torch.arange(height * width)
    assert torch.equal(order[inverse(order)], raster)
    assert torch.equal(inverse(order)[order], raster)


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_coordinates_follow_the_order_of_the_tokens(order):
    layout = TokenLayout(11, 35, before=3, order=order)
    place = layout.coordinates()
    assert torch.equal(place[:, 0] * 35 + place[:, 1], layout.raster())
    assert torch.equal(layout.raster()[layout.positions()], torch.arange(11 * 35))
    assert (place[128] == torch.tensor([3, 23] if order == "raster" else [0, 16])).all()


@pytest.mark.parametrize(("before", "after"), [(0, 0), (7, 0), (0, 5), (7, 5)])
def test_slices_cover_the_sequence_and_assemble_puts_it_together(before, after):
    layout = TokenLayout(4, 5, before, after)
    x = torch.arange(layout.tokens).view(1, -1, 1)
    assert layout.tokens == 20 + before + after
    parts = [x[:, part] for part in (layout.leading, layout.grid, layout.trailing)]
    assert [part.shape[1] for part in parts] == [before, 20, after]
    assert torch.equal(torch.cat(parts, dim=1), x)
    assert torch.equal(layout.assemble(x[:, layout.grid], layout.globals_of(x)), x)


def test_equal_layouts_are_one_key():
    assert len({TokenLayout(4, 5, 7), TokenLayout(4, 5, 7), TokenLayout(4, 5, 7, order="tile")}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0, "width": 4}, "at least one row"),
        ({"height": 4, "width": 4, "before": -1}, "not negative"),
        ({"height": 4, "width": 4, "order": "hilbert"}, "choose 'raster' or 'tile'"),
    ],
)
def test_impossible_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout(**arguments)
