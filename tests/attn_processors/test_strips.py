"""Attention over rows on several ranks equals attention on one, and sends what the split says it must."""

from __future__ import annotations

import itertools

import pytest
import torch
from lockstep import lockstep

from reattend.attn_processors.comm import Comm, split_rows
from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.local import local_attention
from reattend.attn_processors.ops.patterns import Dense, Disc, Square, TileWindow
from reattend.attn_processors.ops.pool import Pool
from reattend.attn_processors.ops.strips import Strip, strip_attention

EXACT = 1e-12  # fp64; the parts of a softmax are added in another order


def sequences(layout: TokenLayout, batch: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(batch, layout.tokens, 2, 8, generator=draw, dtype=torch.float64) for _ in range(3)]


def own(x: torch.Tensor, whole: TokenLayout, rows: tuple[int, int]) -> torch.Tensor:
    grid = x[:, whole.grid][:, rows[0] * whole.width : rows[1] * whole.width]
    return torch.cat([x[:, whole.leading], grid, x[:, whole.trailing]], dim=1)


def on_ranks(whole: TokenLayout, pattern, parts, **settings) -> list[torch.Tensor]:
    qkv = sequences(whole)
    valid = settings.pop("key_valid", None)

    def work(comm: Comm) -> torch.Tensor:
        rows = parts[comm.rank]
        mine = None if valid is None else own(valid[..., None], whole, rows)[..., 0]
        strip = Strip(comm, tuple(parts))
        return strip_attention(*(own(x, whole, rows) for x in qkv), whole, pattern, strip, key_valid=mine, **settings)

    return lockstep(len(parts), work)


def check(whole: TokenLayout, pattern, parts, **settings) -> None:
    backend = "auto" if isinstance(pattern, Dense) else "reference"
    want = local_attention(*sequences(whole), whole, pattern, backend=backend, **settings)
    got = on_ranks(whole, pattern, parts, **settings)
    for rows, part in zip(parts, got, strict=True):
        torch.testing.assert_close(part, own(want, whole, rows), atol=EXACT, rtol=0)
    texts = [torch.cat([part[:, : whole.before], part[:, part.shape[1] - whole.after :]], dim=1) for part in got]
    assert all(torch.equal(text, texts[0]) for text in texts)  # copies of the text stay equal bit for bit


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 0), (0, 3)])
@pytest.mark.parametrize("radius", [1.0, 3.5, 9.0], ids=str)
def test_discs_on_any_number_of_ranks(ranks, before, after, radius):
    whole = TokenLayout(11, 6, before=before, after=after)
    check(whole, Disc(radius), split_rows(11, ranks))


@pytest.mark.parametrize(
    "pattern", [Square(5), Square(5, "shift"), TileWindow((2, 3), 2.0), TileWindow((4, 4), 2.0), Dense()], ids=str
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_other_patterns(pattern, ranks):
    check(TokenLayout(11, 6, before=4), pattern, split_rows(11, ranks))


def test_strips_may_be_uneven_and_thinner_than_the_halo():
    check(TokenLayout(11, 6, before=4), Disc(5), [(0, 1), (1, 8), (8, 9), (9, 11)])


@pytest.mark.parametrize("pool", [Pool(2), Pool(2, budget=4), Pool(3)], ids=str)
def test_pooled_keys_are_those_of_the_whole_picture(pool):
    whole = TokenLayout(13, 7, before=4)
    block = pool.factor * pool.merged(whole)
    weights = torch.rand(pool.factor, pool.factor, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check(whole, Disc(2), split_rows(13, 2, block), pool=pool, pool_weights=weights)


def test_strips_that_cut_a_pooled_block_are_refused():
    with pytest.raises(ValueError, match="multiples"):
        on_ranks(TokenLayout(12, 6), Disc(2), [(0, 5), (5, 12)], pool=Pool(2))


def test_hidden_text_is_hidden_on_every_rank():
    whole = TokenLayout(9, 5, before=4, after=2)
    valid = torch.ones(2, whole.tokens, dtype=torch.bool)
    valid[0, 2:4] = False
    valid[1, -1] = False
    check(whole, Disc(2.5), split_rows(9, 3), key_valid=valid)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_errs_no_more_on_several_ranks_than_on_one(dtype):
    whole, parts = TokenLayout(24, 10, before=9), split_rows(24, 3)
    qkv = [x.to(dtype) for x in sequences(whole)]
    truth = local_attention(*(x.double() for x in qkv), whole, Disc(4), backend="reference")

    def work(comm: Comm) -> torch.Tensor:
        strip = Strip(comm, tuple(parts))
        return strip_attention(*(own(x, whole, parts[comm.rank]) for x in qkv), whole, Disc(4), strip)

    def error(x: torch.Tensor, rows: tuple[int, int], of: slice) -> float:
        return float((x.double() - own(truth, whole, rows))[:, of].square().mean().sqrt())

    alone = local_attention(*qkv, whole, Disc(4), backend="halo")
    text, grid = slice(0, 9), slice(9, None)
    for rows, got in zip(parts, lockstep(3, work), strict=True):
        assert got.dtype == dtype
        for of in (text, grid):
            assert error(got, rows, of) <= 1.02 * error(own(alone, whole, rows), rows, of)
        nearest = own(truth, whole, rows)[:, text].to(dtype)  # one rounding, so hardly ever another number than this
        assert (got[:, text] == nearest).float().mean() > 0.98


def test_bytes_sent_are_the_halo_and_the_merge():
    whole, parts = TokenLayout(12, 6, before=5), split_rows(12, 2)
    qkv = sequences(whole, batch=1)

    def work(comm: Comm) -> int:
        strip_attention(*(own(x, whole, parts[comm.rank]) for x in qkv), whole, Disc(3), Strip(comm, tuple(parts)))
        return comm.sent

    row = 6 * 2 * 8 * 8  # tokens x heads x channels x bytes
    text = 5 * 2 * (8 + 1) * 8  # outputs and log-sum-exps
    assert lockstep(2, work) == [2 * 2 * row + text] * 2  # K and V of R = 2 rows


@pytest.mark.parametrize(("rows", "ranks", "multiple"), [(11, 3, 1), (64, 4, 16), (13, 2, 4), (5, 5, 1)])
def test_a_split_is_whole_ordered_and_even(rows, ranks, multiple):
    parts = split_rows(rows, ranks, multiple)
    assert parts[0][0] == 0 and parts[-1][1] == rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
    assert all(first % multiple == 0 and end > first for first, end in parts)
    sizes = [end - first for first, end in parts]
    assert max(sizes) - min(sizes) <= 2 * multiple - 1


def test_more_ranks_than_rows_is_told():
    with pytest.raises(ValueError, match="at most 2"):
        split_rows(8, 3, 4)
