"""Masks from attention maps: synthetic maps whose truth is known."""

from __future__ import annotations

import pytest
import torch

from reattend.attn_processors.ops.maps import assign, clean, otsu, pool_tokens, resized, spread_powers, unit

GRID = (16, 16)


def overlap(a, b):
    return float((a & b).sum() / (a | b).sum())


def world(noise=0.0, seed=0):
    """Two blocks; words that act at their middles only; self-attention inside blocks and in the rest."""
    draw = torch.Generator().manual_seed(seed)
    truth = torch.zeros(2, *GRID, dtype=torch.bool)
    truth[0, 3:12, 1:7] = True
    truth[1, 5:14, 9:15] = True
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    maps = []
    for row, column in ((7, 4), (9, 12)):
        maps.append(torch.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 4))
    p = torch.stack(maps, -1).flatten(0, 1)
    p = p * (1 + noise * torch.randn(p.shape, generator=draw)).clamp(min=0)
    kind = (truth[0].long() + 2 * truth[1].long()).flatten()
    a = (kind[:, None] == kind[None]).float() + noise * torch.rand(256, 256, generator=draw)
    return p, a / a.sum(1, keepdim=True), truth


@pytest.mark.parametrize(("noise", "least"), [(0.0, 0.95), (0.3, 0.85)])
def test_blocks_are_recovered(noise, least):
    p, a, truth = world(noise)
    masks = assign(unit(spread_powers(a, p))).view(2, *GRID)
    for mask, right in zip(masks, truth, strict=True):
        assert overlap(clean(mask), right) >= least


def test_repeated_products_equal_powers_of_the_matrix():
    p, a, _ = world(0.3)
    want = sum(torch.linalg.matrix_power(a, k) @ p for k in range(1, 5)) / 4
    torch.testing.assert_close(spread_powers(a, p), want, atol=1e-6, rtol=0)


def test_a_word_that_acts_nowhere_has_no_mask():
    p, a, _ = world()
    p[:, 1] = 1e-3
    masks = assign(unit(spread_powers(a, p)))
    assert masks[0].any() and not masks[1].any()


def test_otsu_parts_two_classes():
    values = torch.cat([torch.full((50,), 0.1), torch.full((20,), 0.9)])
    assert 0.1 < otsu(values) < 0.9
    assert otsu(torch.ones(5)) == 1


def test_cleaning_drops_specks_and_fills_holes():
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[2:10, 2:10] = True
    mask[5, 5] = False
    mask[14, 14] = True
    want = torch.zeros_like(mask)
    want[2:10, 2:10] = True
    assert torch.equal(clean(mask), want)
    assert not clean(torch.zeros(4, 4, dtype=torch.bool)).any()
    dot = torch.zeros(8, 8, dtype=torch.bool)
    dot[3, 3] = True
    assert clean(dot)[3, 3]  # the only piece stays


def test_maps_change_their_size():
    assert resized(torch.ones(16, 3), (4, 4), (8, 6)).shape == (48, 3)
    pooled, grid = pool_tokens(torch.arange(15.0)[:, None], (3, 5), 6)
    assert grid == (2, 3) and pooled.shape == (6, 1)
    assert pooled[0, 0] == (0 + 1 + 5 + 6) / 4
