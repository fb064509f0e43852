"""The story tab: characters, panels and places on the left; `story_results` is the right column.

`story_form` reads and fills its form, `story_job` makes what it asks for.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ...pipelines.files import free_path, written_whole
from ...pipelines.script import Script
from ..image_job import View
from ..jobs import Session, Worker, one_line
from ..story_form import (
    CHARACTERS,
    OWN,
    PANELS,
    PLACES,
    START,
    Table,
    fill_story_form,
    kept_words,
    load_story,
    read_story_form,
)
from . import story_results
from .events import on, stop_run
from .fields import more_controls, size_controls
from .status import status_html

PREFIX = story_results.PREFIX
INTRODUCTION = (
    "Every character first gets a picture of its own. Then each panel is drawn so that its characters look like those "
    "pictures and do not mix."
)
ABOUT_PLACES = (
    "Leave this empty, and everybody is found by the words in the captions. A place is four fractions of the picture, from "
    f"0 (left, top) to 1 (right, bottom). Two clicks into a panel write one here. “{OWN}” in place of a panel's number is "
    "the character's own picture."
)


def story_tab(worker: Worker, models: Sequence[str], out: Path) -> None:
    """Lay out the tab inside the current `gr.Blocks` and connect it.

    Args:
        worker: runs `StoryJob` for all sessions.
        models: names or folders the page offers; the first is chosen.
        out: the folder for stories that are saved before they are made.
    """
    session = gr.State(Session(worker), delete_callback=stop_run)
    gr.Markdown(INTRODUCTION)
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=380):
            form, press = _controls(models)
        with gr.Column(scale=6, min_width=380):
            screen, panel = story_results.results()

    def fill(script: Script) -> dict[Any, Any]:
        return _filled(form, press, fill_story_form(script, models))

    _connect(form, press, screen, models, out)
    buttons = {name: press[name] for name in ("make", "stop")}
    story_results.connect(session, form, buttons, screen, panel, models, fill, [press["kept"], *form.values()])


def _controls(models: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The left column: form fields by name, and buttons."""
    start = fill_story_form(replace(START, model=models[0]), models)
    form: dict[str, Any] = {"kept": gr.State("")}
    press: dict[str, Any] = {}
    label = "Characters: who has to look the same in every panel"
    form["characters"] = _table("characters", label, CHARACTERS, start["characters"], ["16%", "22%", "40%", "22%"])
    label = "Panels: one caption each, any number"
    form["panels"] = _table("panels", label, PANELS, start["panels"], ["78%", "22%"])
    with gr.Row():
        press["add_character"] = gr.Button("Add a character", size="sm", elem_id=f"{PREFIX}add-character")
        press["add_panel"] = gr.Button("Add a panel", size="sm", elem_id=f"{PREFIX}add-panel")
    with gr.Row():
        press["make"] = gr.Button("Make the story", variant="primary", elem_id=f"{PREFIX}generate", scale=3)
        press["stop"] = gr.Button("Stop", variant="stop", elem_id=f"{PREFIX}stop", interactive=False, scale=1)
    with gr.Accordion("Who is where", elem_id=f"{PREFIX}where"):
        gr.Markdown(ABOUT_PLACES)
        form["places"] = _table("places", "Places", PLACES, start["places"], ["18%", "30%", "52%"])
        press["add_place"] = gr.Button("Add a place", size="sm", elem_id=f"{PREFIX}add-place")
    with gr.Group():
        form["strength"] = gr.Slider(
            0,
            1,
            value=1,
            step=0.05,
            label="How closely characters follow their own pictures",
            info="Less leaves more to each panel (strength)",
            elem_id=f"{PREFIX}strength",
            buttons=[],
        )
    size_controls(form, PREFIX)
    with gr.Accordion("More", open=False, elem_id=f"{PREFIX}more"):
        form["together"] = gr.Number(
            1,
            precision=0,
            minimum=1,
            step=1,
            label="Panels made at once",
            info="More is faster and takes more memory (together)",
            elem_id=f"{PREFIX}together",
        )
        more_controls(form, PREFIX, models)
    press["kept"] = gr.HTML(visible=False, padding=False, elem_id=f"{PREFIX}kept")
    with gr.Row():
        press["load"] = gr.UploadButton(
            "Load a story (.json)", file_types=[".json"], type="filepath", size="md", elem_id=f"{PREFIX}load"
        )
        press["write"] = gr.Button("Save this form (.json)", size="md", elem_id=f"{PREFIX}write")
    press["written"] = gr.DownloadButton("Download", size="md", visible=False, elem_id=f"{PREFIX}written")
    return form, press


def _table(name: str, label: str, headers: Sequence[str], rows: Table, widths: list[str]) -> Any:
    return gr.Dataframe(
        rows or [[""] * len(headers)],
        headers=list(headers),
        column_count=len(headers),
        type="array",
        datatype="str",
        label=label,
        interactive=True,
        wrap=True,
        column_widths=widths,
        buttons=[],
        elem_id=f"{PREFIX}{name}",
    )


def _connect(
    form: dict[str, Any], press: dict[str, Any], screen: dict[str, Any], models: Sequence[str], out: Path
) -> None:
    """What adding rows, loading and saving do."""
    names, fields = list(form), list(form.values())

    def said(view: View) -> dict[Any, Any]:
        return {screen["status"]: gr.update(value=status_html(view))}

    def one_more(columns: int) -> Callable[[Table], Table]:
        return lambda rows: [*rows, [""] * columns]

    def upload(path: str) -> dict[Any, Any]:
        values, wrong = load_story(Path(path), models)
        if wrong:
            return said(View(wrong, "bad"))
        return said(View("Story loaded. Press Make the story to make it.", "good")) | _filled(form, press, values)

    def write(*values: Any) -> dict[Any, Any]:
        try:
            script = read_story_form(dict(zip(names, values, strict=True)), models)
            file = free_path(out, script.panels[0].prompt, ".json")
            with written_whole(file) as (aside,):
                aside.write_text(script.to_json() + "\n", encoding="utf-8")
        except (ValueError, TypeError, OSError) as error:
            return said(View(one_line(error), "bad"))
        button = gr.update(value=str(file), label=f"Download {file.name}", visible=True)
        return said(View(f"Saved as {file.name}; the command reattend story reads it too.", "good")) | {
            press["written"]: button
        }

    for button, table, columns in (
        ("add_character", "characters", CHARACTERS),
        ("add_panel", "panels", PANELS),
        ("add_place", "places", PLACES),
    ):
        on([press[button].click], one_more(len(columns)), [form[table]], [form[table]])
    on([press["load"].upload], upload, [press["load"]], [screen["status"], press["kept"], *fields], queue=True)
    on([press["write"].click], write, fields, [screen["status"], press["written"]])


def _filled(form: dict[str, Any], press: dict[str, Any], values: Mapping[str, Any]) -> dict[Any, Any]:
    """Updates that fill the form, and the line about what it has no field for."""
    said = html.escape(kept_words(Script.from_json(values["kept"])))
    updates: dict[Any, Any] = {form[name]: gr.update(value=value) for name, value in values.items()}
    updates[form["places"]] = gr.update(value=values["places"] or [[""] * len(PLACES)])
    updates[form["kept"]] = values["kept"]
    return updates | {
        press["kept"]: gr.update(value=f"Kept from the story that was loaded: {said}.", visible=bool(said))
    }
