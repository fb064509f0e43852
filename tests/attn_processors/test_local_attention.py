"""Every backend of local attention equals softmax with the mask written out, values and gradients."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import oracle, qkv, some_valid
from hypothesis import given, settings
from hypothesis import strategies as st

from reattend.attn_processors.ops import flex, halo, local, near_far
from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.local import local_attention, sdpa
from reattend.attn_processors.ops.patterns import Dense, Disc, Square, TileWindow
from reattend.attn_processors.ops.pool import Pool
from reattend.attn_processors.ops.scale import mean_keys

EXACT = 1e-12  # fp64, other order of sums

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
            if backend == "halo" and near_far.plan_near_far(layout, pattern, 4, pool, got.device, got.dtype):
                torch.testing.assert_close(got, quiet, atol=EXACT, rtol=0)  # two sums in place of one
            else:
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
