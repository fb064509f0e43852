"""Softmax over keys in parts is softmax over all of them."""

from __future__ import annotations

import math

import pytest
import torch

from reattend.attn_processors.ops import parts
from reattend.attn_processors.ops.local import sdpa
from reattend.attn_processors.ops.parts import attend_part, merge_parts

EXACT = 1e-12  # fp64, other order of sums


def qkv(keys: int = 42, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 2, 8, generator=draw, dtype=torch.float64).to(dtype) for n in (9, keys, keys)]


@pytest.mark.parametrize("budget", [2000, 4000, 10**9], ids=str)
def test_parts_merge_to_the_whole_in_blocks_of_any_size(budget, monkeypatch):
    monkeypatch.setattr(parts, "SCORE_BYTES", budget)
    q, k, v = qkv()
    valid = torch.rand(2, 42, generator=torch.Generator().manual_seed(0)) < 0.7
    valid[:, :10] = False  # a part without a key
    some = [attend_part(q, k[:, s], v[:, s], scale=0.5, key_valid=valid[:, s]) for s in (slice(0, 10), slice(10, 42))]
    assert (some[0][0] == 0).all() and (some[0][1] == -math.inf).all()
    merged, lse = merge_parts(some)
    mask = torch.zeros(2, 1, 1, 42, dtype=q.dtype).masked_fill(~valid[:, None, None], -math.inf)
    torch.testing.assert_close(merged, sdpa(q, k, v, scale=0.5, mask=mask), atol=EXACT, rtol=0)
    logits = torch.einsum("bmhd,bkhd->bmhk", q, k) * 0.5 + mask
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=EXACT, rtol=0)


def test_no_key_at_all_is_zero_and_not_nan():
    q, k, v = qkv()
    none = attend_part(q, k, v, scale=1.0, key_valid=torch.zeros(2, 42, dtype=torch.bool))
    out, lse = merge_parts([none, none])
    assert (out == 0).all() and (lse == -math.inf).all()


def test_parts_of_half_precision_stay_in_full_precision_and_copy_few_keys_at_once(monkeypatch):
    monkeypatch.setattr(parts, "SCORE_BYTES", 4000)
    q, k, v = qkv(keys=500, dtype=torch.bfloat16)
    copied = []
    whole = torch.Tensor.to

    def to(x, *args, **kwargs):
        copied.append(x.shape[1])
        return whole(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    out, lse = attend_part(q, k, v, scale=0.35)
    assert out.dtype == lse.dtype == torch.float32
    assert max(copied) < 50
    monkeypatch.undo()
    want = sdpa(*(x.double() for x in (q, k, v)), scale=0.35)
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=0)  # fp32 sums of exact 16-bit inputs


def test_gradients_pass_through_the_merge(monkeypatch):
    monkeypatch.setattr(parts, "SCORE_BYTES", 2000)
    q, k, v = (x[:, :7].requires_grad_() for x in qkv())
    assert torch.autograd.gradcheck(lambda *x: attend_part(*x, scale=0.4), (q, k, v), fast_mode=True)
