"""A finished picture with what it grew from, and how all of it is written to files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .recipe import Recipe, save_pictures

__all__ = ["Picture", "size_endings"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A finished picture and the recipe that makes it again: nothing in the recipe is left to chance or defaults.

    Attributes:
        image: the picture.
        recipe: makes the same pixels again on a CPU.
        smaller: the pictures it grew from, smallest first; empty if it was made in one go.
    """

    image: Image.Image
    recipe: Recipe
    smaller: tuple[Image.Image, ...] = ()

    @property
    def sizes(self) -> list[tuple[Recipe, Image.Image]]:
        """Every picture that was made, smallest first, with the recipe that makes it; a source file was not made."""
        growth = self.recipe.upscale
        if growth is None or not self.smaller:
            return [(self.recipe, self.image)]
        made = [] if growth.source else [(replace(self.recipe, upscale=None), self.smaller[0])]
        for stage, image in enumerate(self.smaller[1:], start=2):
            so_far = tuple(picture.size for picture in self.smaller[1:stage])
            made.append((replace(self.recipe, upscale=replace(growth, scale=None, sizes=so_far)), image))
        return [*made, (self.recipe, self.image)]

    def save(self, path: str | Path) -> list[tuple[Path, Path]]:
        """Write every size that was made as PNG, each with the recipe that makes it inside and beside it.

        The largest gets the name, the smaller ones their size after it: `car.png`, `car-128x128.png`. All files appear
        whole, or none does. Returns picture and recipe file of each, smallest first.
        """
        path = Path(path)
        names = [*(path.with_name(path.stem + ending) for ending in size_endings(self)), path]
        return save_pictures([(*made, name) for made, name in zip(self.sizes, names, strict=True)])


def size_endings(picture: Picture) -> list[str]:
    """What the names of the smaller pictures have in place of ".png"."""
    return [f"-{image.width}x{image.height}.png" for _, image in picture.sizes[:-1]]
