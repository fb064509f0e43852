"""What makes a recipe a film: its length, its speed, what is shown when, and what it is made from besides text.

Pure data, no torch: `Video` is part of a `Recipe` and travels inside the MP4.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .checks import check_number, check_text

__all__ = ["Video"]

FRAMES = (1, 1_000_000)
FPS = (1, 120)
PROMPT_LENGTH = 10_000  # characters
NUMBERS = (
    "strength",
    "controlnet_conditioning_scale",
    "ip_adapter_scale",
    "pag_scale",
)  # of what a film takes besides text
SCALE = (0.0, 100.0)
DIGEST = re.compile(r"[0-9a-f]{64}")
# Layers to perturb are regular expressions that pipelines search names with, and recipes come from anywhere. In these nothing
# but a dot is repeated, two at most, and no group is: searching a name of n letters takes some n^3 steps for each alternative.
LAYER = re.compile(r"(?:\w|\.\*?|\|)+|(?:\w|\.\*?|\|)*\((?:\w|\.\*?|\|)+\)(?:\w|\.\*?|\|)*", re.ASCII)
LAYERS, LAYER_LENGTH, REPEATS = 16, 100, 2


@dataclass(frozen=True, kw_only=True)
class Video:
    """A film; its first prompt is the recipe's.

    Attributes:
        frames: in all.
        fps: frames per second of the file; changes nothing in the frames.
        later: (frame, prompt) pairs: from that frame on the film shows this; frames grow.
        blend: frames over which a prompt takes over from the one before; 0 = at once. At most as many as there are from one
            later prompt to the next.
        strength: how much of the film it is made from may change, above 0 up to 1; for video-to-video.
        controlnet_conditioning_scale: how closely it follows its conditioning frames; for pipelines with a ControlNet.
        controlnet_frame_indices: frames it has pictures for, where the ControlNet is a sparse one; empty: the pipeline's own.
        ip_adapter_scale: how much it takes from its picture; for UNets with an IP-Adapter.
        pag_scale: weight of perturbed-attention guidance; for pipelines with that.
        pag_applied_layers: where it perturbs, parts of names; empty: where the pipeline does.
        pictures: of what `long_video` was given besides text the SHA-256, by argument; filled in when the film is made.

    The numbers are None where they do not apply, or for the pipeline's own.

    Raises:
        ValueError: for a value out of range, prompts out of order.
        TypeError: for a value of the wrong type.
    """

    frames: int = 64
    fps: int = 8
    later: tuple[tuple[int, str], ...] = ()
    blend: int = 0
    strength: float | None = None
    controlnet_conditioning_scale: float | None = None
    controlnet_frame_indices: tuple[int, ...] = ()
    ip_adapter_scale: float | None = None
    pag_scale: float | None = None
    pag_applied_layers: tuple[str, ...] = ()
    pictures: dict[str, str] = field(default_factory=dict)

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
            if before and self.blend > frame - before:
                raise ValueError(
                    f"blend is {self.blend} frames, but the prompts from frames {before} and {frame} are {frame - before} "
                    "apart, so one change would begin before the other has ended; give a smaller blend"
                )
            before = frame
        object.__setattr__(self, "later", tuple((frame, prompt) for frame, prompt in self.later))
        for name in NUMBERS:
            if (value := getattr(self, name)) is not None:
                check_number(name, value, float, *((0.0, 1.0) if name == "strength" else SCALE))
                object.__setattr__(self, name, float(value))
        if self.strength == 0:
            raise ValueError("strength is 0, which would leave the film as it was; give a number above 0 up to 1")
        if not isinstance(self.controlnet_frame_indices, (tuple, list)):
            raise TypeError(f"controlnet_frame_indices must be a list of frames, got {self.controlnet_frame_indices!r}")
        for frame in self.controlnet_frame_indices:
            check_number("frame with a picture", frame, int, 0, self.frames - 1)
        if len(set(self.controlnet_frame_indices)) < len(self.controlnet_frame_indices):
            raise ValueError(f"a frame has two pictures: got controlnet_frame_indices {self.controlnet_frame_indices}")
        object.__setattr__(self, "controlnet_frame_indices", tuple(self.controlnet_frame_indices))
        if not isinstance(self.pag_applied_layers, (tuple, list)):
            raise TypeError(f"pag_applied_layers must be a list of names, got {self.pag_applied_layers!r}")
        if len(self.pag_applied_layers) > LAYERS:
            raise ValueError(
                f"pag_applied_layers has {len(self.pag_applied_layers)} names, at most {LAYERS} are allowed"
            )
        for layer in self.pag_applied_layers:
            check_text("layer to perturb", layer, LAYER_LENGTH)
            if not LAYER.fullmatch(layer) or layer.count("*") > REPEATS:
                raise ValueError(
                    f"a layer to perturb cannot be read: got {layer!r}; write part of a name with letters, digits, '_', '.', "
                    f"'|', at most {REPEATS} times '.*' and one pair of brackets, such as 'mid_block.*attn1'"
                )
        object.__setattr__(self, "pag_applied_layers", tuple(self.pag_applied_layers))
        if not isinstance(self.pictures, Mapping) or not all(
            isinstance(name, str) and isinstance(digest, str) and DIGEST.fullmatch(digest)
            for name, digest in self.pictures.items()
        ):
            raise TypeError(
                f"pictures must map arguments of long_video to SHA-256 digests, got {self.pictures!r}; leave it out, "
                "long_video fills it in"
            )
        object.__setattr__(self, "pictures", dict(self.pictures))

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
