"""Which backend local attention takes, what it costs, and the softmax scale for other sizes than those of training."""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracle import qkv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reattend.attn_processors.ops import halo
from reattend.attn_processors.ops.cost import attention_flops, dense_flops, visited_keys
from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.local import PatternUnavailable, choose, explain, local_attention, sdpa
from reattend.attn_processors.ops.patterns import Dense, Disc, TileWindow
from reattend.attn_processors.ops.pool import Pool
from reattend.attn_processors.ops.scale import softmax_scale


def test_auto_takes_what_pays_off():
    assert choose(TokenLayout(8, 8), Disc(12)) == "dense"
    assert choose(TokenLayout(16, 16), Disc(8)) == "reference"
    assert choose(TokenLayout(128, 128), Disc(8)) == "halo"
    assert choose(TokenLayout(128, 128, 512), Disc(8), device="cuda") == "halo"
    assert choose(TokenLayout(128, 128), TileWindow()) == "tile"
    assert choose(TokenLayout(130, 130), Disc(100)) == "halo"  # too large for a mask


@pytest.mark.parametrize(
    ("backend", "layout", "pattern", "settings", "reason"),
    [
        ("reference", TokenLayout(129, 128), Disc(8), {}, "at most 16384"),
        ("dense", TokenLayout(16, 16), Disc(8), {}, "does not cover"),
        ("tile", TokenLayout(16, 16), Disc(8), {}, "whole tiles"),
        ("flex", TokenLayout(16, 16), TileWindow(), {}, "Disc and Square"),
        ("flex", TokenLayout(16, 16), Disc(8), {"needs_grad": True}, "no gradient"),
        ("flex", TokenLayout(16, 16), Disc(8), {"device": "mps"}, "CUDA"),
        ("flex", TokenLayout(16, 16), Disc(8), {"dtype": torch.float64}, "float64"),
    ],
)
def test_a_backend_asked_for_by_name_says_why_it_cannot_run(backend, layout, pattern, settings, reason):
    with pytest.raises(PatternUnavailable, match=f"{backend}.*{reason}"):
        choose(layout, pattern, backend=backend, **settings)


def test_explain_names_the_choice_and_what_speaks_against_the_others():
    text = explain(TokenLayout(129, 128), Disc(8))
    assert "-> halo: multiplies" in text and "  tile: it needs whole tiles" in text and "at most 16384" in text
    assert "-> dense" in explain(TokenLayout(8, 8), Dense())


def test_wrong_shapes_and_names_are_refused():
    layout = TokenLayout(4, 5, before=2)
    q, k, v = qkv(layout)
    with pytest.raises(ValueError, match=r"q must have shape \(B, 22, h, d\)"):
        local_attention(q[:, 1:], k, v, layout, Disc(2))
    with pytest.raises(ValueError, match="divides that of q"):
        local_attention(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), layout, Disc(2))
    with pytest.raises(ValueError, match="key_valid must be bool"):
        local_attention(q, k, v, layout, Disc(2), key_valid=torch.ones(1, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match="no such backend"):
        local_attention(q, k, v, layout, Disc(2), backend="cuda")


def measured_flops(layout, pattern, pool=None, width=8):
    """Counted without computing; the fused kernels would be counted as nothing."""
    q, k, v = (torch.empty(1, layout.tokens, 1, width, device="meta") for _ in range(3))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        plan = halo.plan_tiles(layout, pattern, (16, 16), pool, q.device, q.dtype)
        if pool is not None:
            k, v = (torch.empty(1, layout.tokens + pool.keys(layout), 1, width, device="meta") for _ in range(2))
        halo.attend_tiles(q[:, layout.grid], k, v, plan, scale=1.0, softmax=sdpa)
    return counter.get_total_flops()


@pytest.mark.parametrize("pool", [None, Pool(4)], ids=str)
def test_operations_per_token_do_not_grow_with_the_picture(pool):
    pattern = Disc(8)
    per_token = {side: measured_flops(TokenLayout(side, side), pattern, pool) / side**2 for side in (32, 64, 128, 256)}
    pooled = {side: pool.keys(TokenLayout(side, side)) if pool else 0 for side in per_token}
    grid_only = {side: cost - 4 * 8 * pooled[side] for side, cost in per_token.items()}
    assert grid_only[32] < grid_only[64] < grid_only[128] < grid_only[256] < 1.1 * grid_only[128]
    assert pooled[256] == pooled[128] and per_token[256] < 1.1 * per_token[128]
    interior = 4 * 8 * visited_keys(TokenLayout(1024, 1024), pattern, "halo", "cuda")
    assert grid_only[256] < 1.02 * interior  # padding to multiples of eight included


@pytest.mark.parametrize("layout", [TokenLayout(64, 64), TokenLayout(37, 90, 5)], ids=str)
def test_predicted_operations_are_the_counted_ones(layout):
    predicted = attention_flops(layout, Disc(8), "halo", 8, device="cuda")
    counted = measured_flops(layout, Disc(8)) + 4 * 8 * layout.global_tokens * layout.tokens
    assert predicted <= counted <= 1.02 * predicted  # padding
    assert attention_flops(layout, Dense(), "dense", 8) == dense_flops(layout, 8)


@pytest.mark.parametrize(
    ("side", "useful", "visited"),
    [(64, (173, 634, 1974), (880, 1360, 2912)), (128, (183, 711, 2557), (1012, 1628, 4216))],
)
def test_visited_keys_are_those_of_the_cost_model(side, useful, visited):
    layout = TokenLayout(side, side)
    for radius, pattern_keys, block_keys in zip((8, 16, 32), useful, visited, strict=True):
        assert visited_keys(layout, Disc(radius), "pattern") == pytest.approx(pattern_keys, abs=1)
        assert visited_keys(layout, Disc(radius), "flex") == pytest.approx(block_keys, abs=1)


def test_scale_rules_compare_the_keys_of_now_and_of_training():
    small, large = TokenLayout(64, 64, before=512), TokenLayout(128, 128, before=512)

    def factor(rule, layout=large, **more):
        return softmax_scale(rule, 64, layout, Disc(8), trained=small, **more) * 8

    assert factor("none") == 1
    assert factor(1.25) == 1.25
    assert factor("tokens") == pytest.approx(math.sqrt(math.log(16896) / math.log(4608)))
    assert factor("tokens_x10") == pytest.approx(math.sqrt(math.log(168960) / math.log(4608)))
    assert 1 < factor("visible") < 1.01  # fewer border tokens
    assert factor("visible", pool=Pool(4)) > 1.02
    for rule in ("tokens", "visible"):
        assert factor(rule, layout=small) == 1


def test_scale_rules_without_their_training_size_are_refused():
    with pytest.raises(ValueError, match="pass `trained`"):
        softmax_scale("tokens", 64, TokenLayout(8, 8), Disc(2))
    with pytest.raises(ValueError, match="no such scale rule"):
        softmax_scale("log", 64, TokenLayout(8, 8), Disc(2))
