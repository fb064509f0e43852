"""What makes a recipe a film: its length, its speed, and what is shown when.

Pure data, no torch: `Video` is part of a `Recipe` and travels inside the MP4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import check_number, check_text

__all__ = ["Video"]

FRAMES = (1, 1_000_000)
FPS = (1, 120)
PROMPT_LENGTH = 10_000  # characters


@dataclass(frozen=True, kw_only=True)
class Video:
    """A film; its first prompt is the recipe's.

    Attributes:
        frames: in all.
        fps: frames per second of the file; changes nothing in the frames.
        later: (frame, prompt) pairs: from that frame on the film shows this; frames grow.
        blend: frames over which a prompt takes over from the one before; 0 = at once.

    Raises:
        ValueError: for a value out of range, prompts out of order.
        TypeError: for a value of the wrong type.
    """

    frames: int = 64
    fps: int = 8
    later: tuple[tuple[int, str], ...] = ()
    blend: int = 0

    def __post_init__(self) -> None:
        check_number("frames", self.frames, int, *FRAMES)
        check_number("fps", self.fps, int, *FPS)
        check_number("blend", self.blend, int, 0, FRAMES[1])
        if not isinstance(self.later, (tuple, list)) or not all(
            isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in self.later
        ):
            raise TypeError(f"later must be a list of (frame, prompt), got {self.later!r}")
        before = 0
        for frame, prompt in self.later:
            check_number("frame of a later prompt", frame, int, 1, FRAMES[1])
            check_text("later prompt", prompt, PROMPT_LENGTH)
            if not prompt.strip():
                raise ValueError(f"the prompt from frame {frame} is empty; say what the film shows there")
            if not before < frame < self.frames:
                raise ValueError(
                    f"a later prompt begins at frame {frame}, need frames that grow, from 1 to {self.frames - 1}; "
                    "the first prompt is the recipe's own"
                )
            before = frame
        object.__setattr__(self, "later", tuple((frame, prompt) for frame, prompt in self.later))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Video:
        """Read what JSON makes of these settings. Raises ValueError or TypeError, also for an unknown name."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"video has unknown entries: got {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**settings)

    def weights(self, frame: int) -> tuple[tuple[int, float], ...]:
        """Which prompts make this frame, 0 being the recipe's own: (prompt, share) pairs that add up to 1."""
        starts = [0, *(start for start, _ in self.later)]
        now = max(i for i, start in enumerate(starts) if start <= frame)
        share = 1.0 if now == 0 else min(1.0, (frame - starts[now] + 1) / (self.blend + 1))
        return ((now, 1.0),) if share == 1.0 else ((now - 1, 1.0 - share), (now, share))
