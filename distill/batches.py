"""Which samples make up the batch of a step, and its learning rate: functions of the step alone."""

from __future__ import annotations

import math

import numpy as np

from .config import DistillConfig
from .denoising import Size

__all__ = ["Batches", "learning_rate"]


class Batches:
    """The order of the samples: shuffled per epoch, each batch of one size, a rest that fills no batch left out."""

    def __init__(self, groups: dict[Size, np.ndarray], batch: int, seed: int):
        self.groups, self.batch, self.seed = groups, batch, seed
        self.per_epoch = sum(len(indices) // batch for indices in groups.values())
        for size, indices in groups.items():
            if len(indices) < batch:
                raise ValueError(
                    f"there are {len(indices)} samples of {size[0]} x {size[1]} pixels, fewer than a batch of {batch}; "
                    "make more, or a smaller batch"
                )
        self._epoch, self._order = -1, [((0, 0), np.empty(0, np.int64))][:0]

    def at(self, step: int) -> tuple[Size, np.ndarray]:
        """Size and samples of the batch of a step."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, epoch))
            order = []
            for size, indices in self.groups.items():
                shuffled = rng.permutation(indices)
                rows = shuffled[: len(indices) // self.batch * self.batch].reshape(-1, self.batch)
                order += [(size, row) for row in rows]
            self._epoch, self._order = epoch, [order[i] for i in rng.permutation(len(order))]
        return self._order[place]


def learning_rate(config: DistillConfig, step: int) -> float:
    """Of a step, from 0: a rise over `warmup` steps, then flat, or down to zero at the end."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    left = (config.steps - step) / max(config.steps - config.warmup, 1)
    return (
        config.lr * {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[config.schedule]
    )
