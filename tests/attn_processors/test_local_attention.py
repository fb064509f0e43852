"""Every backend of local attention equals softmax with the mask written out, at a cost that grows with the tokens."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reattend.attn_processors.ops import flex, halo, local
from reattend.attn_processors.ops.cost import attention_flops, dense_flops, visited_keys
from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.local import (
    PatternUnavailable,
    choose,
    explain,
    local_attention,
    sdpa,
)
from reattend.attn_processors.ops.patterns import Dense, Disc, Square, TileWindow
from reattend.attn_processors.ops.pool import Pool, pool_bias, pool_grid
from reattend.attn_processors.ops.scale import mean_keys, softmax_scale

EXACT = 1e-12  # fp64, other order of sums
FLEX = 2e-6  # fp32

LAYOUTS = [
    TokenLayout(12, 16),
    TokenLayout(13, 19, before=7),
    TokenLayout(13, 19, before=4, after=3, order="tile"),
    TokenLayout(17, 11, after=77, order="tile"),
    TokenLayout(9, 10, before=512),
    TokenLayout(3, 4, before=7),
    TokenLayout(1, 45, before=7),
    TokenLayout(45, 1, after=7, order="tile"),
]
PATTERNS = [Disc(3), Disc(4.5), Square(5), Square(5, "shift"), TileWindow((3, 4), 2)]
POOLS = [None, Pool(4), Pool(2, budget=6)]  # the last hits its budget


@pytest.fixture
def small_tiles(monkeypatch):
    """Many groups of tiles and several chunks, even on small grids."""
    monkeypatch.setattr(local, "default_side", lambda *_: 4)
    monkeypatch.setitem(halo.CHUNK_BYTES, "cpu", 40_000)


@pytest.fixture
def flex_without_compiler(monkeypatch):
    flex._kernel.cache_clear()

    def run(q, k, v, mask, score, scale):
        return flex.flex_attention(q, k, v, score_mod=score, block_mask=mask, scale=scale)

    monkeypatch.setattr(flex, "_compiled", lambda: run)
    yield
    flex._kernel.cache_clear()


def qkv(layout, batch=1, heads=2, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, layout.tokens, heads, width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def some_valid(layout, batch):
    """Hides some globals, other ones in each sample."""
    valid = torch.rand(batch, layout.tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    valid[:, layout.grid] = True
    return valid


def oracle(q, k, v, layout, pattern, pool=None, weights=None, valid=None):
    """Softmax over the visible keys, from `visible` and `pool_grid` alone: no code of the backends."""
    rows = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    rows[layout.grid, layout.grid] = pattern.visible(layout)
    rows = rows.expand(q.shape[0], -1, -1).clone()
    if valid is not None:
        rows &= valid[:, None]
    bias = torch.zeros(rows.shape, dtype=q.dtype).masked_fill(~rows, -math.inf)
    if pool is not None:
        k, v = (torch.cat([x, pool_grid(x, layout, pool, weights)], dim=1) for x in (k, v))
        weight = pool_bias(layout, pool)
        extra = torch.full((*rows.shape[:2], pool.keys(layout)), -math.inf, dtype=q.dtype)
        extra[:, layout.grid] = 0 if weight is None else weight.to(q.dtype)
        bias = torch.cat([bias, extra], dim=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5 + bias[:, None]
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(dim=-1), v)


def backends(pattern):
    return ["reference", "halo"] + (["tile"] if isinstance(pattern, TileWindow) else [])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_and_gradients_equal_the_oracle(layout, pattern, small_tiles):
    for number, pool in enumerate(POOLS):
        batch = 3 if number == 1 else 1
        valid = some_valid(layout, batch) if number else None
        inputs = [x.requires_grad_() for x in qkv(layout, batch)]
        weight = qkv(layout, batch, seed=1)[0]
        want = oracle(*inputs, layout, pattern, pool, valid=valid)
        want_grads = torch.autograd.grad((want * weight).sum(), inputs)
        for backend in backends(pattern):
            got = local_attention(*inputs, layout, pattern, pool=pool, key_valid=valid, backend=backend)
            grads = torch.autograd.grad((got * weight).sum(), inputs)
            with torch.no_grad():
                quiet = local_attention(*inputs, layout, pattern, pool=pool, key_valid=valid, backend=backend)
            assert torch.equal(got, quiet)
            for name, a, b in zip(["out", "dq", "dk", "dv"], [got, *grads], [want, *want_grads], strict=True):
                label = f"{backend}, {pool}: {name}"
                torch.testing.assert_close(a, b, atol=EXACT, rtol=0, msg=lambda text, label=label: f"{label}: {text}")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 3), st.floats(1, 12), st.integers(1, 9), st.booleans())
def test_halo_is_exact_on_any_grid_with_any_tile(height, width, text, radius, side, tiled):
    layout = TokenLayout(height, width, before=text, order="tile" if tiled else "raster")
    q, k, v = qkv(layout, heads=1)
    plan = halo.plan_tiles(layout, Disc(radius), (side, side + 1), None, q.device, q.dtype)
    got = halo.attend_tiles(q[:, layout.grid], k, v, plan, scale=0.5, softmax=sdpa)
    torch.testing.assert_close(got, oracle(q, k, v, layout, Disc(radius))[:, layout.grid], atol=EXACT, rtol=0)


@pytest.mark.parametrize("backend", ["halo", "tile"])
def test_gradients_pass_gradcheck_with_globals_and_pooled_keys(backend, monkeypatch):
    monkeypatch.setattr(local, "default_side", lambda *_: 3)
    layout, pool = TokenLayout(5, 6, before=1, after=1), Pool(2, budget=4)
    pattern = TileWindow((2, 3), 2) if backend == "tile" else Disc(2.5)
    inputs = [x.requires_grad_() for x in qkv(layout, heads=1, width=2)]
    weights = (torch.rand(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.2).requires_grad_()

    def call(q, k, v, weights):
        return local_attention(q, k, v, layout, pattern, pool=pool, pool_weights=weights, backend=backend)

    assert torch.autograd.gradcheck(call, (*inputs, weights), fast_mode=True)


def test_recomputing_chunks_gives_the_gradients_of_keeping_them(small_tiles, monkeypatch):
    layout = TokenLayout(13, 19, before=5)
    inputs = [x.requires_grad_() for x in qkv(layout, batch=2)]

    def gradients():
        out = local_attention(*inputs, layout, Disc(4), backend="halo")
        return torch.autograd.grad(out.square().sum(), inputs)

    recomputed, again = gradients(), gradients()
    monkeypatch.setattr(halo._Recomputed, "apply", halo._forward)
    for first, second, kept in zip(recomputed, again, gradients(), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, kept, atol=EXACT, rtol=0)


def test_both_orders_of_tokens_give_the_same_picture(small_tiles):
    raster, tiled = TokenLayout(21, 37, before=3), TokenLayout(21, 37, before=3, order="tile")
    index = torch.cat([torch.arange(3), 3 + tiled.raster()])
    inputs = qkv(raster)
    for pattern in (Disc(4), TileWindow((4, 8), 3)):
        want = local_attention(*inputs, raster, pattern, pool=Pool(4))
        got = local_attention(*(x[:, index] for x in inputs), tiled, pattern, pool=Pool(4))
        torch.testing.assert_close(got, want[:, index], atol=EXACT, rtol=0)


def test_a_token_outside_the_radius_changes_nothing_and_one_inside_does(small_tiles):
    layout = TokenLayout(12, 15, before=2)
    q, k, v = qkv(layout)
    before = local_attention(q, k, v, layout, Disc(3), backend="halo")
    source = 2 + 5 * 15 + 7
    k, v = k.clone(), v.clone()
    k[:, source] += 1
    v[:, source] -= 1
    moved = (local_attention(q, k, v, layout, Disc(3), backend="halo") != before).any(dim=(0, 2, 3))
    assert torch.equal(moved[layout.grid], Disc(3).visible(layout)[:, 5 * 15 + 7])
    assert moved[layout.leading].all()


@pytest.mark.parametrize("backend", ["halo", "tile", "reference", "dense"])
def test_hidden_globals_are_as_good_as_absent(backend, small_tiles):
    pattern = {"tile": TileWindow((4, 4), 2), "dense": Dense()}.get(backend, Disc(3))
    full, less = TokenLayout(9, 11, before=5, after=4), TokenLayout(9, 11, before=3, after=2)
    kept = torch.cat([torch.arange(3), 5 + torch.arange(99), 106 + torch.arange(2)])
    valid = torch.zeros(2, full.tokens, dtype=torch.bool)
    valid[:, kept] = True
    q, k, v = qkv(full, batch=2)
    got = local_attention(q, k * (1 + 99 * ~valid)[..., None, None], v, full, pattern, key_valid=valid, backend=backend)
    want = local_attention(*(x[:, kept] for x in (q, k, v)), less, pattern, backend=backend)
    torch.testing.assert_close(got[:, kept], want, atol=EXACT, rtol=0)


def test_a_pattern_that_covers_the_grid_is_dense_attention_bit_for_bit():
    layout = TokenLayout(6, 7, before=5)
    q, k, v = qkv(layout, dtype=torch.float32)
    assert torch.equal(local_attention(q, k, v, layout, Disc(20)), sdpa(q, k, v, scale=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more_than_twice_as_much_as_the_reference(dtype, small_tiles):
    layout = TokenLayout(13, 19, before=7)
    inputs = qkv(layout, width=16, dtype=dtype)
    want = oracle(*(x.double() for x in inputs), layout, Disc(4))

    def error(backend):
        return float(
            (local_attention(*inputs, layout, Disc(4), backend=backend).double() - want).square().mean().sqrt()
        )

    assert error("halo") <= 2 * error("reference")


def test_fewer_key_heads_serve_groups_of_query_heads(small_tiles):
    layout = TokenLayout(6, 9, before=2)
    q, k, v = qkv(layout, heads=4)
    few = local_attention(q, k[:, :, :2], v[:, :, :2], layout, Disc(3), backend="halo")
    want = oracle(q, *(x[:, :, [0, 0, 1, 1]] for x in (k, v)), layout, Disc(3))
    torch.testing.assert_close(few, want, atol=EXACT, rtol=0)


def test_tensors_cached_in_inference_mode_serve_training_later():
    layout = TokenLayout(7, 43, before=1)
    with torch.inference_mode():
        local_attention(*qkv(layout), layout, Disc(2.25), backend="halo")
    inputs = [x.requires_grad_() for x in qkv(layout)]
    local_attention(*inputs, layout, Disc(2.25), backend="halo").sum().backward()
    assert all(x.grad is not None for x in inputs)


def test_caches_are_bounded():
    for cached in (halo.plan_tiles, halo.visited, flex._kernel, local._reference_mask, local._automatic, mean_keys):
        assert cached.cache_info().maxsize is not None


def test_all_attention_runs_through_the_given_softmax_and_whole_tiles_without_mask(small_tiles):
    masks = []

    def recording(q, k, v, *, scale, mask=None):
        assert scale == 0.3
        masks.append(mask)
        return sdpa(q, k, v, scale=scale, mask=mask)

    layout = TokenLayout(12, 16, before=3)
    local_attention(*qkv(layout), layout, TileWindow((4, 4), 2), scale=0.3, backend="tile", softmax=recording)
    assert len(masks) > 2 and all(mask is None for mask in masks)
    masks.clear()
    local_attention(*qkv(layout), layout, Disc(3), scale=0.3, backend="halo", softmax=recording)
    assert masks[-1] is None  # global queries
    assert all(mask.ndim == 4 and mask.shape[-1] % halo.ALIGN == 0 for mask in masks[:-1])


# Cost


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


# Choice


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


# Block-sparse kernel


@pytest.mark.parametrize("pattern", [Disc(3), Disc(9.5), Square(7), Square(7, "shift"), Square(31, "shift")], ids=str)
@pytest.mark.parametrize("shape", [(16, 32), (21, 37), (3, 150), (1, 300), (50, 5)], ids=str)
def test_blocks_are_skipped_or_full_exactly_where_tokens_say_so(shape, pattern):
    layout = TokenLayout(*shape)
    rows, columns = flex.block_tile(layout)
    assert rows * columns <= flex.BLOCK
    place = layout.coordinates()
    across = -(-layout.width // columns)
    number = place[:, 0].div(rows, rounding_mode="floor") * across + place[:, 1].div(columns, rounding_mode="floor")
    tiles = int(number.max()) + 1
    member = torch.nn.functional.one_hot(number, tiles).double()
    seen = member.T @ pattern.visible(layout).double() @ member
    touched, full = flex.classify(layout, pattern)
    sizes = member.sum(dim=0)
    assert torch.equal(touched, seen > 0)
    assert torch.equal(full, seen == sizes[:, None] * sizes)


@pytest.mark.parametrize(
    ("side", "useful", "visited"),
    [(64, (173, 634, 1974), (880, 1360, 2912)), (128, (183, 711, 2557), (1012, 1628, 4216))],
)
def test_visited_keys_are_those_of_the_cost_model(side, useful, visited):
    layout = TokenLayout(side, side)
    for radius, pattern_keys, block_keys in zip((8, 16, 32), useful, visited, strict=True):
        assert visited_keys(layout, Disc(radius), "pattern") == pytest.approx(pattern_keys, abs=1)
        assert visited_keys(layout, Disc(radius), "flex") == pytest.approx(block_keys, abs=1)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("layout", [LAYOUTS[2], TokenLayout(9, 10, 130)], ids=str)
def test_the_mask_of_the_block_kernel_equals_the_oracle(layout, number, flex_without_compiler):
    pool, batch = POOLS[number], (1, 3, 1)[number]
    pattern = (Disc(4), Square(5), Square(7, "shift"))[number]
    valid = some_valid(layout, batch) if number else None
    inputs = qkv(layout, batch, width=16, dtype=torch.float32)
    got = local_attention(*inputs, layout, pattern, pool=pool, key_valid=valid, backend="flex")
    want = oracle(*(x.double() for x in inputs), layout, pattern, pool, valid=valid)
    torch.testing.assert_close(got.double(), want, atol=FLEX, rtol=0)


def test_the_block_lists_leave_out_no_visible_key_and_call_full_what_needs_no_mask():
    layout, pool = TokenLayout(20, 36, before=130), Pool(4)
    for hides in (False, True):
        kernel = flex._kernel(layout, Disc(5), pool, hides, torch.device("cpu"), torch.float32, 16)
        rows, columns = (torch.arange(len(x)) for x in (kernel.queries, kernel.keys))
        allowed = kernel.mask.mask_mod(0, 0, rows[:, None], columns[None])
        blocks = allowed.view(len(rows) // 128, 128, len(columns) // 128, 128).double().sum(dim=(1, 3))
        partial, full = torch.zeros(2, *blocks.shape, dtype=torch.bool)
        for marks, count, index in (
            (partial, kernel.mask.kv_num_blocks, kernel.mask.kv_indices),
            (full, kernel.mask.full_kv_num_blocks, kernel.mask.full_kv_indices),
        ):
            for row, n in enumerate(count[0, 0].tolist()):
                marks[row, index[0, 0, row, :n].long()] = True
        assert not (partial & full).any()
        assert torch.equal(partial | full, blocks > 0)
        assert (blocks[full] == 128 * 128).all()
        assert full[:, 9].all() != hides and partial[:, 9].all() == hides  # a whole block of globals


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles CPU kernels with g++")
def test_the_compiled_block_kernel_equals_the_oracle_on_a_cpu():
    layout = TokenLayout(20, 36, before=7)
    inputs = qkv(layout, heads=1, width=16, dtype=torch.float32)
    got = local_attention(*inputs, layout, Disc(5), backend="flex")
    want = oracle(*(x.double() for x in inputs), layout, Disc(5))
    torch.testing.assert_close(got.double(), want, atol=FLEX, rtol=0)


# Softmax scale


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
