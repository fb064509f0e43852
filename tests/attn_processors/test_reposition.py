"""Where tokens of references come to lie, and what that does to attention."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import EXACT, softmax, tokens

from reattend.attn_processors.ops.groups import Extra, grouped_attention, isolation_groups
from reattend.attn_processors.ops.regions import (
    box_tokens,
    clipped,
    mask_tokens,
    owners,
    pack_mask,
    tight_box,
    unpack_mask,
)  # fmt: skip
from reattend.attn_processors.ops.reposition import area_ratio, rotary_places, sample, sampling

WHOLE = (0.0, 0.0, 1.0, 1.0)


def attended(q, k, v, extra):
    """All queries are of subject 0."""
    owner = torch.ones(q.shape[1], dtype=torch.int64)
    return grouped_attention(q, k, v, isolation_groups(owner, referred=1), {0: [extra]}, softmax)


def resampled(k, v, target, grid, source, mask, fit="stretch"):
    index, weight, _ = sampling(target, grid, source, mask, fit)
    return Extra(*(sample(x.flatten(2), index, weight).unflatten(2, x.shape[2:]) for x in (k, v)))


def plain(k, v, mask, bias=0.0):
    return Extra(k[:, mask.flatten()], v[:, mask.flatten()], bias)


@pytest.mark.parametrize("box", [(0.25, 0.0, 0.75, 0.5), WHOLE])
def test_identity_boxes_select_the_tokens_of_the_mask(box):
    mask = box_tokens(box, (8, 8))
    index, weight, places = sampling(box, (8, 8), box, mask)
    assert index.shape[1] == 1
    assert torch.equal(index[:, 0], mask.flatten().nonzero().flatten())
    assert (weight == 1).all()
    flat, moved = rotary_places(box, (8, 8), box, mask)
    assert torch.equal(flat, index[:, 0])
    torch.testing.assert_close(moved, places, atol=EXACT, rtol=0)
    torch.testing.assert_close(moved, mask.nonzero().double(), atol=EXACT, rtol=0)


def test_a_box_that_moved_but_kept_its_size_changes_nothing_without_positions():
    """Softmax does not care about the order of keys: guards what the documentation says about moving."""
    source, target = (0.0, 0.0, 0.5, 0.5), (0.5, 0.25, 1.0, 0.75)
    mask = box_tokens(source, (8, 8))
    (q, k, v), (_, rk, rv) = tokens(10), tokens(64, seed=1)
    moved = attended(q, k, v, resampled(rk, rv, target, (8, 8), source, mask))
    torch.testing.assert_close(moved, attended(q, k, v, plain(rk, rv, mask)), atol=EXACT, rtol=0)


@pytest.mark.parametrize("factor", [2, 4])
def test_whole_number_upsampling_of_flat_tokens_equals_a_bias(factor):
    """Where neighbouring tokens agree (as under nearest sampling), r times each way is log(r^2)."""
    source = (0.0, 0.0, 0.25, 0.25)
    target = (0.0, 0.0, 0.25 * factor, 0.25 * factor)
    mask = box_tokens(source, (8, 8))
    (q, k, v), (_, rk, rv) = tokens(10), tokens(1, seed=1)
    rk, rv = rk.expand(-1, 64, -1, -1), rv.expand(-1, 64, -1, -1)
    got = attended(q, k, v, resampled(rk, rv, target, (8, 8), source, mask))
    want = attended(q, k, v, plain(rk, rv, mask, bias=math.log(factor**2)))
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)
    assert area_ratio(target, (8, 8), source, (8, 8)) == pytest.approx(factor**2)


def test_sampling_before_and_after_an_affine_projection_is_the_same():
    source, target = (0.1, 0.2, 0.6, 0.9), (0.3, 0.0, 1.0, 0.5)
    mask = box_tokens(source, (7, 9))
    index, weight, _ = sampling(target, (7, 9), source, mask)
    project = torch.nn.Linear(5, 4).double()
    x = torch.randn(2, 63, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(project(sample(x, index, weight)), sample(project(x), index, weight), atol=EXACT, rtol=0)


@given(
    edges=st.lists(st.floats(0, 1), min_size=8, max_size=8),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    source_grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    fit=st.sampled_from(["stretch", "uniform"]),
)
@settings(max_examples=60, deadline=None)
def test_samples_are_averages_of_the_subject_alone(edges, grid, source_grid, fit):
    xs, ys = (sorted(edges[i : i + 4 : 2]) for i in (0, 1)), (sorted(edges[i : i + 4 : 2]) for i in (4, 5))
    (sx, sy), (tx, ty) = tuple(xs), tuple(ys)
    source, target = clipped((sx[0], sy[0], sx[1], sy[1])), clipped((tx[0], ty[0], tx[1], ty[1]))
    if source is None or target is None or min(b - a for a, b in (sx, sy, tx, ty)) < 0.01:
        return
    mask = box_tokens(source, source_grid)
    index, weight, places = sampling(target, grid, source, mask, fit)
    assert 1 <= len(index) == len(weight) == len(places)
    torch.testing.assert_close(weight.sum(1), torch.ones(len(weight), dtype=torch.float64))
    assert mask.flatten()[index[weight > 0]].all()


def test_shrinking_averages_several_samples():
    mask = torch.ones(8, 8, dtype=torch.bool)
    index, weight, _ = sampling((0.0, 0.0, 0.25, 0.25), (8, 8), WHOLE, mask)
    assert len(index) == 4
    x = torch.arange(64, dtype=torch.float64)[None, :, None]
    blocks = x.view(2, 4, 2, 4).mean((1, 3)).flatten()
    torch.testing.assert_close(sample(x, index, weight)[0, :, 0], blocks, atol=EXACT, rtol=0)


def test_a_mask_too_thin_to_be_sampled_gives_its_nearest_token():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[6, 1] = mask[0, 0] = True
    index, weight, places = sampling(WHOLE, (2, 2), (0.0, 0.5, 0.4, 1.0), mask)
    assert index.tolist() == [[49]] and weight.tolist() == [[1.0]] and places.shape == (1, 2)


def test_rotary_places_shift_scale_and_stay_in_range():
    mask = box_tokens((0.0, 0.0, 0.5, 0.5), (8, 8))
    _, shifted = rotary_places((0.5, 0.25, 1.0, 0.75), (8, 8), (0.0, 0.0, 0.5, 0.5), mask)
    torch.testing.assert_close(shifted, mask.nonzero() + torch.tensor([2.0, 4.0]).double(), atol=EXACT, rtol=0)
    _, large = rotary_places(WHOLE, (64, 64), (0.0, 0.0, 0.5, 0.5), mask)  # 16 times as large: 2 at most
    assert large[1, 1] - large[0, 1] == 2
    torch.testing.assert_close(large.mean(0), torch.tensor([31.5, 31.5]).double())  # about the centre
    _, odd = rotary_places((0.0, 0.0, 1.0, 0.5), (8, 8), (0.0, 0.0, 0.5, 0.5), mask, "stretch")
    assert odd[1, 1] - odd[0, 1] == 2 and odd[4, 0] - odd[0, 0] == 1


def test_boxes_become_tokens_and_the_smallest_ones_at_least_one():
    assert box_tokens((0.0, 0.0, 0.5, 1.0), (2, 4)).tolist() == [[True, True, False, False]] * 2
    assert box_tokens((0.51, 0.51, 0.52, 0.52), (4, 4)).nonzero().tolist() == [[2, 2]]
    assert box_tokens((0.999, 0.999, 1.0, 1.0), (1, 3)).nonzero().tolist() == [[0, 2]]
    assert clipped((-0.5, 0.2, 0.5, 1.4)) == (0.0, 0.2, 0.5, 1.0)
    assert clipped((1.0, 0.2, 1.5, 0.4)) is None and clipped((0.3, 0.2, 0.3, 0.4)) is None


def test_masks_become_tokens_and_texts_and_back():
    mask = torch.zeros(13, 9, dtype=torch.bool)
    mask[2:9, 3:8] = True
    assert torch.equal(unpack_mask(pack_mask(mask)), mask)
    assert torch.equal(mask_tokens(mask, (13, 9)), mask)
    assert tight_box(mask) == (3 / 9, 2 / 13, 8 / 9, 9 / 13)
    dot = torch.zeros(32, 32, dtype=torch.bool)
    dot[5, 5] = True
    assert mask_tokens(dot, (4, 4)).nonzero().tolist() == [[0, 0]]
    assert not mask_tokens(torch.zeros(32, 32, dtype=torch.bool), (4, 4)).any()
    assert tight_box(torch.zeros(2, 2, dtype=torch.bool)) is None


@pytest.mark.parametrize("text", ["8x8", "8x8:!!", "8x8:AAAA", "0x8:", "2000x8:AAAA", "8x8:AAAAAAAAAAA"])
def test_texts_that_are_no_masks_are_told(text):
    with pytest.raises(ValueError, match="mask"):
        unpack_mask(text)


def test_overlaps_go_to_the_smallest_first_largest_or_to_all():
    small, large = torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    small[0, 0] = True
    masks = torch.stack([large, small])
    assert owners(masks, "smallest").tolist() == [2, 1, 1, 1]
    assert owners(masks, "first").tolist() == [1, 1, 1, 1]
    assert owners(masks, "largest").tolist() == [1, 1, 1, 1]
    assert owners(masks, "shared").tolist() == [3, 1, 1, 1]
