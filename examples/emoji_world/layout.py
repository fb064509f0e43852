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
PLACES = 1 + max(world.SIDES.values())  # NOTHING and 1 + the row or column inside the sprite's square
CLASSES = {  # what is told of a cell, and how many answers there are
    "kind": 1 + len(world.KINDS),
    "tint": 1 + len(TINTS),
    "row": PLACES,
    "column": PLACES,
    "side": PLACES,  # in lattice steps
}


def cell_labels(scenes: list[world.Scene], rows: int, columns: int) -> dict[str, Tensor]:
    """For each of CLASSES (B, rows * columns): of the sprite whose square covers the cell, or NOTHING.

    Cells are those of the lattice, so sprites cover whole ones, and together the labels say all there is to draw.
    """
    labels = {name: torch.full((len(scenes), rows, columns), NOTHING) for name in CLASSES}
    for i, scene in enumerate(scenes):
        for one in scene.sprites:
            side = round(one.side * min(rows, columns))
            top, left = round(one.y * rows - side / 2), round(one.x * columns - side / 2)
            where = i, slice(top, top + side), slice(left, left + side)
            labels["kind"][where] = 1 + world.KINDS.index(one.kind)
            labels["tint"][where] = 1 + TINTS.index(one.tint)
            labels["row"][where] = torch.arange(1, side + 1)[:, None]
            labels["column"][where] = torch.arange(1, side + 1)
            labels["side"][where] = side
    return {name: each.flatten(1) for name, each in labels.items()}


class LayoutHead(nn.Module):
    """Tells each of CLASSES of every image token from its hidden state, with a linear classifier."""

    def __init__(self, width: int):
        super().__init__()
        self.classifiers = nn.ModuleDict({name: nn.Linear(width, count) for name, count in CLASSES.items()})

    def forward(self, hidden: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Sum of the mean cross entropies: hidden (B, rows * columns, width), labels of `cell_labels`."""
        hidden = hidden.float()
        losses = [
            nn.functional.cross_entropy(classifier(hidden).transpose(1, 2), labels[name])
            for name, classifier in self.classifiers.items()
        ]
        return torch.stack(losses).sum()
