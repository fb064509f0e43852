"""Where things are in a scene, cell by cell, and a head that learns to tell it from a transformer's hidden states.

A transformer learns pictures far sooner when its hidden states are drawn towards features that know what is in the
picture (REPA, Yu et al. 2024, arXiv 2410.06940). They take a pretrained encoder for it; this world knows the truth.
The head serves the training alone and is no part of the finished pipeline.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import world

__all__ = ["LayoutHead", "cell_labels"]

NOTHING = 0  # label of a cell that no sprite covers
TINTS = list(world.TINTS)


def cell_labels(scenes: list[world.Scene], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Kind and tint of the sprite whose square covers each cell, two (B, rows * columns): 1 + its number, or NOTHING.

    Cells are those of the lattice, so sprites cover whole ones.
    """
    kinds = torch.full((len(scenes), rows, columns), NOTHING)
    tints = kinds.clone()
    for i, scene in enumerate(scenes):
        for one in scene.sprites:
            side = one.side * min(rows, columns)
            top, left = round(one.y * rows - side / 2), round(one.x * columns - side / 2)
            where = i, slice(top, top + round(side)), slice(left, left + round(side))
            kinds[where], tints[where] = 1 + world.KINDS.index(one.kind), 1 + TINTS.index(one.tint)
    return kinds.flatten(1), tints.flatten(1)


class LayoutHead(nn.Module):
    """Kind and tint of every image token from its hidden state, as two linear classifiers."""

    def __init__(self, width: int):
        super().__init__()
        self.kind = nn.Linear(width, 1 + len(world.KINDS))
        self.tint = nn.Linear(width, 1 + len(TINTS))

    def forward(self, hidden: Tensor, scenes: list[world.Scene], rows: int, columns: int) -> Tensor:
        """Mean cross entropy of both: hidden (B, rows * columns, width)."""
        hidden = hidden.float()
        losses = [
            nn.functional.cross_entropy(classifier(hidden).transpose(1, 2), labels)
            for classifier, labels in zip((self.kind, self.tint), cell_labels(scenes, rows, columns), strict=True)
        ]
        return losses[0] + losses[1]
