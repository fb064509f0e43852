"""What a caption says of each of its words, and a head that learns to tell it from a text encoder's hidden states.

FLUX gives its text tokens no positions, so whatever the transformer is to know of a word, which tint belongs to it and
whether it comes first, has to be in that word's hidden state. The published models have a T5 that read the web before it
saw a picture. Ours is new, and pictures teach it to read very slowly; captions alone do so within some hundred steps.
The head serves the training alone and is no part of the finished pipeline.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import T5Tokenizer

from . import world

__all__ = ["ClauseHead", "word_labels"]

UNTOLD = -100  # label of a token that is no noun or tint; cross entropy leaves it out
KINDS, TINTS = list(world.KINDS), list(world.TINTS)
MOST = max(world.SIDES)  # sprites of a caption
CLASSES = {  # what is told of a token, and how many answers there are
    "kind": len(KINDS),
    "tint": 1 + len(TINTS),  # 0 where the caption leaves it open
    "place": MOST,  # from the left
    "count": MOST,  # of the caption's sprites, less one
}


def word_labels(tokenizer: T5Tokenizer, captions: list[str], ids: Tensor) -> dict[str, Tensor]:
    """For each of CLASSES (B, tokens): of the clause a noun or tint belongs to, or UNTOLD.

    Args:
        captions: of the world; empty ones tell nothing.
        ids: (B, tokens), those of the captions.
    """
    noun, tint = ({tokenizer.convert_tokens_to_ids(f"▁{word}") for word in words} for words in (KINDS, TINTS))
    labels = {name: torch.full(ids.shape, UNTOLD) for name in CLASSES}
    for i, (caption, row) in enumerate(zip(captions, ids.tolist(), strict=True)):
        clauses = world.parse_caption(caption)[0] if caption else ()
        place = 0
        for k, token in enumerate(row):
            if token in noun or token in tint:
                clause = clauses[place]
                labels["kind"][i, k] = KINDS.index(clause.kind)
                labels["tint"][i, k] = 0 if clause.tint is None else 1 + TINTS.index(clause.tint)
                labels["place"][i, k] = place
                labels["count"][i, k] = len(clauses) - 1
                place += token in noun
    return labels


class ClauseHead(nn.Module):
    """Tells each of CLASSES of every noun and tint from its hidden state, with a linear classifier."""

    def __init__(self, width: int):
        super().__init__()
        self.classifiers = nn.ModuleDict({name: nn.Linear(width, count) for name, count in CLASSES.items()})

    def forward(self, hidden: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Sum of the mean cross entropies: hidden (B, tokens, width), labels of `word_labels`; 0 if they tell nothing."""
        told = (labels["kind"] != UNTOLD).sum().clamp(min=1)
        losses = [
            nn.functional.cross_entropy(classifier(hidden.float()).transpose(1, 2), labels[name], reduction="sum")
            for name, classifier in self.classifiers.items()
        ]
        return torch.stack(losses).sum() / told
