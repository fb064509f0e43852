"""The right column of the story tab: the strip, and one panel of it to look at, to say who is where, and to make again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from ...pipelines.script import Script
from ..image_job import View
from ..jobs import Session, one_line
from ..story_form import Table, box_text, with_place
from ..story_job import GONE, StoryMade, found_places, make_story, panel_picture, story_words, strip_picture
from .events import on, stop_run
from .status import shown_picture, status, status_html, told

PREFIX = "story-"
SMALLEST = 8  # pixels; two clicks nearer than that mark no place


def results() -> tuple[dict[str, Any], dict[str, Any]]:
    """Lay out the column: what shows the story, and what shows one panel."""
    screen: dict[str, Any] = {}
    screen["picture"] = gr.Image(
        label="Story",
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        height=260,
        buttons=["fullscreen"],
        elem_id=f"{PREFIX}picture",
        elem_classes="shown-picture",
    )
    screen["status"] = status(PREFIX)
    with gr.Row(visible=False) as screen["made"]:
        screen["strip"] = gr.DownloadButton("Download strip", size="sm", elem_id=f"{PREFIX}save-strip")
        screen["save"] = gr.DownloadButton("Download story", size="sm", elem_id=f"{PREFIX}save-story")
        screen["use_all"] = gr.Button("Use these settings", size="sm", elem_id=f"{PREFIX}use-settings")
    with gr.Column(visible=False) as screen["below"]:
        screen["over"] = gr.Checkbox(label="Show in the strip who is where", elem_id=f"{PREFIX}over", container=False)
        gr.Markdown("The characters' own pictures")
        screen["own"] = gr.Gallery(
            label="The characters' own pictures",
            show_label=False,
            columns=6,
            height=120,
            object_fit="contain",
            fit_columns=False,
            allow_preview=False,
            interactive=False,
            buttons=[],
            type="filepath",
            elem_id=f"{PREFIX}own",
        )
        panel = _one_panel()
        screen["facts"] = gr.Textbox(label="Made with", interactive=False, elem_id=f"{PREFIX}facts", max_lines=8)
    screen["earlier"] = gr.Markdown("Stories of this session, newest first", visible=False)
    screen["history"] = gr.Gallery(
        label="Stories of this session",
        show_label=False,
        columns=2,
        height=170,
        object_fit="contain",
        allow_preview=False,
        interactive=False,
        buttons=[],
        type="filepath",
        visible=False,
        elem_id=f"{PREFIX}history",
        elem_classes="shown-strips",
    )
    return screen, panel


def _one_panel() -> dict[str, Any]:
    panel: dict[str, Any] = {"corner": gr.State(None)}
    gr.Markdown("### One panel")
    with gr.Group():
        with gr.Row():
            panel["number"] = gr.Radio([("1", 0)], value=0, label="Panel", elem_id=f"{PREFIX}number")
            panel["who"] = gr.Radio([""], label="Whose place two clicks mark", elem_id=f"{PREFIX}who")
        panel["picture"] = gr.Image(
            label="Panel",
            show_label=False,
            type="pil",
            format="png",
            interactive=False,
            height=360,
            buttons=[],
            elem_id=f"{PREFIX}panel-picture",
            elem_classes="shown-picture clicked-picture",
        )
    panel["hint"] = gr.HTML(padding=False, elem_id=f"{PREFIX}hint", elem_classes="status-line")
    with gr.Row():
        panel["again"] = gr.Button("Make this panel again", variant="primary", size="md", elem_id=f"{PREFIX}again")
        panel["reseeded"] = gr.Button("… with another seed", size="md", elem_id=f"{PREFIX}reseeded")
    with gr.Row():
        panel["forget"] = gr.Button("Forget the place marked", size="sm", elem_id=f"{PREFIX}forget")
        panel["take"] = gr.Button("Write the found places into the table", size="sm", elem_id=f"{PREFIX}take")
    return panel


def connect(
    session: gr.State,
    form: dict[str, Any],
    buttons: dict[str, Any],
    screen: dict[str, Any],
    panel: dict[str, Any],
    models: Sequence[str],
    fill: Callable[[Script], dict[Any, Any]],
    filled: list[Any],
) -> None:
    """Say what each component of the column, and the buttons that make and stop, do.

    fill: updates of `filled`, the form's components, for a story.
    """
    names, fields = list(form), list(form.values())
    starts = (buttons["make"], panel["again"], panel["reseeded"])
    shown = [*screen.values(), panel["number"], panel["who"], panel["picture"], panel["hint"], panel["corner"]]

    def runs(of_panel: bool, new_seed: bool) -> Callable[..., Iterator[dict[Any, Any]]]:
        def run(session: Session, number: int, *values: Any) -> Iterator[dict[Any, Any]]:
            given = dict(zip(names, values, strict=True))
            for view in make_story(session, given, models, panel=number if of_panel else None, new_seed=new_seed):
                updates = told(view, starts, buttons["stop"], screen["status"])
                if view.picture is not None:
                    updates[screen["picture"]] = shown_picture(view.picture)
                yield updates

        return run

    def about(session: Session, number: int, who: str, over: bool, places: Table) -> dict[Any, Any]:
        """Everything that shows the session's story; panel `number` is the one that is looked at."""
        made: StoryMade = session.shown
        if not made.folder.is_dir():
            return {panel["hint"]: _hint(View(GONE, "bad"))}
        session.history = [one for one in session.history if one.strip_file.exists()]
        people = [one.name for one in made.script.subjects]
        who = who if who in people else people[0]
        number = min(number, len(made.script.panels) - 1)
        strips = [str(one.strip_file) for one in session.history]
        return {
            screen["picture"]: shown_picture(strip_picture(made, over)),
            screen["made"]: gr.update(visible=True),
            screen["below"]: gr.update(visible=True),
            screen["strip"]: gr.update(value=str(made.strip_file)),
            screen["save"]: gr.update(value=str(made.story_file)),
            screen["own"]: gr.update(
                value=[(str(file), name) for name, file in made.own.items()], visible=bool(made.own)
            ),
            screen["facts"]: gr.update(value=story_words(made)),
            screen["history"]: gr.update(value=strips, visible=len(strips) > 1),
            screen["earlier"]: gr.update(visible=len(strips) > 1),
            panel["number"]: gr.update(choices=[(str(i + 1), i) for i in range(len(made.script.panels))], value=number),
            panel["who"]: gr.update(choices=people, value=who),
            panel["corner"]: None,
        } | _look(panel, made, number, who, places)

    def after(session: Session, number: int, who: str, over: bool, places: Table) -> dict[Any, Any]:
        """What a run has made, seen as the person has chosen by now."""
        if session.shown is None or session.busy:
            return gr.skip()
        return about(session, number, who, over, places)

    def show(
        session: Session, number: int, who: str, over: bool, places: Table, event: gr.SelectData
    ) -> dict[Any, Any]:
        return gr.skip() if session.show(event.index) is None else about(session, number, who, over, places)

    def lay_over(session: Session, over: bool) -> dict[Any, Any]:
        if session.shown is None or session.busy:
            return gr.skip()
        if not session.shown.folder.is_dir():
            return {panel["hint"]: _hint(View(GONE, "bad"))}
        return {screen["picture"]: shown_picture(strip_picture(session.shown, over))}

    def use_all(session: Session) -> dict[Any, Any]:
        return gr.skip() if session.shown is None else fill(session.shown.script)

    now = [session, panel["number"], panel["who"], screen["over"]]
    outputs = [*starts, buttons["stop"], screen["status"], screen["picture"]]
    for button, run in zip(starts, (runs(False, False), runs(True, False), runs(True, True)), strict=True):
        ended = on([button.click], run, [session, panel["number"], *fields], outputs, queue=True)
        inputs = [*now, form["places"]]  # as they are at the end
        ended.then(after, inputs, shown, queue=False, show_progress="hidden", api_visibility="private")
    on([buttons["stop"].click], stop_run, [session], [])
    over_outputs = [screen["picture"], panel["hint"]]
    on([screen["over"].input], lay_over, [session, screen["over"]], over_outputs, mode="always_last")
    on([screen["use_all"].click], use_all, [session], filled)
    on([screen["history"].select], show, [*now, form["places"]], shown)
    _connect_panel(session, form["places"], panel)


def _connect_panel(session: gr.State, table: Any, panel: dict[str, Any]) -> None:
    """What looking at one panel, and saying who is where in it, do."""

    def changed(
        session: Session, number: int, who: str, places: Table, change: Callable[[Table], Table] | None = None
    ) -> dict[Any, Any]:
        """The panel again, after a change of the table of places."""
        if session.shown is None:
            return gr.skip()
        updates: dict[Any, Any] = {panel["corner"]: None}
        try:
            if change is not None:
                places = updates[table] = change(places)
        except (ValueError, TypeError) as error:
            return {panel["hint"]: _hint(View(one_line(error), "bad"))}
        return updates | _look(panel, session.shown, number, who, places)

    def choose(session: Session, number: int, who: str, places: Table) -> dict[Any, Any]:
        return changed(session, number, who, places)

    def click(
        session: Session, number: int, who: str, places: Table, corner: list[int] | None, event: gr.SelectData
    ) -> dict[Any, Any]:
        if session.shown is None:
            return gr.skip()
        point = [int(side) for side in event.index]
        if corner is None:
            return {panel["corner"]: point} | _look(panel, session.shown, number, who, places, point)
        (left, right), (top, bottom) = (sorted(pair) for pair in zip(corner, point, strict=True))
        if min(right - left, bottom - top) < SMALLEST:  # a second click on the same spot takes the first back
            return changed(session, number, who, places)

        def boxed(rows: Table) -> Table:
            width, height = session.shown.panel(number).size
            box = box_text((left / width, top / height, right / width, bottom / height))
            return with_place(rows, number, who, box)

        return changed(session, number, who, places, boxed)

    def forget(session: Session, number: int, who: str, places: Table) -> dict[Any, Any]:
        return changed(session, number, who, places, lambda rows: with_place(rows, number, who, None))

    def take(session: Session, number: int, who: str, places: Table) -> dict[Any, Any]:
        return changed(session, number, who, places, lambda rows: found_places(session.shown, rows))

    now = [session, panel["number"], panel["who"], table]
    outputs = [panel["picture"], panel["hint"], panel["corner"]]
    on([panel["number"].input, panel["who"].input, table.input], choose, now, outputs, mode="always_last")
    on([panel["picture"].select], click, [*now, panel["corner"]], [*outputs, table])
    on([panel["forget"].click], forget, now, [*outputs, table])
    on([panel["take"].click], take, now, [*outputs, table])


def _look(
    panel: dict[str, Any], made: StoryMade, number: int, who: str, places: Table, corner: list[int] | None = None
) -> dict[Any, Any]:
    """One panel with places over it, and what can be done with it now."""
    try:
        picture = panel_picture(made, number, places, corner)
    except (ValueError, TypeError) as error:
        return {panel["hint"]: _hint(View(one_line(error), "bad"))}
    line = (
        f"Now click the opposite corner of {who}'s place."
        if corner
        else f"If {who} stands elsewhere than in the frame: click two opposite corners around {who}. A place only tells where "
        "a character is; it does not move it there. The caption and the seed are those in the table of panels."
    )
    return {panel["picture"]: picture, panel["hint"]: _hint(View(line))}


def _hint(view: View) -> Any:
    return gr.update(value=status_html(view))
