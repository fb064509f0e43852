"""Frame sets by brute force; the fast attention against the one written for reading; norms of parts against the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reattend.attn_processors.ops import scopes as scopes_file
from reattend.attn_processors.ops.norms import film_statistics, frame_statistics, normalise
from reattend.attn_processors.ops.positions import SlotTables, far_slots, near_slots, own_slots, slot, slot_tables
from reattend.attn_processors.ops.scopes import Scopes, midpoints, scoped_attention, scoped_reference

EXACT = 2e-6  # fp32: the same sums in another order
BIASES = [(0.0, 0.0), (0.0, 10.0), (10.0, 0.0), (0.0, 1e4)]


def qkv(frames: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(frames)
    return [torch.randn(3, frames, 2, 8, generator=draw).to(dtype) for _ in range(3)]


def tables(scopes: Scopes) -> SlotTables:
    draw = torch.Generator().manual_seed(1)
    slots = min(scopes.length, scopes.frames)
    return SlotTables(*(torch.randn(slots, 2, 8, generator=draw) for _ in range(2)))


def in_parts(q, k, v, scopes, parts, **more) -> torch.Tensor:
    """What ranks with these frames would compute."""
    out = []
    for own in parts:
        a, b = scopes.reach(own)
        anchors = list(scopes.anchors)
        near, far = (k[:, a:b], v[:, a:b]), (k[:, anchors], v[:, anchors])
        out.append(scoped_attention(q[:, own[0] : own[1]], near, far, scopes, own, **more))
    return torch.cat(out, dim=1)


def test_windows_keep_their_length_inside_the_film_and_never_turn_back():
    for frames in range(1, 13):
        for length in range(1, 15):
            scopes = Scopes(frames, length, 3)
            bounds = [scopes.window(i) for i in range(frames)]
            for i, (first, end) in enumerate(bounds):
                assert 0 <= first <= i < end <= frames and end - first == min(frames, length)
            assert bounds == sorted(bounds)
            for own in [(a, b) for a in range(frames) for b in range(a + 1, frames + 1)]:
                seen = {j for i in range(*own) for j in range(*scopes.window(i))}
                assert seen == set(range(*scopes.reach(own)))


def test_anchors_lie_in_the_middle_of_equal_stretches():
    assert midpoints(100, 4) == (12, 37, 62, 87)
    assert midpoints(7, 0) == () and midpoints(7, 1) == (3,) and midpoints(3, 64) == (0, 1, 2)
    for frames in range(1, 40):
        for count in range(frames + 3):
            anchors = midpoints(frames, count)
            assert len(set(anchors)) == min(count, frames) and list(anchors) == sorted(anchors)
    assert Scopes(16, 16, 4).single and Scopes(16, 16, 4).anchors == ()
    assert Scopes(17, 16, 4).anchors == midpoints(17, 4)


def test_sharpness_has_the_published_values():
    scopes = Scopes(1000, 17, 16)
    assert scopes.seen(125) == 33
    assert scopes.sharpness(125, 16, "log") == pytest.approx(1.2611, abs=1e-4)
    assert scopes.sharpness(125, 16, "sqrt_log") == pytest.approx(1.1230, abs=1e-4)
    assert Scopes(10, 1, 0).sharpness(3, 16, "log") == 1.0  # one frame seen: nothing to sharpen
    assert scopes.sharpness(125, 16, "none") == 1.0 and math.isclose(Scopes(16, 16, 0).sharpness(3, 16, "log"), 1.0)


@pytest.mark.parametrize("placed", [False, True], ids=["plain", "places"])
@pytest.mark.parametrize("biases", BIASES, ids=str)
@pytest.mark.parametrize(
    ("frames", "length", "count"),
    [(1, 1, 0), (7, 3, 0), (7, 1, 4), (7, 16, 4), (16, 16, 16), (17, 16, 4), (33, 3, 64), (33, 16, 1), (40, 5, 7)],
)
def test_the_fast_attention_is_the_one_written_for_reading(frames, length, count, biases, placed):
    scopes = Scopes(frames, length, count)
    q, k, v = qkv(frames)
    more = {"scale": 8**-0.5, "biases": biases, "tables": tables(scopes) if placed else None}
    want = scoped_reference(q, k, v, scopes, **more)
    got = in_parts(q, k, v, scopes, [(0, frames)], **more)
    torch.testing.assert_close(got, want, atol=EXACT, rtol=EXACT)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 20), st.integers(0, 12), st.lists(st.integers(1, 39), max_size=4), st.booleans()
)
def test_parts_of_any_size_give_the_whole(frames, length, count, cuts, early):
    scopes = Scopes(frames, length, count)
    q, k, v = qkv(frames)
    edges = [0, *sorted({cut for cut in cuts if cut < frames}), frames]
    parts = list(itertools.pairwise(edges))
    more = {"scale": 0.4, "biases": (0.0, 10.0) if early else (10.0, 0.0), "tables": tables(scopes)}
    want = scoped_reference(q, k, v, scopes, **more)
    torch.testing.assert_close(in_parts(q, k, v, scopes, parts, **more), want, atol=EXACT, rtol=EXACT)
    assert [f for own in parts for f in scopes.anchors[slice(*scopes.anchors_in(own))]] == list(scopes.anchors)


def test_gradients_are_those_of_the_reference():
    scopes, grads = Scopes(20, 4, 3), []
    for work in (scoped_reference, lambda q, k, v, s, **more: in_parts(q, k, v, s, [(0, 7), (7, 20)], **more)):
        inputs = [x.requires_grad_() for x in qkv(20)]
        work(*inputs, scopes, scale=0.4, biases=(0.0, 3.0), tables=tables(scopes)).square().sum().backward()
        grads.append([x.grad for x in inputs])
    for name, got, want in zip("qkv", grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_only_the_difference_of_the_biases_counts_and_half_precision_survives_a_huge_one():
    scopes = Scopes(20, 4, 3)
    q, k, v = qkv(20)
    a, b = (in_parts(q, k, v, scopes, [(0, 20)], scale=0.4, biases=bias) for bias in [(0.0, 2.0), (5.0, 7.0)])
    torch.testing.assert_close(a, b, atol=EXACT, rtol=EXACT)
    half = in_parts(*qkv(20, torch.float16), scopes, [(0, 20)], scale=0.4, biases=(0.0, 1e4))
    assert half.isfinite().all()


@pytest.mark.parametrize("budget", ["SCORE_BYTES", "BLOCK_BYTES"])
def test_what_does_not_fit_the_budget_is_worked_on_in_turns(budget, monkeypatch):
    scopes, calls = Scopes(40, 5, 7), []
    attend = scopes_file._attend
    monkeypatch.setattr(scopes_file, "_attend", lambda *given: calls.append(given[0].shape) or attend(*given))
    q, k, v = qkv(40)
    want = in_parts(q, k, v, scopes, [(0, 40)], scale=0.4, tables=tables(scopes))
    assert calls == [(3, 2, 48, 8)]  # three blocks of 16 queries at once
    monkeypatch.setattr(scopes_file, budget, 1)
    got = in_parts(q, k, v, scopes, [(0, 40)], scale=0.4, tables=tables(scopes))
    assert calls[1:] == ([(1, 2, 48, 8)] * 3 if budget == "SCORE_BYTES" else [(3, 2, 16, 8)] * 2 + [(3, 2, 8, 8)])
    torch.testing.assert_close(got, want, atol=EXACT, rtol=EXACT)


def test_places_are_those_of_a_window_encoded_anew_for_every_query():
    scopes, layer = Scopes(30, 8, 5), nn.Linear(16, 16)  # with a bias, which belongs to the tokens
    project = lambda x: layer(x).unflatten(-1, (2, 8))  # noqa: E731
    draw = torch.Generator().manual_seed(0)
    places, x = torch.randn(8, 16, generator=draw), torch.randn(2, 30, 16, generator=draw)
    with torch.no_grad():
        made = slot_tables(places, project, project)
        windows = torch.tensor([scopes.window(i) for i in range(10, 13)])
        near = near_slots(torch.arange(30).expand(3, -1), windows)
        far = far_slots(torch.tensor(scopes.anchors), torch.arange(10, 13), windows)
        for row, i in enumerate(range(10, 13)):
            first, end = scopes.window(i)
            seen = [(j, near[row, j]) for j in range(first, end)] + list(zip(scopes.anchors, far[row], strict=True))
            for j, place in seen:
                assert slot(scopes, i, j) == place
                want = project(x[:, j] + places[place])
                torch.testing.assert_close(project(x[:, j]) + made.keys[place], want, atol=EXACT, rtol=EXACT)
    assert own_slots(scopes, (0, 30), torch.device("cpu")).tolist() == [0, 1, 2, *[3] * 23, 4, 5, 6, 7]


def test_anchors_are_spread_over_the_slots_on_their_side_of_the_query():
    scopes = Scopes(160, 16, 16)
    assert scopes.anchors == tuple(range(5, 160, 10))
    slots = lambda i: [slot(scopes, i, j) for j in scopes.anchors]  # noqa: E731
    assert slots(80) == [*range(7), 2, 12, *range(8, 15)]  # window from 73, two anchors in it
    assert slots(0) == [5, 15, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]  # nothing before
    assert slots(159) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 1, 11]  # nothing behind
    for frames, length, count in ((17, 16, 4), (40, 5, 7), (40, 1, 7), (33, 3, 64), (50, 8, 1)):
        scopes = Scopes(frames, length, count)
        windows = torch.tensor([scopes.window(i) for i in range(frames)])
        far = far_slots(torch.tensor(scopes.anchors), torch.arange(frames), windows)
        assert far.tolist() == [[slot(scopes, i, j) for j in scopes.anchors] for i in range(frames)]
        assert far.min() >= 0 and far.max() < length


def test_slots_are_worked_out_once_and_serve_gradients_too():
    scopes, table = Scopes(29, 8, 5), nn.Parameter(torch.zeros(8, 2))
    with torch.inference_mode():
        own = own_slots(scopes, (0, 29), torch.device("cpu"))
    assert own_slots(scopes, (0, 29), torch.device("cpu")) is own
    table[own].sum().backward()
    assert table.grad.sum() == 2 * 29


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_statistics_of_parts_are_those_of_the_whole(mean):
    x = mean + torch.randn(2, 7, 8, 3, 5, generator=torch.Generator().manual_seed(0))  # (B, F, C, H, W)
    wide = x.double().transpose(1, 2).unflatten(1, (4, 2)).flatten(2)
    frames = torch.cat([frame_statistics(part, 4) for part in x.split([1, 4, 2], dim=1)], dim=1)
    got = film_statistics(frames, 2 * 3 * 5)
    torch.testing.assert_close(got[0], wide.mean(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(got[1], wide.var(-1, correction=0), rtol=1e-9, atol=0)  # a naive E[x2] has no digit here
    whole = film_statistics(frame_statistics(x, 4), 2 * 3 * 5)
    assert torch.equal(got[0], whole[0]) and torch.equal(got[1], whole[1])


def test_normalising_parts_is_group_norm():
    norm = nn.GroupNorm(4, 8, eps=1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 7, 8, 3, 5, generator=torch.Generator().manual_seed(0)) + 3
    with torch.no_grad():
        want = norm(x.transpose(1, 2))
        mean, variance = film_statistics(frame_statistics(x, 4), 2 * 3 * 5)
        got = normalise(x.transpose(1, 2), norm, mean, variance)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        half = normalise(x.transpose(1, 2).bfloat16(), norm.bfloat16(), mean, variance)
    torch.testing.assert_close(half.float(), want, atol=5e-2, rtol=2e-2)  # 8 bits of mantissa


def test_what_is_kept_of_a_film_serves_training_too() -> None:
    torch.manual_seed(0)
    scopes, tables = Scopes(40, 8, 4), SlotTables(torch.randn(8, 2, 4), torch.randn(8, 2, 4))
    q, k, v = torch.randn(3, 1, 40, 2, 4)
    far = [x[:, list(scopes.anchors)] for x in (k, v)]
    with torch.inference_mode():
        made = scoped_attention(q, (k, v), (far[0], far[1]), scopes, (0, 40), scale=0.5, tables=tables)
    q.requires_grad_()
    again = scoped_attention(q, (k, v), (far[0], far[1]), scopes, (0, 40), scale=0.5, tables=tables)
    assert torch.equal(made, again)
    again.sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
