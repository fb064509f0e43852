"""How a picture grows after it was first made: the settings of `upscale`, and the sizes that follow from them.

Pure data, no torch: `Upscale` is part of a `Recipe` and travels inside the PNG.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import SIDE, STEPS, check_number, check_text, complete_attention

__all__ = ["Size", "Upscale", "fitting", "stage_sizes"]

Size = tuple[int, int]  # (width, height) in pixels

SCALE = (1.0, 16.0)
LARGEST_FACTOR = 2.0  # of one stage, where `scale` is given
DARING_FACTOR = 4.0  # beyond it a stage has too little to go by
STRETCH = 0.1  # how much wider or narrower a stage's shape may be than the picture's, as a share


@dataclass(frozen=True, kw_only=True)
class Upscale:
    """How a picture grows: in stages that enlarge it, add noise, and denoise it at the new size.

    Attributes:
        scale: how many times wider and higher the last picture is, above 1 up to 16, reached in stages of at most 2
            each; None where `sizes` is given. Neither of the two means 2.
        sizes: (width, height) of every later stage in pixels, each larger than the one before, the last at most 8192.
        strength: how much a stage may change the picture, above 0 up to 1; less stays closer to the smaller picture
            and adds less detail. A stage runs strength * steps denoising steps.
        steps: denoising steps of a later stage at strength 1; None takes the recipe's.
        attention: attention of the later stages, as in a recipe; None takes the recipe's, () the stock one.
        shift: noise shift of a flow-matching scheduler in the later stages; more keeps more noise in early steps, so
            changes more. None leaves the model's own rule.
        rope_theta_scale: factor on the base of the rotary embedding in the later stages; more makes distant places
            look closer, against repeated motifs. None: 10 in stages whose longer side is at least twice the model's
            own, else 1.
        tile_from: pixels of the longer side from which the VAE works in tiles: less memory, slightly other colours.
        source: a picture file to start from, in place of a first stage; None makes the first picture from the recipe.

    Raises:
        ValueError: for a value out of range, scale and sizes together, an unknown attention or one of its settings.
        TypeError: for a value of the wrong type.
    """

    scale: float | None = None
    sizes: tuple[Size, ...] = ()
    strength: float = 0.7
    steps: int | None = None
    attention: tuple[dict[str, Any], ...] | None = None
    shift: float | None = None
    rope_theta_scale: float | None = None
    tile_from: int = 2048
    source: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", _checked_sizes(self.sizes))
        if self.scale is not None and self.sizes:
            raise ValueError(f"scale and sizes say the same: got {self.scale} and {_words(self.sizes)}; leave one out")
        if self.scale is None and not self.sizes:
            object.__setattr__(self, "scale", 2.0)
        if self.scale is not None:
            check_number("scale", self.scale, float, *SCALE)
            if self.scale == 1:
                raise ValueError("scale does not enlarge: got 1, need more than 1, at most 16; try 2")
        check_number("strength", self.strength, float, 0.0, 1.0)
        if self.strength == 0:
            raise ValueError("strength is out of range: got 0, need more than 0, at most 1; try 0.7")
        if self.steps is not None:
            check_number("steps of the later stages", self.steps, int, *STEPS)
        if self.attention is not None:
            object.__setattr__(self, "attention", complete_attention(self.attention))
        if self.shift is not None:
            check_number("shift", self.shift, float, 0.01, 100.0)
        if self.rope_theta_scale is not None:
            check_number("rope_theta_scale", self.rope_theta_scale, float, 0.01, 1000.0)
        check_number("tile_from", self.tile_from, int, 1, 10**6)
        if self.source is not None:
            check_text("source", self.source, 4_000)
        for name in ("scale", "strength", "shift", "rope_theta_scale"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Upscale:
        """Read what JSON makes of these settings. Raises ValueError or TypeError, also for an unknown name."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(
                f"upscale has unknown entries: got {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**settings)


def stage_sizes(upscale: Upscale, start: Size, multiple: int) -> list[Size]:
    """The (width, height) of each later stage in pixels, rounded to what the model can make.

    Args:
        upscale: says the scale or the sizes.
        start: size of the first picture.
        multiple: width and height of every stage are multiples of it.

    Raises:
        ValueError: if a stage does not enlarge the picture, would stretch it, or is too large.
    """
    if upscale.scale is not None:
        count = math.ceil(math.log(upscale.scale, LARGEST_FACTOR) - 1e-9)
        factors = [upscale.scale ** (k / count) for k in range(1, count + 1)]
        sizes = [_rounded((start[0] * factor, start[1] * factor), multiple) for factor in factors]
    else:
        sizes = [_rounded(size, multiple) for size in upscale.sizes]
    for before, size in zip([start, *sizes], sizes, strict=False):
        _check_growth(start, before, size)
    return sizes


def fitting(size: Size, multiple: int) -> Size:
    """The largest size inside `size` whose sides are multiples of `multiple`."""
    width, height = (max(multiple, side // multiple * multiple) for side in size)
    return width, height


def _rounded(size: tuple[float, float], multiple: int) -> Size:
    width, height = (max(multiple, math.floor(side / multiple + 0.5) * multiple) for side in size)
    return width, height


def _check_growth(start: Size, before: Size, size: Size) -> None:
    if max(size) > SIDE[1]:
        raise ValueError(
            f"a stage is too large: got {_words([size])} pixels, at most {SIDE[1]} each way are allowed; "
            "choose a smaller scale or size"
        )
    if size[0] * size[1] <= before[0] * before[1]:
        raise ValueError(
            f"a stage does not enlarge the picture: got {_words([size])} after {_words([before])} pixels; "
            "choose a larger scale or size"
        )
    ratio = (size[0] / size[1]) / (start[0] / start[1])
    slack = 1 + STRETCH + 8 / min(start)  # sides are rounded, which shows in small pictures
    if not 1 / slack <= ratio <= slack:
        raise ValueError(
            f"a stage would stretch the picture: got {_words([size])} for one of {_words([start])} pixels; "
            f"keep its shape, for example {size[0]}x{max(1, round(size[0] * start[1] / start[0]))}"
        )
    factor = max(size[0] / before[0], size[1] / before[1])
    if factor > DARING_FACTOR:
        warnings.warn(
            f"one stage enlarges the picture {factor:.1f} times ({_words([before])} to {_words([size])} pixels); "
            "more than 4 seldom looks right, put a stage between",
            stacklevel=2,
        )


def _checked_sizes(sizes: object) -> tuple[Size, ...]:
    if not isinstance(sizes, (tuple, list)) or not all(
        isinstance(size, (tuple, list)) and len(size) == 2 for size in sizes
    ):
        raise TypeError(f"sizes must be a list of (width, height) in pixels, got {sizes!r}")
    for size in sizes:
        for name, side in zip(("width", "height"), size, strict=True):
            check_number(f"{name} of a stage", side, int, *SIDE)
    return tuple((width, height) for width, height in sizes)


def _words(sizes: Any) -> str:
    return ", ".join(f"{width}x{height}" for width, height in sizes)
