"""Training goes on when single samples are damaged: another of the same size takes the place, and people are told.

Which one it is depends on the number of the damaged sample alone, so a run that was stopped still goes on bit for bit, and
with any number of processes. Too many damaged samples end the run: then something else is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .shards import DamagedSample, Samples

__all__ = ["MOST", "Damages", "Sparing"]

log = logging.getLogger(__name__)

MOST = 0.05  # share of the samples that may be damaged; one always may
MARK = "damaged"


class Sparing(torch.utils.data.Dataset):
    """Samples, or others of the same size in place of damaged ones; item["damaged"] tells which it is, bool.

    Raises:
        ValueError: where all samples of a size are damaged.
    """

    def __init__(self, samples: Samples):
        self.samples = samples
        self._groups = samples.groups()
        self._damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        for other in self._order(index):
            if other in self._damaged:
                continue
            try:
                return self.samples[other] | {MARK: torch.tensor(other != index)}
            except DamagedSample:
                self._damaged.add(other)
        raise ValueError(
            f"all samples of one size in {self.samples.folder} are damaged; delete the folder and run reattend distill "
            "data again"
        )

    def _order(self, index: int) -> Iterator[int]:
        yield index
        (group,) = (group for group in self._groups.values() if index in group)
        yield from (int(other) for other in np.random.default_rng(index).permutation(group))


class Damages:
    """Counts the damaged samples that a process has met, and tells each file once.

    Raises:
        ValueError: if there are more than the share MOST, here or later.
    """

    def __init__(self, samples: Samples):
        self.samples = samples
        self.met: set[int] = set()
        self._told: set[str] = set()
        self._add(list(samples.damaged))

    def taken(self, batch: dict[str, Tensor], indices: list[int]) -> dict[str, Tensor]:
        """A batch of `Sparing`, asked for these indices, without its marks."""
        rest = dict(batch)
        marks = rest.pop(MARK).tolist()
        self._add([index for index, damaged in zip(indices, marks, strict=True) if damaged])
        return rest

    def _add(self, indices: list[int]) -> None:
        new = [index for index in indices if index not in self.met]
        self.met.update(new)
        count, total = len(self.met), len(self.samples)
        for index in new:
            file, place = self.samples.where(index)
            whole = index in self.samples.damaged
            name = f"{file}" if whole else f"sample {place} of {file}"
            if name not in self._told:
                self._told.add(name)
                log.warning(
                    "%s is damaged: other samples take its place (%d damaged of %d up to now); to mend it, delete the file "
                    "and run reattend distill data again",
                    name, count, total,
                )  # fmt: skip
        if new and count > max(1, int(MOST * total)):
            file, _ = self.samples.where(new[-1])
            raise ValueError(
                f"{count} of {total} samples in {self.samples.folder} are damaged, the last in {file.name}; that is more "
                f"than the {MOST:.0%} a run goes on with: delete the damaged files and run reattend distill data again"
            )
