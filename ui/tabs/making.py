"""A tab that makes something: its form on the left, on the right what comes of it, and the wires between them.

Its components have a prefix in `elem_id`, so that two such tabs can stand on one page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ...pipelines.recipe import Recipe
from ..image_job import View, load_recipe, make_image, summary
from ..jobs import Made, Session, Worker
from .events import on, stop_run
from .status import copy_of, shown_picture, status, status_html, told

__all__ = ["Form", "lay_out"]


@dataclass(frozen=True)
class Form:
    """How one tab turns its form into a recipe and back.

    Attributes:
        read: form and models to recipe; raises one sentence.
        fill: recipe and models to form; raises one sentence.
        models: names or folders the page offers; the first is chosen.
    """

    read: Callable[[Mapping[str, Any], Sequence[str]], Recipe]
    fill: Callable[[Recipe, Sequence[str]], dict[str, Any]]
    models: Sequence[str]


def lay_out(
    worker: Worker,
    prefix: str,
    controls: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
    how: Form,
    film: bool = False,
) -> None:
    """A tab with its form on the left and what comes of it on the right, connected.

    controls: draws the left column; gives form fields by name, and the group of settings of each attention.
    film: what comes of it are films, which can be played, and gone on with after a stop.
    """
    session = gr.State(Session(worker), delete_callback=stop_run)
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=340):
            form, groups = controls()
        with gr.Column(scale=6, min_width=340):
            screen = results(prefix, film)
    connect(session, form, groups, screen, how)


def results(prefix: str, film: bool = False) -> dict[str, Any]:
    """The right column of a tab: picture, progress line, what can be done with the result, and earlier results.

    Of a film the picture is a contact sheet, with a player below.
    """
    screen: dict[str, Any] = {}
    screen["picture"] = gr.Image(
        label="Picture",
        show_label=False,
        type="filepath",
        format="png",
        interactive=False,
        height=460,
        buttons=["download", "fullscreen"],
        elem_id=f"{prefix}picture",
        elem_classes="shown-picture",
    )
    screen["status"] = status(prefix)
    if film:
        screen["film"] = gr.Video(
            label="Film",
            show_label=False,
            interactive=False,
            visible=False,
            height=340,
            loop=True,
            buttons=[],
            elem_id=f"{prefix}film",
        )
        with gr.Row():
            screen["go_on"] = gr.Button("Go on", variant="primary", size="md", visible=False, elem_id=f"{prefix}go-on")
            screen["save_film"] = gr.DownloadButton(
                "Download film", size="md", interactive=False, elem_id=f"{prefix}save-film"
            )
    screen["facts"] = gr.Textbox(
        label="Made with", interactive=False, visible=False, elem_id=f"{prefix}facts", max_lines=3
    )
    with gr.Row():
        screen["use_seed"] = gr.Button("Use this seed", size="md", interactive=False, elem_id=f"{prefix}use-seed")
        screen["use_all"] = gr.Button(
            "Use these settings", size="md", interactive=False, elem_id=f"{prefix}use-settings"
        )
        screen["save"] = gr.DownloadButton(
            "Download recipe", size="md", interactive=False, elem_id=f"{prefix}save-recipe"
        )
    screen["history"] = gr.Gallery(
        label=f"{'Films' if film else 'Pictures'} of this session",
        show_label=False,
        columns=6,
        height=190,
        object_fit="cover",
        fit_columns=False,
        allow_preview=False,
        interactive=False,
        buttons=[],
        type="filepath",
        visible=False,
        elem_id=f"{prefix}history",
    )
    return screen


def connect(session: gr.State, form: dict[str, Any], groups: dict[str, Any], screen: dict[str, Any], how: Form) -> None:
    """Say what each component of the tab does."""
    generate, stop, load = form.pop("generate"), form.pop("stop"), form.pop("load")
    names, fields = list(form), list(form.values())

    film = "film" in screen

    def run(session: Session, *values: Any) -> Iterator[dict[Any, Any]]:
        yield from shown(session, make_image(session, dict(zip(names, values, strict=True)), how.models, how.read))

    def go_on(session: Session) -> Iterator[dict[Any, Any]]:
        kept = session.kept
        if kept is not None:
            yield from shown(session, make_image(session, {}, how.models, lambda *_: kept.recipe))

    def shown(session: Session, views: Iterator[View]) -> Iterator[dict[Any, Any]]:
        begun = False
        for view in views:
            updates = told(view, [generate], stop, screen["status"])
            if view.picture is not None:
                updates[screen["picture"]] = shown_picture(view.picture)
            if film:
                updates[screen["go_on"]] = gr.update(visible=session.kept is not None and not view.busy)
                if view.film is not None and view.busy:
                    if (copied := copy_of(view.film, screen["film"])) is not None:
                        updates[screen["film"]] = gr.update(value=copied, visible=True)
                elif view.film is not None:
                    updates[screen["film"]] = gr.update(value=str(view.film), visible=True)
                    updates[screen["save_film"]] = gr.update(value=str(view.film), interactive=True)
                elif view.busy and not begun:  # an earlier film is not this one
                    updates[screen["film"]] = gr.update(value=None, visible=False)
                begun = begun or view.busy
            if view.made is not None:
                files = [str(made.picture) for made in session.history]
                updates |= {screen["history"]: gr.update(value=files, visible=True)} | about(view.made)
            yield updates

    def about(made: Made) -> dict[Any, Any]:
        """Facts and buttons of the result that is shown."""
        return {
            screen["facts"]: gr.update(value=summary(made.recipe), visible=True),
            screen["use_seed"]: gr.update(interactive=True),
            screen["use_all"]: gr.update(interactive=True),
            screen["save"]: gr.update(value=str(made.recipe_file), interactive=True),
            **({screen["save_film"]: gr.update(value=str(made.file), interactive=True)} if film else {}),
        }

    def show(session: Session, event: gr.SelectData) -> dict[Any, Any]:
        made = session.show(event.index)
        if made is None:
            return gr.skip()
        if session.busy:  # leave a running preview alone
            return about(made)
        player = {screen["film"]: gr.update(value=str(made.film), visible=True)} if film else {}
        return about(made) | {screen["picture"]: str(made.picture)} | player

    def fill(values: Mapping[str, Any]) -> dict[Any, Any]:
        return {
            form[name]: value if isinstance(form[name], gr.State) else gr.update(value=value)
            for name, value in values.items()
        }

    def upload(path: str) -> dict[Any, Any]:
        values, view = load_recipe(Path(path), how.models, how.fill)
        return {screen["status"]: gr.update(value=status_html(view))} | fill(values)

    def use_all(session: Session) -> dict[Any, Any]:
        return fill(how.fill(session.shown.recipe, how.models)) if session.shown else gr.skip()

    def use_seed(session: Session) -> dict[Any, Any]:
        return fill({"seed": str(session.shown.recipe.seed)}) if session.shown else gr.skip()

    def show_settings(attention: str) -> dict[Any, Any]:
        return {group: gr.update(visible=name == attention) for name, group in groups.items()}

    events: tuple[tuple[Any, ...], ...] = (
        # what happens, what it calls, from what, to what, and whether it waits in Gradio's queue, as it has to where a
        # `gr.State` may change that somebody listens to
        ([generate.click, form["prompt"].submit], run, [session, *fields], [generate, stop, *screen.values()], True),
        *([([screen["go_on"].click], go_on, [session], [generate, stop, *screen.values()], True)] if film else []),
        ([stop.click], stop_run, [session], [], False),
        ([load.upload], upload, [load], [screen["status"], *fields], True),
        ([screen["use_seed"].click], use_seed, [session], fields, False),
        ([screen["use_all"].click], use_all, [session], fields, True),
        ([screen["history"].select], show, [session], list(screen.values()), False),
    )
    for triggers, function, inputs, outputs, queue in events:
        on(triggers, function, inputs, outputs, queue)
    if groups:
        on(
            [form["attention"].change],
            show_settings,
            [form["attention"]],
            list(groups.values()),
            mode="always_last",
        )
