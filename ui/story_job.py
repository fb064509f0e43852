"""The story job behind the page: script -> panels -> what the page shows. Plain functions, no Gradio.

`StoryJob` is the work of the worker thread; `make_story` is what happens after a button: it yields one `View` after
another until the run has ended. A panel made again goes into a folder of its own with the others beside it, so that the
story before it is still there.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..attn_processors import Place
from ..attn_processors.ops.regions import tight_box, unpack_mask
from ..pipelines.events import CancelToken, StepEvent
from ..pipelines.files import free_path
from ..pipelines.masks import as_place, overlay
from ..pipelines.script import Script
from ..pipelines.stories import story
from ..pipelines.told import strip
from .finding import finder
from .image_job import Previewer, View, followed
from .jobs import Progress, Session
from .story_files import pack_story
from .story_form import MASK, NOT_HERE, OWN, Table, box_text, places_in, read_place, read_story_form, with_place

__all__ = [
    "GONE",
    "Order",
    "StoryJob",
    "StoryMade",
    "found_places",
    "make_story",
    "own_picture",
    "panel_picture",
    "story_words",
    "strip_picture",
]

GONE = "The files of this story are no longer there; press Make the story."
SHOWN = 640  # pixels; smaller panels are enlarged to this, so that names and frames over them can be read
NEW_SEED = 2**32
WORDS = {  # fields of a script as the form calls them
    "subjects": "the characters",
    "together": "panels in one call",
    "negative": "what it should not show",
    "consistency": "settings of the story that was loaded",
}


@dataclass(frozen=True, eq=False)
class StoryMade:
    """A finished story.

    Attributes:
        folder: of its files, as `Story.save` names them.
        script: makes the same pixels again on a CPU.
        places: where everybody was, by panel.
        report: what was not found, and what a bank holds.
        seconds: of the last run.
    """

    folder: Path
    script: Script
    places: Mapping[int, tuple[Place, ...]]
    report: tuple[str, ...]
    seconds: float

    @property
    def where(self) -> str:
        return self.folder.name

    @property
    def strip_file(self) -> Path:
        return self.folder / "strip.png"

    @property
    def story_file(self) -> Path:
        return self.folder / "story.json"

    @property
    def download(self) -> Path:
        """What makes the story elsewhere: its file, or with pictures of one's own a zip of it and them."""
        packed = any(one.picture is not None for one in self.script.subjects)
        return self.folder / "story.zip" if packed else self.story_file

    @property
    def own(self) -> dict[str, Path]:
        """The characters' own pictures that this story was made with, by name."""
        files = {one.name: self.folder / f"reference-{i + 1}.png" for i, one in enumerate(self.script.subjects)}
        return {name: file for name, file in files.items() if file.exists()}

    def panel(self, number: int) -> Image.Image:
        """A panel, counted from 0, large enough to look at. Raises ValueError if its file is gone."""
        try:
            with Image.open(self.folder / f"panel-{number + 1}.png", formats=["PNG"]) as file:
                image = file.convert("RGB")
        except OSError:
            raise ValueError(GONE) from None
        times = -(-SHOWN // max(image.size))
        return (
            image if times == 1 else image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)
        )


@dataclass(frozen=True)
class Order:
    """What to make: a whole story, or with `panel` (counted from 0) one panel of it in place of that in `made`."""

    script: Script
    panel: int | None = None
    made: StoryMade | None = field(default=None, compare=False)


class StoryJob:
    """Makes stories, each into a folder of its own. Only the worker thread may call it.

    Args:
        out: the folder of those folders.
        pipe: (model, number format, report) -> loaded pipeline, such as `ImageJob.pipe`.
    """

    def __init__(self, out: Path, pipe: Callable[[str, str | None, Callable[[Progress], None]], Any]) -> None:
        self.out, self.pipe = out, pipe

    def __call__(self, order: Order, token: CancelToken, report: Callable[[Progress], None]) -> StoryMade:
        start = time.monotonic()
        script, before = order.script, order.made
        if before is not None and not before.folder.is_dir():
            raise ValueError(GONE)
        pipe = self.pipe(script.model, script.dtype, report)
        token.check()
        show, find = Previewer(pipe), finder(script.model)
        wanted = range(len(script.panels)) if order.panel is None else [order.panel]
        groups = list(dict.fromkeys(script.group(number) for number in wanted))

        def on_step(event: StepEvent) -> None:
            last = event.latents[-1:] if event.latents is not None else None  # a panel; references stand before it
            report(Progress("Drawing", event.step, event.steps, event.eta, show(last), part(event)))

        def part(event: StepEvent) -> str:
            calls = event.clips // len(groups)
            group, call = groups[event.clip // calls], event.clip % calls
            name = f"Panel {group[0] + 1}" if len(group) == 1 else f"Panels {group[0] + 1} to {group[-1] + 1}"
            return f"{name} (finding who is where)" if find is not None and call == 0 else name

        report(Progress("Working on the first step"))
        only = None if order.panel is None else [order.panel]
        made = story(script, pipe=pipe, only=only, find=find, on_step=on_step, cancel=token)
        folder = free_path(self.out, script.panels[0].prompt, "")
        try:
            if before is not None:
                shutil.copytree(before.folder, folder)
            made.save(folder)
            if any(one.picture is not None for one in made.script.subjects):
                pack_story(made.script, folder / "story.zip")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        places = {**(before.places if before is not None else {}), **made.places}
        return StoryMade(folder, made.script, places, tuple(made.report), time.monotonic() - start)


def make_story(
    session: Session,
    form: Mapping[str, Any],
    models: Sequence[str],
    *,
    panel: int | None = None,
    new_seed: bool = False,
) -> Iterator[View]:
    """Submit the form's story, yield views until the run has ended. Closing the iterator stops it.

    Args:
        panel: make only this one of the story that is shown, counted from 0, with its caption, seed and places as the
            form has them now; None: the whole story.
        new_seed: give that panel a seed drawn now.
    """
    return followed(session, lambda: _order(session.shown, form, models, panel, new_seed))


def _order(
    made: StoryMade | None, form: Mapping[str, Any], models: Sequence[str], panel: int | None, new_seed: bool
) -> Order:
    script = read_story_form(form, models)
    if panel is None:
        return Order(script)
    if made is None:
        raise ValueError("There is no story yet; press Make the story first.")
    if panel >= len(script.panels):
        raise ValueError(f"The form has no panel {panel + 1} any more; press Use these settings to bring it back.")
    filled = _as_made(script, made.script)
    others = [tuple(one for i, one in enumerate(each.panels) if i != panel) for each in (filled, made.script)]
    different = [
        WORDS.get(f.name, f.name)
        for f in fields(Script)
        if f.name not in ("panels", "made_with") and getattr(filled, f.name) != getattr(made.script, f.name)
    ]
    different += ["other panels"] if others[0] != others[1] else []
    if different:
        raise ValueError(
            f"The form is not that of the story shown ({', '.join(different)} changed), and the other panels would not "
            "fit; press Make the story, or Use these settings to bring the form back."
        )
    new, old = filled.panels[panel], made.script.panels[panel]
    if new_seed:
        new = replace(new, seed=secrets.randbelow(NEW_SEED))
    searched = {name for name, where in (new.places or {}).items() if where is None}
    if (new.prompt, new.seed) != (old.prompt, old.seed) or not searched <= set(new.found or {}):
        new = replace(new, found=None)
    panels = tuple(new if i == panel else one for i, one in enumerate(made.script.panels))
    return Order(replace(made.script, panels=panels), panel, made)


def _as_made(script: Script, made: Script) -> Script:
    """The form's story with what it leaves open as it was when the story was made."""
    names = ("width", "height", "guidance", "seed", "dtype")
    open_ones = {name: getattr(made, name) for name in names if getattr(script, name) is None}
    before = {one.name: one for one in made.subjects}
    subjects = tuple(
        replace(one, seed=was.seed if one.seed is None else one.seed, found=was.found) if was is not None else one
        for one in script.subjects
        for was in [before.get(one.name)]
    )
    panels = []
    for panel, was in zip(script.panels, made.panels, strict=False):
        seed = was.seed if panel.seed is None else panel.seed
        panels.append(replace(panel, seed=seed, places=script.present(panel), found=was.found))
    return replace(script, subjects=subjects, panels=(*panels, *script.panels[len(panels) :]), **open_ones)


def strip_picture(made: StoryMade, with_places: bool) -> Path | Image.Image:
    """The panels side by side: the file, or with everybody's place laid over if the files of all panels are there."""
    if not with_places:
        return made.strip_file
    try:
        panels = [panel_picture(made, number) for number in range(len(made.script.panels))]
    except ValueError:
        return made.strip_file
    for image in panels:
        image.thumbnail((SHOWN // 2, SHOWN // 2))
    return strip(panels)


def panel_picture(
    made: StoryMade, number: int, table: Table | None = None, corner: Sequence[int] | None = None
) -> Image.Image:
    """A panel with everybody's place laid over it.

    Args:
        table: the form's table of places; its boxes are shown in place of those the panel was made with.
        corner: (x, y) in pixels of a click that waits for its opposite corner.

    Raises:
        ValueError, TypeError: a row of the table cannot be read, or the panel's file is gone.
    """
    names = [one.name for one in made.script.subjects]
    places = {place.subject: place for place in made.places.get(number, ())}
    for (panel, who), where in places_in(table or []).items():
        if panel == str(number + 1) and who in names and where.lower() not in ("", MASK, NOT_HERE):
            places[who] = as_place(who, read_place(who, where, None))
    image = overlay(made.panel(number), [places[name] for name in names if name in places], names)
    return image if corner is None else _crossed(image, corner)


def own_picture(
    file: str, who: str, names: Sequence[str], table: Table | None = None, corner: Sequence[int] | None = None
) -> Image.Image:
    """A picture that was given for a character, of at most SHOWN pixels, with the place that the table says laid over it.

    Args:
        names: of all characters, for the colours.
        corner: as for `panel_picture`.

    Raises:
        ValueError, TypeError: the row of the table cannot be read, or the file is gone.
    """
    try:
        with Image.open(file, formats=["PNG"]) as kept:
            image = kept.convert("RGB")
    except OSError:
        raise ValueError(f"The picture for {who!r} is no longer there; give it again.") from None
    times = SHOWN / max(image.size)
    image = image.resize((max(1, round(image.width * times)), max(1, round(image.height * times))))
    where = places_in(table or []).get((OWN, who), "")
    if where.lower() not in ("", MASK, NOT_HERE):
        image = overlay(image, [as_place(who, read_place(who, where, None))], names)
    return image if corner is None else _crossed(image, corner)


def _crossed(image: Image.Image, corner: Sequence[int]) -> Image.Image:
    """With a cross at a click that waits for its opposite corner."""
    draw, (x, y), arm = ImageDraw.Draw(image), corner, image.width // 16
    for width, colour in ((7, "white"), (3, "black")):
        draw.line((x - arm, y, x + arm, y), fill=colour, width=width)
        draw.line((x, y - arm, x, y + arm), fill=colour, width=width)
    return image


def found_places(made: StoryMade, table: Table) -> Table:
    """The table of places with a box for everybody who was found in a panel and is not in it yet."""
    there = {key for key, where in places_in(table).items() if where}
    for number, places in sorted(made.places.items()):
        for place in places:
            box = place.box if place.mask is None else tight_box(unpack_mask(place.mask))
            if box is not None and (str(number + 1), place.subject) not in there:
                table = with_place(table, number, place.subject, box_text(box))
    return table


def story_words(made: StoryMade) -> str:
    """The facts of a story in a line, and a line for all that was not found."""
    script = made.script
    guidance = "" if script.guidance is None else f", guidance {script.guidance:g}"
    facts = f"{script.model}, {script.width} × {script.height}, {script.steps} steps{guidance}, seed {script.seed}"
    seeds = ", ".join(str(panel.seed) for panel in script.panels)
    return "\n".join([f"{facts}; seeds of the panels {seeds}", *made.report])
