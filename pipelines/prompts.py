"""What each frame is told to show: a function of the frame alone, made when a clip needs it.

Every prompt is encoded once. A film of 2,300 frames would otherwise carry as many copies of its text through every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attn_processors.comm import Span
from .stream import PerFrame
from .videos import Video

__all__ = ["FramePrompts"]


class FramePrompts(PerFrame):
    """Text of this rank's frames, in the order in which the pipeline stacks its batch: first those of the negative prompt."""

    def __init__(self, texts: Tensor, negative: Tensor | None, video: Video, own: Span):
        """
        Args:
            texts: the film's prompts encoded, shape (P, T, C).
            negative: the negative prompt, shape (1, T, C); None without guidance.
            video: says which prompt makes which frame.
            own: this rank's frames.
        """
        self.texts, self.negative, self.video, self.own = texts, negative, video, own

    def take(self, first: int, end: int) -> Tensor:
        """Rows [first, end), shape (rows, T, C)."""
        frames = self.own[1] - self.own[0]
        rows = []
        for row in range(first, end):
            if self.negative is not None and row < frames:
                rows.append(self.negative[0])
            else:
                rows.append(self.of_frame(self.own[0] + row % frames))
        return torch.stack(rows)

    def of_frame(self, frame: int) -> Tensor:
        """What a frame is told, shape (T, C): a prompt, or a straight blend of two."""
        shares = self.video.weights(frame)
        if len(shares) == 1:
            return self.texts[shares[0][0]]
        (before, _), (now, share) = shares
        return torch.lerp(self.texts[before], self.texts[now], share)
