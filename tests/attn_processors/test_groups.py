"""Grouped isolation attention against the masked softmax, and that one against explicit loops."""

from __future__ import annotations

import pytest
import torch
from plain_attention import EXACT, SCALE, softmax, tokens

from reattend.attn_processors.ops.groups import Extra, dense_reference, grouped_attention, isolation_groups


def ir_oracle(q, k, v, owner, extra, isolate=True, reading=None):
    """One query, one key at a time."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                seen = []
                for subject, several in extra.items():
                    if owner[i] >> subject & 1 and (reading is None or reading[i]):
                        for one in several:
                            for j in range(one.k.shape[1]):
                                seen.append((float(q[b, i, h] @ one.k[b, j, h]) * SCALE + one.bias, one.v[b, j, h]))
                for j in range(k.shape[1]):
                    hidden = isolate and owner[i] != 0 and owner[j] != 0 and not int(owner[i]) & int(owner[j])
                    if not hidden:
                        seen.append((float(q[b, i, h] @ k[b, j, h]) * SCALE, v[b, j, h]))
                weights = torch.tensor([logit for logit, _ in seen], dtype=torch.float64).softmax(0)
                out[b, i, h] = sum(w * value for w, (_, value) in zip(weights, seen, strict=True))
    return out


OWNERS = {
    "random": lambda n, draw: torch.tensor([0, 1, 2, 4])[torch.randint(4, (n,), generator=draw)],
    "overlapping": lambda n, draw: torch.randint(8, (n,), generator=draw),
    "no background": lambda n, draw: 1 + torch.randint(2, (n,), generator=draw),
    "one-token groups": lambda n, draw: torch.cat([torch.tensor([1, 2]), torch.zeros(n - 2, dtype=torch.int64)]),
    "only background": lambda n, draw: torch.zeros(n, dtype=torch.int64),
    "one subject everywhere": lambda n, draw: torch.ones(n, dtype=torch.int64),
}


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("who", OWNERS)
@pytest.mark.parametrize("length", [6, 13])
def test_grouped_equals_dense_equals_oracle(who, length, isolate):
    draw = torch.Generator().manual_seed(length)
    owner = OWNERS[who](length, draw)
    reading = torch.rand(length, generator=draw) < 0.6
    q, k, v = tokens(length)
    extra = {
        0: [Extra(*tokens(3, seed=1)[1:], 0.0), Extra(*tokens(1, seed=2)[1:], -0.7)],
        2: [Extra(*tokens(4, seed=3)[1:], 1.3)],
    }
    groups = isolation_groups(owner, isolate=isolate, reading=reading, referred=0b101)
    got = grouped_attention(q, k, v, groups, extra, softmax)
    dense = dense_reference(q, k, v, owner, extra, scale=SCALE, isolate=isolate, reading=reading)
    torch.testing.assert_close(got, dense, atol=EXACT, rtol=0)
    torch.testing.assert_close(dense, ir_oracle(q, k, v, owner, extra, isolate, reading), atol=EXACT, rtol=0)


def test_keys_that_are_not_valid_are_seen_by_nobody():
    owner, (q, k, v) = torch.tensor([1, 0, 2, 1, 0]), tokens(5)
    valid = torch.tensor([[True, True, True, True, False], [True] * 5])
    extra = {1: [Extra(*tokens(2, seed=1)[1:], 0.4)]}
    got = grouped_attention(q, k, v, isolation_groups(owner, referred=2), extra, softmax, valid)
    want = dense_reference(q, k, v, owner, extra, scale=SCALE, valid=valid)
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_no_mask_is_made_where_no_bias_is_asked_for():
    def unmasked(q, k, v, mask=None):
        assert mask is None
        return softmax(q, k, v)

    owner, (q, k, v) = torch.tensor([1, 0, 2, 1]), tokens(4)
    grouped_attention(q, k, v, isolation_groups(owner, referred=1), {0: [Extra(k[:, :2], v[:, :2])]}, unmasked)


def test_an_isolated_subject_does_not_see_another_one_and_the_background_sees_both():
    owner, (q, k, v) = torch.tensor([1, 1, 2, 2, 0]), tokens(5)
    groups = isolation_groups(owner)
    before = grouped_attention(q, k, v, groups, {}, softmax)
    k, v = k.clone(), v.clone()
    k[:, 2:4] += 5
    v[:, 2:4] -= 3
    after = grouped_attention(q, k, v, groups, {}, softmax)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2:4], after[:, 2:4])
    assert not torch.equal(before[:, 4], after[:, 4])


def test_what_an_output_is_made_of_can_be_read_off():
    """Values that are the code of their owner: no mass from the other subject, and the predicted share of the reference."""
    owner, (q, k, _) = torch.tensor([1, 1, 2, 2, 2, 0]), tokens(6, width=4)
    code = torch.eye(4, dtype=torch.float64)[owner]  # 0 background, 1 and 2 subjects, 3 the reference
    v = code[None, :, None].expand(2, -1, 2, -1)
    reference = Extra(tokens(3, width=4, seed=5)[1], torch.eye(4, dtype=torch.float64)[3].expand(2, 3, 2, 4), 0.3)
    out = grouped_attention(q, k, v, isolation_groups(owner, referred=1), {0: [reference]}, softmax)
    assert (out[:, :2, :, 2] == 0).all()
    assert (out[:, 2:5, :, 1] == 0).all() and (out[:, 2:, :, 3] == 0).all()
    logits = torch.einsum("b q h d, b k h d -> b q h k", q, torch.cat([reference.k, k], 1)) * SCALE
    logits[..., :3] += 0.3
    logits[:, :, :, 3:][..., owner == 2] = float("-inf")
    torch.testing.assert_close(out[:, :2, :, 3], logits.softmax(-1)[:, :2, :, :3].sum(-1), atol=EXACT, rtol=0)


def test_without_references_one_subject_has_nothing_to_be_kept_from():
    (group_a, group_b) = isolation_groups(torch.tensor([1, 0, 1]))
    assert group_a.keys is None and group_b.keys is None
