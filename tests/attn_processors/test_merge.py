"""Token merging equals its one-hot reference, on every grid, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reattend.attn_processors.ops.merge import cell_grid, match, match_reference, merge_matrix, split_tokens

# (grid, cell): divisible, ragged in one or both axes, strips, smaller than a cell, every token its own cell
CASES = [
    ((4, 8), (2, 2)),
    ((5, 7), (2, 2)),
    ((9, 6), (4, 4)),
    ((1, 13), (2, 4)),
    ((13, 1), (4, 2)),
    ((3, 2), (4, 4)),
    ((1, 1), (2, 2)),
    ((3, 5), (1, 1)),
]
cases = pytest.mark.parametrize(("grid", "cell"), CASES, ids=lambda pair: "x".join(map(str, pair)))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}  # bf16: one rounding to 8 bits
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
cells = st.tuples(st.integers(1, 5), st.integers(1, 5))


def tokens(grid: tuple[int, int], batch: int = 1, channels: int = 6, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], channels, generator=generator, dtype=torch.float64).to(dtype)


def picks(grid: tuple[int, int], cell: tuple[int, int], seed: int):
    sy, sx, rows, columns = cell_grid(grid, cell)
    return torch.randint(sy * sx, (rows * columns,), generator=torch.Generator().manual_seed(seed))


def some_amounts(sources: int) -> list[int]:
    return sorted({0, min(1, sources), sources // 2, sources})


@settings(max_examples=80, deadline=None)
@given(grid=shapes, cell=cells, seed=st.none() | st.integers(0, 99))
def test_sources_and_destinations_split_the_grid_with_one_destination_per_cell(grid, cell, seed):
    source, destination = split_tokens(grid, cell, None if seed is None else picks(grid, cell, seed))
    assert sorted([*source.tolist(), *destination.tolist()]) == list(range(grid[0] * grid[1]))
    sy, sx, rows, columns = cell_grid(grid, cell)
    cell_of = [(token // grid[1] // sy, token % grid[1] // sx) for token in destination.tolist()]
    assert cell_of == [(row, column) for row in range(rows) for column in range(columns)]


def test_picks_choose_the_destination_inside_its_cell():
    _, destination = split_tokens((4, 6), (2, 3), torch.tensor([0, 5, 2, 3]))
    assert destination.tolist() == [0, 1 * 6 + 5, 2 * 6 + 2, 3 * 6 + 3]


def test_fixed_destinations_sit_in_the_middle_of_a_cell_and_edges_are_sources():
    source, destination = split_tokens((5, 9), (4, 4))
    assert destination.tolist() == [2 * 9 + 2, 2 * 9 + 6]
    assert {8, 17, 26, 35, *range(36, 45)} <= set(source.tolist())


@cases
@pytest.mark.parametrize("batch", [1, 3])
def test_matching_equals_the_reference(grid, cell, batch):
    x = tokens(grid, batch)
    split = split_tokens(grid, cell, picks(grid, cell, seed=3))
    got, want = match(x, *split), match_reference(x, *split)
    assert torch.equal(got.best, want.best)
    assert torch.equal(got.order, want.order)


def test_matching_in_small_blocks_equals_matching_at_once():
    x = tokens((9, 11), batch=3)
    split = split_tokens((9, 11), (2, 2))
    at_once, row_by_row = match(x, *split), match(x, *split, block_bytes=1)
    assert torch.equal(at_once.best, row_by_row.best)
    assert torch.equal(at_once.order, row_by_row.order)


def test_zero_tokens_are_matched_without_nan():
    matching = match(torch.zeros(1, 16, 4), *split_tokens((4, 4), (2, 2)))
    assert sorted(matching.order[0].tolist()) == list(range(12))
    assert matching.best.max() < 4


@cases
@pytest.mark.parametrize("batch", [1, 3])
def test_merge_and_unmerge_equal_the_one_hot_reference_in_values_and_gradients(grid, cell, batch):
    x = tokens(grid, batch).requires_grad_()
    matching = match(x, *split_tokens(grid, cell))
    for m in some_amounts(matching.source.shape[0]):
        groups, matrix = matching.groups(m), merge_matrix(matching, m)
        fast = groups.merge(x)
        slow = (matrix / matrix.sum(dim=-1, keepdim=True)) @ x
        torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
        back, back_slow = groups.unmerge(fast.sin()), matrix.transpose(1, 2) @ slow.sin()
        torch.testing.assert_close(back, back_slow, atol=1e-12, rtol=0)
        weight = tokens(grid, batch, seed=1)
        (got,) = torch.autograd.grad((back * weight).sum(), x)
        (want,) = torch.autograd.grad((back_slow * weight).sum(), x)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_merging_sums_in_at_least_single_precision(dtype):
    x = tokens((8, 8), dtype=dtype)
    matching = match(x, *split_tokens((8, 8), (4, 4)))
    matrix = merge_matrix(matching, 48)
    want = (matrix / matrix.sum(dim=-1, keepdim=True)) @ x.double()
    got = matching.groups(48).merge(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(grid=shapes, cell=cells, share=st.floats(0, 1), batch=st.sampled_from([1, 3]))
def test_merge_weights_sum_to_the_size_of_each_group(grid, cell, share, batch):
    x = tokens(grid, batch)
    matching = match(x, *split_tokens(grid, cell))
    m = int(share * matching.source.shape[0])
    groups, matrix = matching.groups(m), merge_matrix(matching, m)
    assert groups.tokens == grid[0] * grid[1] - m == matrix.shape[1]
    assert torch.equal(groups.sizes.double(), matrix.sum(dim=-1))
    assert groups.sizes.sum(dim=-1).tolist() == [grid[0] * grid[1]] * batch
    ones = torch.ones_like(x)
    torch.testing.assert_close(groups.merge(ones), ones[:, : groups.tokens], atol=1e-15, rtol=0)


@cases
def test_merging_nothing_and_unmerging_is_the_identity_bit_for_bit(grid, cell):
    x = tokens(grid, batch=3, dtype=torch.float32)
    groups = match(x, *split_tokens(grid, cell)).groups(0)
    assert torch.equal(groups.unmerge(groups.merge(x)), x)


def test_a_merged_source_takes_its_destinations_value_and_the_most_alike_go_first():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.1, 1.0], [1.0, 0.2], [0.0, 3.0]]])
    # destinations are tokens 0 and 1 of a 1 x 6 grid; the likeness of 2..5 is 0.8, 0.995, 0.981, 1.0
    matching = match(x, torch.tensor([2, 3, 4, 5]), torch.tensor([0, 1]))
    assert matching.best.tolist() == [[1, 1, 0, 1]]
    assert matching.order.tolist() == [[3, 1, 2, 0]]
    groups = matching.groups(2)  # tokens 5 and 3 join token 1
    assert groups.kept.tolist() == [[4, 2]]
    assert groups.sizes.tolist() == [[1, 1, 1, 3]]
    torch.testing.assert_close(groups.merge(x)[0, 3], (x[0, 1] + x[0, 3] + x[0, 5]) / 3)
    assert groups.unmerge(torch.arange(4.0).view(1, 4, 1)).flatten().tolist() == [2, 3, 1, 3, 0, 3]


def test_permuting_the_batch_permutes_the_result():
    x = tokens((6, 10), batch=3)
    split = split_tokens((6, 10), (4, 4))

    def merged(samples):
        groups = match(samples, *split).groups(20)
        return groups.unmerge(groups.merge(samples).cos())

    turn = torch.tensor([2, 0, 1])
    torch.testing.assert_close(merged(x[turn]), merged(x)[turn], atol=1e-12, rtol=0)
    torch.testing.assert_close(merged(x[1:2]), merged(x)[1:2], atol=1e-12, rtol=0)


def test_merging_has_gradients_and_matching_has_none():
    x = tokens((4, 6), channels=3).requires_grad_()
    groups = match(x, *split_tokens((4, 6), (2, 2))).groups(9)
    assert not groups.slot.requires_grad
    assert torch.autograd.gradcheck(lambda y: groups.unmerge(groups.merge(y).tanh()), (x,))


def test_amounts_beyond_the_sources_merge_every_source():
    matching = match(tokens((4, 4)), *split_tokens((4, 4), (2, 2)))
    assert matching.groups(99).tokens == 4


def test_merging_traces_into_one_graph():
    def roundtrip(x):
        groups = match(x, *split_tokens((6, 7), (2, 2))).groups(12)
        return groups.unmerge(groups.merge(x).cos())

    x = tokens((6, 7), batch=2, dtype=torch.float32)
    compiled = torch.compile(roundtrip, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), roundtrip(x))
