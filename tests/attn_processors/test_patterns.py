"""Patterns show what their definition says; counts, windows and coverage agree with it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.patterns import Dense, Disc, Square, TileWindow

radii = st.one_of(st.integers(1, 12), st.floats(1, 12))
patterns = st.one_of(
    st.builds(Disc, radii),
    st.builds(
        lambda half, border: Square(2 * half + 1, border), st.integers(0, 8), st.sampled_from(["truncate", "shift"])
    ),
    st.builds(TileWindow, st.tuples(st.integers(1, 6), st.integers(1, 6)), radii),
    st.just(Dense()),
)
layouts = st.builds(TokenLayout, st.integers(1, 11), st.integers(1, 18), order=st.sampled_from(["raster", "tile"]))


def sees(pattern, query, key, shape):
    """The definitions, with plain numbers."""
    if isinstance(pattern, Disc):
        return sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) < Fraction(pattern.radius) ** 2
    if isinstance(pattern, Square):
        half, inside = pattern.side // 2, []
        for a, b, size in zip(query, key, shape, strict=True):
            if pattern.border == "shift" and size <= pattern.side:
                inside.append(True)
                continue
            centre = min(max(a, half), size - 1 - half) if pattern.border == "shift" else a
            inside.append(abs(centre - b) <= half)
        return all(inside)
    if isinstance(pattern, TileWindow):
        squared = 0
        for axis, side in enumerate(pattern.tile):
            own, other = ({i for i in range(shape[axis]) if i // side == place[axis] // side} for place in (query, key))
            squared += min(abs(a - b) for a in own for b in other) ** 2
        return squared < Fraction(pattern.radius) ** 2
    return True


@settings(max_examples=40, deadline=None)
@given(patterns, layouts, st.data())
def test_visible_is_the_definition(pattern, layout, data):
    visible = pattern.visible(layout)
    place = [tuple(p) for p in layout.coordinates().tolist()]
    assert visible.dtype == torch.bool and visible.shape == (len(place), len(place))
    for i in data.draw(st.sets(st.integers(0, len(place) - 1), min_size=1, max_size=3)):
        assert visible[i].tolist() == [sees(pattern, place[i], key, layout.shape) for key in place]


@settings(max_examples=60, deadline=None)
@given(patterns, layouts)
def test_counts_coverage_and_windows_agree_with_visible(pattern, layout):
    visible = pattern.visible(layout)
    assert torch.equal(pattern.key_counts(layout), visible.sum(dim=1))
    assert pattern.covers(layout) == bool(visible.all())
    assert visible.diagonal().all()
    for axis, size in enumerate(layout.shape):
        place = layout.coordinates()[:, axis]
        windows = [pattern.window(axis, i, size) for i in range(size)]
        for i, (first, end) in enumerate(windows):
            seen = visible[place == i].any(dim=0)
            assert place[seen].min() >= first and place[seen].max() < end
        assert windows == sorted(windows) and all(0 <= first < end <= size for first, end in windows)
        assert [end for _, end in windows] == sorted(end for _, end in windows)


@pytest.mark.parametrize(("radius", "keys"), [(8, 193), (16, 793), (32, 3205)])
def test_a_disc_has_about_pi_r_squared_keys(radius, keys):
    layout = TokenLayout(70, 70)
    assert Disc(radius).key_counts(layout).max() == keys


def test_a_radius_is_compared_strictly_and_without_rounding():
    row = TokenLayout(1, 8)
    assert Disc(2).visible(row)[0].sum() == 2
    assert Disc(math.nextafter(2.0, 3.0)).visible(row)[0].sum() == 3
    assert Disc(math.nextafter(2.0, 1.0)).visible(row)[0].sum() == 2
    assert Disc(1).visible(row).equal(torch.eye(8, dtype=torch.bool))


def test_shifted_squares_have_the_same_number_of_keys_everywhere():
    layout = TokenLayout(9, 12)
    assert set(Square(5, "shift").key_counts(layout).tolist()) == {25}
    assert set(Square(11, "shift").key_counts(layout).tolist()) == {99}
    assert Square(5).key_counts(layout)[0] == 9


def test_radius_two_is_a_window_of_three_by_three_tiles():
    counts = TileWindow((4, 5), 2).key_counts(TokenLayout(20, 25)).view(20, 25)
    assert counts[10, 12] == 9 * 20
    assert counts[0, 0] == 4 * 20
    assert (TileWindow((4, 5), 1).key_counts(TokenLayout(20, 25)) == 20).all()


def test_a_tile_read_from_json_is_as_good_as_a_tuple():
    assert TileWindow([4, 5], 2) == TileWindow((4, 5), 2)
    assert hash(TileWindow([4, 5], 2)) == hash(TileWindow((4, 5), 2))


@pytest.mark.parametrize("radius", [0.99, 0, -3, math.inf, math.nan])
def test_a_radius_below_one_or_without_end_is_refused(radius):
    for pattern in (Disc, lambda r: TileWindow((4, 4), r)):
        with pytest.raises(ValueError, match="finite number of tokens >= 1"):
            pattern(radius)


def test_even_squares_unknown_borders_and_empty_tiles_are_refused():
    with pytest.raises(ValueError, match="odd number"):
        Square(4)
    with pytest.raises(ValueError, match="'truncate' or 'shift'"):
        Square(3, "wrap")
    with pytest.raises(ValueError, match="both at least 1"):
        TileWindow((0, 4))
