"""The form of the story tab: tables of characters, panels and places -> `Script`, and back. Plain functions, no Gradio.

Pictures of one's own are files that `story_files` keeps. What the form has no field for (masks, where a rehearsal found
somebody, other attention, a bank) is kept from the story that filled it, as JSON in the field "kept", and stays as long as
what it belongs to is not changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..pipelines.masks import as_place
from ..pipelines.script import OTHER_PICTURES, Panel, Script, Subject
from .attention_form import as_text
from .image_job import attention_words, check_model, number, whole

__all__ = [
    "CHARACTERS", "FIELDS", "MASK", "NOT_HERE", "OWN", "PANELS", "PLACES", "START", "Table", "box_text", "fill_story_form",
    "kept_words", "people", "places_in", "read_place", "read_story_form", "with_place",
]  # fmt: skip

FIELDS = (
    "characters", "panels", "places", "strength", "together", "steps", "seed", "width", "height", "negative", "model",
    "guidance", "dtype", "pictures", "kept",
)  # fmt: skip
CHARACTERS = ("Name", "Words in the captions", "How it looks", "What its own picture shows", "Seed")
PANELS = ("Caption", "Seed")
PLACES = ("Panel", "Who", "Left, top, right, bottom")
OWN = "own"  # in place of a panel's number: the character's own picture
MASK = "mask"  # in place of a box: the mask of the story that was loaded
NOT_HERE = "not here"  # in place of a box: in the caption, but left to the model
Table = list[list[Any]]

START = Script(
    subjects=(
        Subject(name="Flora", phrase="butterfly", looks="orange butterfly", prompt="an orange butterfly on sea"),
        Subject(name="Hill", phrase="house", looks="blue house", prompt="a blue house on sea"),
    ),
    panels=tuple(Panel(prompt=f"a butterfly and a house on {where}") for where in ("sand", "snow", "grass")),
)


def read_story_form(form: Mapping[str, Any], models: Sequence[str]) -> Script:
    """The story the form asks for. Empty seeds, size and guidance are left open.

    Args:
        form: FIELDS; "characters", "panels" and "places" are tables, lists of rows. Empty rows count for nothing.
            "pictures" are files by the names of characters.
        models: the models this page offers.

    Raises:
        ValueError, TypeError: one sentence about the first field that cannot be used.
    """
    check_model(form["model"], models)
    old = Script.from_json(form["kept"]) if form["kept"] else None
    subjects = tuple(_subject(i, *row) for i, row in enumerate(_rows(form["characters"], len(CHARACTERS)), start=1))
    subjects = _pictured(subjects, form["pictures"] or {})
    panels = tuple(_panel(i, *row) for i, row in enumerate(_rows(form["panels"], len(PANELS)), start=1))
    script = Script(
        subjects=subjects,
        panels=panels,
        negative=(form["negative"] or "").strip(),
        model=form["model"],
        width=whole("width", form["width"]),
        height=whole("height", form["height"]),
        steps=whole("number of steps", form["steps"]),  # type: ignore[arg-type]  # Script refuses None
        guidance=number("guidance", form["guidance"]),
        seed=whole("seed", form["seed"]),
        dtype=form["dtype"] or None,
        strength=number("strength", form["strength"]),  # type: ignore[arg-type]
        together=whole("number of panels in one call", form["together"]),  # type: ignore[arg-type]
        **({} if old is None else {name: getattr(old, name) for name in ("attention", "consistency", "bank")}),
    )
    script = _placed(script, places_in(form["places"]), old)
    return script if old is None else _found_before(script, old)


def fill_story_form(script: Script, models: Sequence[str]) -> dict[str, Any]:
    """The form that asks for this story: every field of FIELDS.

    Raises:
        ValueError, TypeError: the story asks for what this page cannot do, or has a place that cannot be read.
    """
    check_model(script.model, models)
    for one in script.subjects:
        _where(one.name, one.found)  # raises
    places = [[OWN, one.name, _where(one.name, one.place)] for one in script.subjects if one.place is not None]
    for i, panel in enumerate(script.panels, start=1):
        there, usual = script.present(panel), script.present(replace(panel, places=None))
        places += [[str(i), name, _where(name, there[name])] for name in there if name not in usual or there[name]]
        places += [[str(i), name, NOT_HERE] for name in usual if name not in there]
        for name, where in (panel.found or {}).items():
            _where(name, where)  # raises
    names = ("negative", "model", "steps", "strength", "together")
    open_ones = ("width", "height", "guidance", "seed", "dtype")
    return {
        "characters": [[one.name, one.phrase, one.looks, one.prompt, as_text(one.seed)] for one in script.subjects],
        "panels": [[panel.prompt, as_text(panel.seed)] for panel in script.panels],
        "places": places,
        "pictures": {one.name: one.picture for one in script.subjects if one.picture is not None},
        **{name: getattr(script, name) for name in names},
        **{name: as_text(getattr(script, name)) for name in open_ones},
        "kept": script.to_json(),
    }


def kept_words(script: Script) -> str:
    """What a story brings that the form has no field for, in words; empty if there is nothing."""
    said = []
    if script.attention:
        said.append(f"{attention_words(script.attention)} attention for other layers")
    if script.bank is not None:
        said.append(f"a bank of references of at most {script.bank:,} bytes")
    said += [f"{name} = {value}" for name, value in script.consistency.items()]
    return "; ".join(said)


def places_in(table: Table) -> dict[tuple[str, str], str]:
    """(panel number from 1 or OWN, name) -> where, as the table says it. Raises ValueError for half or double rows."""
    places: dict[tuple[str, str], str] = {}
    for panel, who, where in _rows(table, len(PLACES)):
        panel = _number(panel)
        if not panel or not who:
            raise ValueError("A row of the places says no panel or not who; fill in both, or empty the row.")
        if (panel, who) in places:
            raise ValueError(f"The place of {who!r} in panel {panel} is given twice; empty one of the rows.")
        places[panel, who] = where
    return places


def people(characters: Table, pictures: Mapping[str, str]) -> list[str]:
    """Who can have a picture: the names in the table of characters, and whoever still has one."""
    return list(dict.fromkeys([*(row[0] for row in _rows(characters, len(CHARACTERS)) if row[0]), *pictures]))


def with_place(table: Table, panel: int | str, who: str, where: str | None) -> Table:
    """The table of places with one place changed, or without it (None); panel is counted from 0, or OWN."""
    place = OWN if panel == OWN else str(int(panel) + 1)
    rows = [row for row in _rows(table, len(PLACES)) if (_number(row[0]), row[1]) != (place, who)]
    rows += [] if where is None else [[place, who, where]]

    def order(row: list[Any]) -> int:
        panel = _number(row[0])
        return 0 if panel == OWN else int(panel) if panel.isdecimal() else 10**9

    return sorted(rows, key=order)


def box_text(box: Sequence[float]) -> str:
    """A box as people read it, to a thousandth of the side."""
    return ", ".join(f"{round(edge, 3):g}" for edge in box)


def _number(panel: str) -> str:
    """What a row of the places says of its panel, with one spelling for each: "Panel 1" and "01" are "1"."""
    panel = panel.lower().removeprefix("panel").strip()
    return str(int(panel)) if panel.isdecimal() else panel


def _rows(table: Table, columns: int) -> Table:
    """The rows with anything in them, as stripped text."""
    rows = [["" if cell is None else str(cell).strip() for cell in row] for row in table or []]
    return [(row + [""] * columns)[:columns] for row in rows if any(row)]


def _subject(row: int, name: str, phrase: str, looks: str, prompt: str, seed: str) -> Subject:
    if not name:
        raise ValueError(f'Row {row} of the characters has no name; give it one, such as "Tom".')
    return Subject(name=name, phrase=phrase, looks=looks, prompt=prompt, seed=whole(f"seed of {name!r}", seed))


def _pictured(subjects: Sequence[Subject], pictures: Mapping[str, str]) -> tuple[Subject, ...]:
    """The characters with the pictures that were given for them."""
    names = [one.name for one in subjects]
    for name, file in pictures.items():
        if name not in names:
            raise ValueError(
                f"There is a picture for {name!r}, who is no character; there are {', '.join(names)}. Take the "
                "picture away, or call a character so again."
            )
        if not Path(file).exists():
            raise ValueError(f"The picture for {name!r} is no longer there; give it again.")
    return tuple(replace(one, picture=pictures.get(one.name)) for one in subjects)


def _panel(row: int, caption: str, seed: str) -> Panel:
    if not caption:
        raise ValueError(f"Panel {row} has no caption; say what it shows.")
    return Panel(prompt=caption, seed=whole(f"seed of panel {row}", seed))


def _placed(script: Script, places: Mapping[tuple[str, str], str], old: Script | None) -> Script:
    """The story with everybody where the table of places says."""
    names = [one.name for one in script.subjects]
    for place, who in places:
        if who not in names:
            raise ValueError(f"The places name {who!r}, who is no character; there are {', '.join(names)}.")
        if place != OWN and not (place.isdecimal() and 1 <= int(place) <= len(script.panels)):
            raise ValueError(
                f"The places name the panel {place!r}; there are panels 1 to {len(script.panels)}, and {OWN!r} for "
                "the character's own picture."
            )
    panels = []
    for i, panel in enumerate(script.panels):
        rows = {who: where for (number, who), where in places.items() if number == str(i + 1)}
        before = old.panels[i].places if old is not None and i < len(old.panels) else None
        there = script.present(panel) | {who: read_place(who, where, before) for who, where in rows.items()}
        there = {who: where for who, where in there.items() if rows.get(who, "").lower() != NOT_HERE}
        panels.append(replace(panel, places=there) if rows else panel)
    subjects = []
    for one in script.subjects:
        if (OWN, one.name) in places:
            same = [other.place for other in old.subjects if other.name == one.name] if old is not None else []
            one = replace(one, place=read_place(one.name, places[OWN, one.name], {one.name: same[0]} if same else None))
        subjects.append(one)
    return replace(script, subjects=tuple(subjects), panels=tuple(panels))


def read_place(who: str, where: str, before: Mapping[str, Any] | None) -> Any:
    """A place as the script has it: a box, a mask that was there before, or None."""
    if where.lower() in ("", NOT_HERE):
        return None
    if where.lower() == MASK:
        kept = (before or {}).get(who)
        if not isinstance(kept, Mapping):
            raise ValueError(f"There is no mask of {who!r} to keep; give a box: left, top, right, bottom.")
        return kept
    words = [word for word in re.split(r"[\s,;()\[\]]+", where) if word]
    try:
        box = [float(word) for word in words]
    except ValueError:
        box = []
    if len(box) != 4:
        raise ValueError(
            f"The place of {who!r} must be four numbers (left, top, right, bottom) from 0 to 1, such as "
            f"0.1, 0.2, 0.5, 0.9; got {where[:60]!r}."
        )
    as_place(who, box)  # raises
    return box


def _where(name: str, where: Any) -> str:
    """A script's place as the table says it. Raises for one that cannot be read."""
    if where is None:
        return ""
    as_place(name, where)
    return MASK if isinstance(where, Mapping) else ", ".join(str(edge) for edge in where)


def _found_before(script: Script, old: Script) -> Script:
    """With what rehearsals found before, where the same rehearsal would find it again."""
    if any(getattr(script, name) != getattr(old, name) for name in (*OTHER_PICTURES, "negative")):
        return script
    before = {one.name: one for one in old.subjects}

    def same_seed(seed: int | None, other: int | None) -> bool:
        return seed == other if other is not None else seed is None and script.seed == old.seed

    subjects = tuple(
        replace(one, found=was.found)
        if (was := before.get(one.name)) is not None
        and (one.phrase, one.drawn, one.picture) == (was.phrase, was.drawn, was.picture)
        and same_seed(one.seed, was.seed)
        else one
        for one in script.subjects
    )
    same_words = {one.name for one in script.subjects if one.phrase == getattr(before.get(one.name), "phrase", None)}
    panels = tuple(
        replace(panel, found=was.found)
        if was.found is not None
        and panel.prompt == was.prompt
        and same_seed(panel.seed, was.seed)
        and {name for name, where in script.present(panel).items() if where is None} <= same_words & set(was.found)
        else panel
        for panel, was in zip(script.panels, old.panels, strict=False)
    )
    return replace(script, subjects=subjects, panels=(*panels, *script.panels[len(panels) :]))
