"""Rows between ranks: who needs what is worked out from the split alone, so nothing has to be negotiated.

A plane of rows (of a token grid; of frames) is split into consecutive parts, one per rank. `collect` gives a rank the rows it
wants from whoever owns them: a few from its neighbours for a halo, or all of them. One rank needs nobody, and nothing is
sent. Messages go point to point, so when one fails the error names the rank it was for. Only torch is needed.

Where all ranks want all rows, an owner that told everybody would send its rows once per rank. So ranks pass on what they
were given: in each of log2(ranks) rounds, a rank gives all it has to one other rank and gets as much from another (Bruck et
al., Efficient algorithms for all-to-all communications, 1997). Then nobody sends much more than the rows there are, however
many ranks want them. Rows are only moved, so the result is the same to the last bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Comm", "RankLost", "Span", "rounds", "rows_sent", "split_rows"]

Span = tuple[int, int]  # [first, end)
TROUBLE, WAITING = "reattend/trouble", "reattend/waiting"  # begin keys in the store of the process group
PATIENCE = 2.0  # seconds; ranks that miss the same message reach their time limit almost together
_jobs: Counter[str] = Counter()  # begun so far in each process group


class RankLost(RuntimeError):
    """Another rank did not send or receive in time, or is gone."""


def split_rows(rows: int, ranks: int, multiple: int = 1) -> list[Span]:
    """Consecutive parts of `rows`, one per rank, as even as multiples of `multiple` allow.

    Raises ValueError if some rank would get none.
    """
    units = -(-rows // multiple)
    if ranks < 1 or units < ranks:
        raise ValueError(
            f"{rows} rows in units of {multiple} cannot be split over {ranks} ranks; use at most {units} of them, or a "
            "taller picture."
        )
    ends = [min(rows, (units * (rank + 1) // ranks) * multiple) for rank in range(ranks)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def rows_sent(rank: int, parts: Sequence[Span], wanted: Sequence[Span]) -> int:
    """How many rows `collect` makes a rank send, all others together."""
    if _all_for_all(parts, wanted):
        lengths = [end - first for first, end in parts]
        size = len(parts)
        return sum(lengths[(rank + i) % size] for _, _, count in rounds(rank, size) for i in range(count))
    overlaps = [_overlap(parts[rank], span) for other, span in enumerate(wanted) if other != rank]
    return sum(max(0, high - low) for low, high in overlaps)


def rounds(rank: int, size: int) -> Iterator[tuple[int, int, int]]:
    """How all ranks come to have the parts of all: (to, from, parts passed on) in each round of one rank.

    Before a round a rank has the parts of `near` ranks, its own and those that follow; it passes on the first of them.
    """
    near = 1
    while near < size:
        yield (rank - near) % size, (rank + near) % size, min(near, size - near)
        near *= 2


@dataclass(eq=False)
class Comm:
    """One rank's side of the exchange.

    Attributes:
        rank, size: within `group`.
        group: a torch process group; None = the default one, or no group at all with one rank.
        sent: bytes sent so far.
        place: what this rank is doing, named when another one does not answer.
        job: of all that the group does, the same on every rank; words of trouble belong to one.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    sent: int = field(default=0, compare=False)
    place: str = field(default="", compare=False)
    job: str = field(default="", compare=False)

    @classmethod
    def of_group(cls, group: Any = None) -> Comm:
        """The ranks of a process group, by default all of them; one rank where torch.distributed was not started.

        All ranks call it alike, once for each job.
        """
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        name = (group or dist.group.WORLD).group_name
        _jobs[name] += 1
        return cls(dist.get_rank(group), dist.get_world_size(group), group, job=f"{name}/{_jobs[name]}")

    def collect(self, own: Tensor, parts: Sequence[Span], wanted: Sequence[Span], dim: int = 1) -> Tensor:
        """The rows this rank wants, put together from their owners; every rank calls it with the same lists.

        Args:
            own: this rank's rows along `dim`.
            parts: who owns what, [first, end) per rank, consecutive.
            wanted: who wants what, [first, end) per rank.

        Returns:
            rows wanted[rank] along `dim`.

        Raises:
            RankLost: another rank is gone, or did not answer within the group's time limit.
        """
        first, end = parts[self.rank]
        if own.shape[dim] != end - first:
            raise ValueError(f"rank {self.rank} owns rows {first} to {end}, got {own.shape[dim]} of them.")
        if _all_for_all(parts, wanted):
            return self._all(own, parts, dim)
        messages: list[tuple[str, int, Tensor]] = []
        pieces: list[Tensor] = []
        for other in range(self.size):
            if other == self.rank:
                low, high = _overlap(parts[self.rank], wanted[self.rank])
                pieces.append(own.narrow(dim, low - first if high > low else 0, max(0, high - low)))
                continue
            low, high = _overlap(parts[self.rank], wanted[other])
            if high > low:
                messages.append(("to", other, own.narrow(dim, low - first, high - low).contiguous()))
            low, high = _overlap(parts[other], wanted[self.rank])
            shape = [*own.shape[:dim], max(0, high - low), *own.shape[dim + 1 :]]
            piece = own.new_empty(shape)
            pieces.append(piece)
            if high > low:
                messages.append(("from", other, piece))
        self._exchange(messages)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)

    def everyones(self, own: Tensor) -> list[Tensor]:
        """The same-shaped tensor of every rank, in the order of ranks."""
        spans = [(rank, rank + 1) for rank in range(self.size)]
        whole = self.collect(own.unsqueeze(0), spans, [(0, self.size)] * self.size, dim=0)
        return list(whole.unbind(0))

    def _all(self, own: Tensor, parts: Sequence[Span], dim: int) -> Tensor:
        """The rows of all ranks."""
        have = [own]  # the parts of this rank and of those that follow it, the first after the last
        for to, source, count in rounds(self.rank, self.size):
            given = have[0] if count == 1 else torch.cat(have[:count], dim=dim)
            owners = [parts[(source + i) % self.size] for i in range(count)]
            lengths = [end - first for first, end in owners]
            got = own.new_empty([*own.shape[:dim], sum(lengths), *own.shape[dim + 1 :]])
            messages = [("to", to, given.contiguous()), ("from", source, got)]
            self._exchange([message for message in messages if message[2].shape[dim]])
            have += got.split(lengths, dim=dim)
        if self.size == 1:
            return own
        return torch.cat([have[(other - self.rank) % self.size] for other in range(self.size)], dim=dim)

    def _exchange(self, messages: list[tuple[str, int, Tensor]]) -> None:
        if not messages:
            return
        operations = []
        for way, other, tensor in messages:
            peer = other if self.group is None else dist.get_global_rank(self.group, other)
            operations.append(dist.P2POp(dist.isend if way == "to" else dist.irecv, tensor, peer, self.group))
        try:
            requests = dist.batch_isend_irecv(operations)
        except RuntimeError as problem:
            raise RankLost(self._lost([other for _, other, _ in messages], problem)) from problem
        coalesced = len(requests) != len(messages)  # NCCL answers once for all
        for i, request in enumerate(requests):
            try:
                request.wait()
            except RuntimeError as problem:
                others = [other for _, other, _ in messages] if coalesced else [messages[i][1]]
                raise RankLost(self._lost(others, problem)) from problem
        self.sent += sum(tensor.nbytes for way, _, tensor in messages if way == "to")

    def _lost(self, others: list[int], problem: Exception) -> str:
        names = " or ".join(str(rank) for rank in sorted(set(others)))
        where = f" in {self.place}" if self.place else ""
        lost = f"rank {self.rank} waited in vain for rank {names} of {self.size}{where}"
        silent = self._silent()
        if silent and not set(silent) & set(others):  # frozen, and those asked were waiting for it
            lost += f", which waits, too; no word from rank {' or '.join(map(str, silent))}"
        first = self.tell(lost)
        told = "" if first in (None, lost) else f"; the first word of trouble: {first}"
        return (
            f"{lost} ({str(problem).strip().splitlines()[0][:160]}){told}; look at that rank's own error, then start all of "
            "them again."
        )

    def _silent(self) -> list[int]:
        """The ranks that do not say within `PATIENCE` that they wait in vain themselves; none where nobody can say so.

        What one rank fails to send is missed by several, and by some of them of one that would have passed it on.
        """
        if self.size == 1 or not dist.is_initialized():
            return []
        words = [f"{WAITING}/{self.job}/{rank}" for rank in range(self.size)]
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(words[self.rank], "")
            end = time.monotonic() + PATIENCE
            while not store.check(words) and time.monotonic() < end:
                time.sleep(0.1)
            return [rank for rank, word in enumerate(words) if not store.check([word])]
        except (RuntimeError, ValueError):  # the host of the store is gone
            return []

    def tell(self, trouble: str) -> str | None:
        """Leave word of what went wrong for the other ranks; gives the first such word, None where none can be left.

        A rank that is left behind sees only that a connection closed, often to a rank that was left behind itself.
        """
        if self.size == 1 or not dist.is_initialized():
            return None
        try:
            store = dist.distributed_c10d._get_default_store()
            return store.compare_set(f"{TROUBLE}/{self.job}", "", trouble).decode()
        except (RuntimeError, ValueError):  # the host of the store is gone, too
            return None


def _all_for_all(parts: Sequence[Span], wanted: Sequence[Span]) -> bool:
    """Does every rank want the rows of all?"""
    whole = (parts[0][0], parts[-1][1])
    return all(span == whole for span in wanted)


def _overlap(a: Span, b: Span) -> Span:
    return max(a[0], b[0]), min(a[1], b[1])
