"""Rows between ranks: everybody gets what it wants, whoever owns it, and sends what was foretold."""

from __future__ import annotations

import pytest
import torch
from forked import forked
from lockstep import ThreadComm, lockstep

from reattend.attn_processors.comm import Comm, rounds, rows_sent, split_rows

UNEVEN = {
    "one rank": [(0, 4)],
    "two": [(0, 1), (1, 6)],
    "empty ones": [(0, 0), (0, 2), (2, 2), (2, 3), (3, 3)],
    "five": [(0, 2), (2, 3), (3, 7), (7, 8), (8, 13)],
    "seven": split_rows(20, 7),
    "nothing": [(0, 0)] * 3,
}


def table(rows: int) -> torch.Tensor:
    return torch.arange(rows * 6, dtype=torch.float64).view(2, rows, 3)


@pytest.mark.parametrize("parts", UNEVEN.values(), ids=UNEVEN)
@pytest.mark.parametrize("reach", ["all", "neighbours", "the first rank only"])
def test_every_rank_gets_the_rows_it_wants_and_sends_what_was_foretold(parts, reach):
    rows, size = parts[-1][1], len(parts)
    wanted = {
        "all": [(0, rows)] * size,
        "neighbours": [(max(0, first - 2), min(rows, end + 2)) for first, end in parts],
        "the first rank only": [(0, rows)] + [(0, 0)] * (size - 1),
    }[reach]
    whole = table(rows)

    def work(comm: Comm):
        first, end = parts[comm.rank]
        return comm.collect(whole[:, first:end], parts, wanted), comm.sent

    for rank, (got, sent) in enumerate(lockstep(size, work)):
        first, end = wanted[rank]
        assert torch.equal(got, whole[:, first:end])
        assert sent == rows_sent(rank, parts, wanted) * 2 * 3 * 8


def test_what_all_want_costs_no_rank_more_when_there_are_more_of_them():
    for size in (16, 64, 256, 1024):
        owners = [(i * 16 // size, (i + 1) * 16 // size) for i in range(size)]  # 16 rows, on every so manieth rank
        sent = [rows_sent(rank, owners, [(0, 16)] * size) for rank in range(size)]
        assert max(sent) <= 16 + size.bit_length() and sum(sent) == 16 * (size - 1)  # each row reaches each rank once
        assert len(list(rounds(0, size))) == size.bit_length() - 1


def test_messages_of_a_round_are_one_each_way(monkeypatch):
    seen = []
    plain = ThreadComm._exchange

    def noted(self, messages):
        seen.append((self.rank, [way for way, _, _ in messages]))
        plain(self, messages)

    monkeypatch.setattr(ThreadComm, "_exchange", noted)
    lockstep(5, lambda comm: comm.everyones(torch.tensor([comm.rank])))
    assert sorted(seen) == [(rank, ["to", "from"]) for rank in range(5) for _ in range(3)]


def test_everyones_tensors_come_in_the_order_of_ranks():
    for size in (1, 2, 3, 6):
        made = lockstep(size, lambda comm: comm.everyones(torch.full((2,), comm.rank)))
        assert all([int(x[0]) for x in tensors] == list(range(size)) for tensors in made)


GLOO = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
from reattend.attn_processors.comm import Comm, rows_sent
comm, parts = Comm.of_group(), [(0, 2), (2, 2), (2, 7)]
whole = torch.arange(42, dtype=torch.float32).view(7, 6)
first, end = parts[comm.rank]
assert torch.equal(comm.collect(whole[first:end], parts, [(0, 7)] * 3, dim=0), whole)
assert comm.sent == rows_sent(comm.rank, parts, [(0, 7)] * 3) * 24
assert [int(x) for x in comm.everyones(torch.tensor(comm.rank))] == [0, 1, 2]
dist.destroy_process_group()
"""


def test_three_processes_get_what_threads_get():
    done = forked(3, GLOO, ["torch", "torch.distributed", "reattend.attn_processors.comm"])
    assert done.returncode == 0, done.stderr[-2000:]


TWO_JOBS = """
import torch.distributed as dist
dist.init_process_group("gloo")
from reattend.attn_processors.comm import Comm
pairs = [dist.new_group([0, 1]), dist.new_group([2])]
if dist.get_rank() == 2:
    Comm.of_group(pairs[1])  # a job of its own
for number in range(2):
    comm = Comm.of_group()
    first = comm.tell(f"trouble {number}")
    assert first == f"trouble {number}", first
    assert comm.tell("later trouble") == first
    dist.barrier()
dist.destroy_process_group()
"""


def test_words_of_trouble_are_those_of_the_job():
    done = forked(3, TWO_JOBS, ["torch", "torch.distributed", "reattend.attn_processors.comm"])
    assert done.returncode == 0, done.stderr[-2000:]


FROZEN = """
import datetime, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
from reattend.attn_processors import comm as comm_file
from reattend.attn_processors.comm import Comm, RankLost
comm_file.PATIENCE = 6.0
comm = Comm.of_group(dist.new_group(timeout=datetime.timedelta(seconds=3)))
comm.everyones(torch.tensor(comm.rank))  # all are there, and connected
if comm.rank == 1:
    time.sleep(20)
else:
    try:
        comm.everyones(torch.tensor(comm.rank))
    except RankLost as lost:
        print(f"{lost}\\n", end="", flush=True)
    time.sleep(12 if comm.rank == 0 else 0)  # it has the store
"""


def test_a_frozen_rank_is_named_by_those_who_wait_for_somebody_else():
    done = forked(5, FROZEN, ["torch", "torch.distributed", "reattend.attn_processors.comm"])
    said = done.stdout.splitlines()
    assert len(said) == 4 and done.returncode == 0, done.stderr[-2000:]
    for line in said:
        assert "in vain for rank 1 of 5" in line or ", which waits, too; no word from rank 1 (" in line
    assert any(line.startswith("rank 4 waited in vain for rank 2 of 5, which waits, too") for line in said)


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_that_brings_other_rows_than_its_own_is_told(rank):
    with pytest.raises(ValueError, match=f"rank {rank} owns rows {rank} to {rank + 1}, got 2 of them"):
        Comm(rank, 3).collect(torch.zeros(1, 2), [(0, 1), (1, 2), (2, 3)], [(0, 3)] * 3)
