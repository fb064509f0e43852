"""The command line under torchrun: one process group, one seed, and only the first process speaks.

torchrun --nproc-per-node 4 -m reattend.ui.cli image "..." --model ... --attention clear radius=16
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ..pipelines.recipe import Recipe

__all__ = ["TIMEOUT", "Ranks", "joined"]

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=10)  # without an answer for so long, a rank counts as lost


@dataclass(frozen=True)
class Ranks:
    """This process among those torchrun started; one of one without it."""

    rank: int = 0
    size: int = 1
    local: int = 0  # number of this process on its host

    @property
    def split(self) -> bool:
        """Whether the work is shared."""
        return self.size > 1

    @property
    def speaks(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def device(self, wanted: str | None) -> str | None:
        """The device of this process: on CUDA each has its own."""
        import torch

        if not self.split or wanted not in (None, "cuda"):
            return wanted
        return f"cuda:{self.local}" if torch.cuda.is_available() else wanted

    def seeded(self, recipe: Recipe) -> Recipe:
        """The recipe with a seed that all ranks know."""
        if not self.split or recipe.seed is not None:
            return recipe
        import secrets

        return replace(recipe, seed=self.agreed(secrets.randbelow(2**32)))

    def agreed(self, value: T) -> T:
        """What the first rank gives here, on every rank."""
        if not self.split:
            return value
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]


@contextmanager
def joined(wanted: str | None, timeout: float | None = None) -> Iterator[Ranks]:
    """Join the processes torchrun started, for the length of a with block.

    Args:
        wanted: the device to work on; None = CUDA where there is one.
        timeout: seconds without an answer after which a rank counts as lost; None = TIMEOUT.

    Raises:
        ValueError: if this host has more processes than GPUs, and these are wanted.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_cards = torch.cuda.is_available() and (wanted or "cuda").partition(":")[0] == "cuda"
    if on_cards:
        here, cards = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1)), torch.cuda.device_count()
        if here > cards:
            raise ValueError(
                f"this host has {here} processes, {cards} GPUs; start at most {cards} (--nproc-per-node {cards}), or use "
                "--device cpu"
            )
        torch.cuda.set_device(local)
    # NCCL's wait() lets the host go on, and torch then aborts the process where a rank is frozen; this waits and raises.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    backend = "cpu:gloo,cuda:nccl" if on_cards else "gloo"  # small messages lie on the CPU
    dist.init_process_group(backend, timeout=TIMEOUT if timeout is None else datetime.timedelta(seconds=timeout))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()
