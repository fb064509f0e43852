"""Where a subject is in one picture, and what it reads there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .ops.regions import unpack_mask

__all__ = ["Place", "check_panel"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A subject in one picture, and where: by a box, by a mask, or by the words of the prompt that mean it.

    Attributes:
        subject: its name; "" only with `words`, which are then those of the background.
        box: (x0, y0, x1, y1) in fractions of width and height.
        mask: as `pack_mask` writes it, in place of a box.
        words: places of its words among the text tokens, by which attention maps show it where neither box nor mask is
            given.
        caption: of a panel: what this part of the picture reads in place of the panel's prompt, such as that prompt with
            this subject alone in its own words; "" = the prompt.
    A reference with none of box, mask and words fills its picture.
    """

    subject: str
    box: tuple[float, float, float, float] | None = None
    mask: str | None = None
    words: tuple[int, ...] = ()
    caption: str = ""

    def __post_init__(self) -> None:
        if self.box is not None and not all(math.isfinite(edge) for edge in self.box):
            raise ValueError(f"box of {self.subject!r} has edges that are no numbers: got {self.box}.")
        if self.box is not None and (self.box[0] > self.box[2] or self.box[1] > self.box[3]):
            raise ValueError(
                f"box of {self.subject!r} is turned around: got {self.box}, need x0 <= x1 and y0 <= y1; boxes are "
                "(left, top, right, bottom) in fractions of width and height."
            )
        if self.mask is not None:
            unpack_mask(self.mask)  # raises
        if any(word < 0 for word in self.words):
            raise ValueError(f"words of {self.subject!r} are places from 0 on, got {self.words}.")

    @property
    def automatic(self) -> bool:
        """Whether attention maps have to show where it is."""
        return self.box is None and self.mask is None and bool(self.words)


def check_panel(number: int, panel: tuple[Place, ...]) -> None:
    """Raise ValueError if the places of a panel, counted from 0, do not go together."""
    names = [place.subject for place in panel]
    for place in panel:
        if not place.subject and not place.words:
            raise ValueError(f"a place in panel {number + 1} has no subject; name it, or give the background's words.")
        if place.subject and place.box is None and place.mask is None and not place.words:
            raise ValueError(
                f"{place.subject!r} in panel {number + 1} has no place: give a box, a mask, or the words that mean it."
            )
        if names.count(place.subject) > 1:
            raise ValueError(f"{place.subject!r} is twice in panel {number + 1}; give one place, or two names.")
    words = {place.subject: set(place.words) for place in panel if place.automatic}
    for one in words:
        for other in words:
            if one < other and words[one] & words[other]:
                raise ValueError(
                    f"{one!r} and {other!r} in panel {number + 1} share words, so attention maps cannot tell them "
                    "apart; give boxes or masks."
                )
