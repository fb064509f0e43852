"""The block-sparse kernel: blocks are skipped or full exactly where tokens say so, and its values are the oracle's."""

from __future__ import annotations

import shutil

import pytest
import torch
from attention_oracle import oracle, qkv, some_valid

from reattend.attn_processors.ops import flex
from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.local import local_attention
from reattend.attn_processors.ops.patterns import Disc, Square
from reattend.attn_processors.ops.pool import Pool

FLEX = 2e-6  # fp32


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


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout(13, 19, before=4, after=3, order="tile"),
        TokenLayout(9, 10, 130),
        TokenLayout(8, 32, before=128, after=256, order="tile"),  # nothing is gathered but pooled keys
    ],
    ids=str,
)
def test_the_mask_of_the_block_kernel_equals_the_oracle(layout, number, flex_without_compiler):
    pool, batch = ((None, 1), (Pool(4), 3), (Pool(2, budget=6), 1))[number]  # the last hits its budget
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
        assert full[:, 0].all() != hides and partial[:, 0].all() == hides  # a whole block of globals


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles CPU kernels with g++")
def test_the_compiled_block_kernel_equals_the_oracle_on_a_cpu():
    layout = TokenLayout(20, 36, before=7)
    inputs = qkv(layout, heads=1, width=16, dtype=torch.float32)
    got = local_attention(*inputs, layout, Disc(5), backend="flex")
    want = oracle(*(x.double() for x in inputs), layout, Disc(5))
    torch.testing.assert_close(got.double(), want, atol=FLEX, rtol=0)
