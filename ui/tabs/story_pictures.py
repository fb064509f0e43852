"""The part of the story tab where a character is given a picture of one's own, and two clicks say where it is in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...pipelines.files import ENDINGS
from ..image_job import View
from ..jobs import one_line
from ..story_files import KEPT, keep_picture
from ..story_form import OWN, PLACES, Table, box_text, people, places_in, with_place
from ..story_job import own_picture
from .events import on
from .status import status_html

PREFIX = "story-own-"
SMALLEST = 8  # pixels; two clicks nearer than that mark no place
ABOUT = (
    "A character can follow a picture of its own. The model makes it from what the table says that it shows, unless you give "
    "one here; then say there what yours shows. It is cut to the shape of the story, around the place you mark, and kept with "
    f"at most {KEPT} pixels a side."
)


def pictures(names: Sequence[str]) -> dict[str, Any]:
    """Lay out the part; `names` are the first characters."""
    own: dict[str, Any] = {"corner": gr.State(None)}
    with gr.Accordion("Give a character your own picture", open=False, elem_id=f"{PREFIX}fold") as own["fold"]:
        gr.Markdown(ABOUT)
        own["who"] = gr.Radio(list(names), value=names[0], label="Character", elem_id=f"{PREFIX}who")
        own["picture"] = gr.Image(
            label="Your picture",
            show_label=False,
            type="pil",
            format="png",
            interactive=False,
            visible=False,
            height=300,
            buttons=[],
            elem_id=f"{PREFIX}picture",
            elem_classes="shown-picture clicked-picture",
        )
        own["hint"] = gr.HTML(
            status_html(_without(names[0])),
            padding=False,
            elem_id=f"{PREFIX}hint",
            elem_classes="status-line",
        )
        own["give"] = gr.UploadButton(
            "Choose a picture (PNG, JPEG, WebP)",
            file_types=list(ENDINGS),
            type="filepath",
            size="md",
            elem_id=f"{PREFIX}give",
        )
        with gr.Row(visible=False) as own["there"]:
            own["forget"] = gr.Button("Forget the place marked", size="sm", elem_id=f"{PREFIX}forget")
            own["take"] = gr.Button("Take the picture away", size="sm", elem_id=f"{PREFIX}take")
    return own


def folder_of(component: Any) -> Path:
    """Where this page keeps pictures that were given; it is gone when the page ends, stories have copies."""
    return Path(component.GRADIO_CACHE) / "own-pictures"


def connect(form: dict[str, Any], own: dict[str, Any]) -> None:
    """Say what choosing a character, giving and taking away its picture, and clicks into it do."""
    folder = folder_of(own["picture"])
    table = form["places"]

    def look(
        who: str | None, given: dict[str, str], characters: Table, places: Table, corner: list[int] | None = None
    ) -> dict[Any, Any]:
        """The part as it is now."""
        names = people(characters, given)
        who = who if who in names else next(iter(names), None)
        choices = [(f"{name} ✓" if name in given else name, name) for name in names]
        updates: dict[Any, Any] = {own["who"]: gr.update(choices=choices, value=who), own["corner"]: corner}
        there = who in given
        updates[own["there"]] = gr.update(visible=there)
        if not there:
            view = View("Name a character in the table first.") if who is None else _without(who)
            return updates | {own["picture"]: gr.update(value=None, visible=False), own["hint"]: _hint(view)}
        assert who is not None
        try:
            picture = own_picture(given[who], who, names, places, corner)
        except (ValueError, TypeError) as error:
            return updates | {own["hint"]: _hint(View(one_line(error), "bad"))}
        return updates | {
            own["picture"]: gr.update(value=picture, visible=True),
            own["hint"]: _hint(_with(who, corner is not None, bool(places_in(places).get((OWN, who))))),
        }

    def choose(who: str | None, given: dict[str, str], characters: Table, places: Table) -> dict[Any, Any]:
        return look(who, given, characters, places)

    def give(path: str, who: str | None, given: dict[str, str], characters: Table, places: Table) -> dict[Any, Any]:
        if who is None:
            return look(who, given, characters, places)
        try:
            given = {**given, who: keep_picture(Path(path), who, folder)}
        except (ValueError, OSError) as error:
            return {own["hint"]: _hint(View(one_line(error), "bad"))}
        return changed(who, given, characters, places, None)  # a place in another picture is none in this

    def take(who: str, given: dict[str, str], characters: Table, places: Table) -> dict[Any, Any]:
        given = {name: file for name, file in given.items() if name != who}
        return changed(who, given, characters, places, None)

    def forget(who: str, given: dict[str, str], characters: Table, places: Table) -> dict[Any, Any]:
        return changed(who, given, characters, places, None)

    def click(
        who: str,
        given: dict[str, str],
        characters: Table,
        places: Table,
        corner: list[int] | None,
        event: gr.SelectData,
    ) -> dict[Any, Any]:
        if who not in given:
            return gr.skip()
        point = [int(side) for side in event.index]
        if corner is None:
            return look(who, given, characters, places, point)
        (left, right), (top, bottom) = (sorted(pair) for pair in zip(corner, point, strict=True))
        if min(right - left, bottom - top) < SMALLEST:  # a second click on the same spot takes the first back
            return look(who, given, characters, places)
        try:
            width, height = own_picture(given[who], who, [who]).size
        except ValueError as error:
            return {own["hint"]: _hint(View(one_line(error), "bad"))}
        box = box_text((left / width, top / height, right / width, bottom / height))
        return changed(who, given, characters, places, box)

    def changed(who: str, given: dict[str, str], characters: Table, places: Table, where: str | None) -> dict[Any, Any]:
        """The part and the table after a change of pictures or of the place in one."""
        places = with_place(places, OWN, who, where)
        shown = places or [[""] * len(PLACES)]
        return {form["pictures"]: given, table: gr.update(value=shown)} | look(who, given, characters, places)

    now = [own["who"], form["pictures"], form["characters"], table]
    seen = [own[name] for name in ("who", "picture", "hint", "there", "corner")]
    changes: list[tuple[Any, Callable[..., Any], list[Any]]] = [
        (own["give"].upload, give, [own["give"], *now]),
        (own["take"].click, take, now),
        (own["forget"].click, forget, now),
        (own["picture"].select, click, [*now, own["corner"]]),
    ]
    for trigger, function, inputs in changes:
        on([trigger], function, inputs, [*seen, form["pictures"], table])
    anew = [own["who"].input, table.input, form["characters"].change, form["pictures"].change]
    on(anew, choose, now, seen, mode="always_last")


def _without(who: str) -> View:
    return View(f"{who} has no picture of yours; the model draws one.")


def _with(who: str, half: bool, placed: bool) -> View:
    if half:
        return View(f"Now click the opposite corner of {who}'s place.")
    if placed:
        return View(f"{who} is drawn after what is in the frame. Two more clicks put the frame elsewhere.", "good")
    return View(
        f"{who} is drawn after this picture. If it shows more than {who}: click two opposite corners around {who}.",
        "good",
    )


def _hint(view: View) -> Any:
    return gr.update(value=status_html(view))
