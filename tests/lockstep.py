"""Ranks as threads: what a split job computes, without starting processes. A judge for tests, not a mode."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from reattend.attn_processors.comm import Comm

TIMEOUT = 60.0  # seconds; a rank that failed must not keep the others


class ThreadComm(Comm):
    """A rank whose messages go through queues."""

    def __init__(self, rank: int, size: int, boxes: dict[tuple[int, int], queue.Queue]):
        super().__init__(rank, size)
        self.boxes = boxes

    def _exchange(self, messages: list[tuple[str, int, Tensor]]) -> None:
        for way, other, tensor in messages:
            if way == "to":
                self.boxes[self.rank, other].put(tensor.clone())
                self.sent += tensor.nbytes
        for way, other, tensor in messages:
            if way == "from":
                tensor.copy_(self.boxes[other, self.rank].get(timeout=TIMEOUT))


def lockstep(size: int, work: Callable[[Comm], Any]) -> list[Any]:
    """`work(comm)` on every rank at once; the results in the order of ranks. The first error is raised again."""
    boxes = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadComm(rank, size, boxes))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    if errors:
        raise next((error for error in errors if not isinstance(error, queue.Empty)), errors[0])
    return results
