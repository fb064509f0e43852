"""A finished story: its panels, what they were made from, and the strip they make side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..attn_processors import Place
from .files import opened, written_whole
from .masks import overlay
from .script import Script

__all__ = ["Story", "beside", "strip"]

GAP = 4  # pixels between the pictures of a strip


@dataclass(kw_only=True, eq=False)
class Story:
    """Finished panels.

    Attributes:
        script: makes the same pixels again on a CPU; every seed is in it.
        panels: pictures by number, counted from 0; only those that were asked for.
        references: pictures by subject.
        pictures: those of one's own that the references were made from, by subject.
        places: where every subject was at the end, by panel; masks found by attention maps among them.
        report: what was not found, and what the bank holds; one line each.
    """

    script: Script
    panels: dict[int, Image.Image] = field(default_factory=dict)
    references: dict[str, Image.Image] = field(default_factory=dict)
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    places: dict[int, tuple[Place, ...]] = field(default_factory=dict)
    report: list[str] = field(default_factory=list)

    def shown(self, number: int) -> Image.Image:
        """A panel with the place of every subject laid over it."""
        return overlay(self.panels[number], self.places[number], [subject.name for subject in self.script.subjects])

    def save(self, folder: Path) -> list[Path]:
        """Write panels, references, places and a strip as PNG, and the script; the story is inside every panel and beside.

        Pictures of one's own are written too, and the script names those, so that the folder can be moved.

        Panels that were not made now stay as they are in the folder. All files appear whole, or none does.
        """
        files: dict[Path, Image.Image | str] = {}
        for number, picture in self.panels.items():
            files[folder / f"panel-{number + 1}.png"] = picture
            files[folder / f"panel-{number + 1}-places.png"] = self.shown(number)
        script = beside(self.script)
        for i, (subject, named) in enumerate(zip(self.script.subjects, script.subjects, strict=True)):
            if subject.name in self.references:
                files[folder / f"reference-{i + 1}.png"] = self.references[subject.name]
            if subject.picture is not None and named.picture is not None:
                files[folder / named.picture] = self.pictures.get(subject.name) or opened(subject.picture)
        pictures = [
            self.panels.get(number) or _there(folder / f"panel-{number + 1}.png")
            for number in range(len(self.script.panels))
        ]
        if all(picture is not None for picture in pictures):
            files[folder / "strip.png"] = strip([picture for picture in pictures if picture is not None])
        told = script.to_json()
        files[folder / "story.json"] = told + "\n"
        chunks = PngInfo()
        chunks.add_text("reattend story", told)
        with written_whole(*files) as asides:
            for aside, content in zip(asides, files.values(), strict=True):
                if isinstance(content, str):
                    aside.write_text(content, encoding="utf-8")
                else:
                    content.save(aside, format="PNG", pnginfo=chunks)
        return list(files)


def beside(script: Script) -> Script:
    """The story as its file says it: pictures of one's own by the names they have beside that file."""
    subjects = tuple(
        one if one.picture is None else replace(one, picture=f"picture-{i + 1}.png")
        for i, one in enumerate(script.subjects)
    )
    return replace(script, subjects=subjects)


def strip(pictures: Sequence[Image.Image], columns: int = 6) -> Image.Image:
    """Pictures side by side, in rows of at most `columns`."""
    width, height = (max(picture.size[axis] for picture in pictures) + GAP for axis in (0, 1))
    across = min(columns, len(pictures))
    sheet = Image.new("RGB", (across * width - GAP, -(-len(pictures) // across) * height - GAP), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % across * width, i // across * height))
    return sheet


def _there(path: Path) -> Image.Image | None:
    """A panel made before, if it is in the folder and whole."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
