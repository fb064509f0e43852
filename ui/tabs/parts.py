"""What every tab has: fields that all pictures need, the screen for results, and the wires between them.

Each tab gives a prefix for `elem_id`, so that two tabs can stand on one page.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio import processing_utils
from PIL import Image

from ...pipelines.recipe import DTYPES, Recipe
from ..attention_form import FIRST, STOCK, Setting, method_label, settings_of
from ..image_job import PICTURE_METHODS, View, load_recipe, make_image, summary
from ..jobs import Made, Session, Worker

SESSIONS = 16  # how many may wait for a picture at once; the worker makes one after another


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


def prompt_controls(form: dict[str, Any], prefix: str, what: str = "picture") -> None:
    """Add the prompt and the two buttons; `what` is made."""
    form["prompt"] = gr.Textbox(
        label=f"What the {what} shows",
        placeholder="a blue car and a cat on sand",
        lines=2,
        max_lines=6,
        elem_id=f"{prefix}prompt",
    )
    with gr.Row():
        form["generate"] = gr.Button("Generate", variant="primary", elem_id=f"{prefix}generate", scale=3)
        form["stop"] = gr.Button("Stop", variant="stop", elem_id=f"{prefix}stop", interactive=False, scale=1)


def size_controls(form: dict[str, Any], prefix: str, of: str = "", what: str = "picture") -> None:
    """Add steps, seed, width and height; `of` says of which picture the size is, such as " of the first size"."""
    with gr.Group():
        with gr.Row():
            form["steps"] = gr.Slider(
                1,
                100,
                value=20,
                step=1,
                precision=0,
                label="Steps",
                info="More is slower and finer",
                elem_id=f"{prefix}steps",
                buttons=[],
            )
            form["seed"] = gr.Textbox(
                label="Seed", placeholder="random", info=f"Same seed, same {what}", elem_id=f"{prefix}seed", max_lines=1
            )
        with gr.Row():
            form["width"] = gr.Textbox(
                label=f"Width in pixels{of}", placeholder="the model's own", max_lines=1, elem_id=f"{prefix}width"
            )
            form["height"] = gr.Textbox(
                label=f"Height in pixels{of}", placeholder="the model's own", max_lines=1, elem_id=f"{prefix}height"
            )


def more_controls(form: dict[str, Any], prefix: str, models: Sequence[str]) -> None:
    """Add what few people change."""
    form["negative"] = gr.Textbox(
        label="What it should not show", info="Negative prompt", elem_id=f"{prefix}negative", max_lines=4
    )
    form["model"] = gr.Dropdown(
        list(models), value=models[0], label="Model", elem_id=f"{prefix}model", filterable=False
    )
    form["guidance"] = gr.Textbox(
        label="How closely the prompt is followed",
        placeholder="the model's own",
        max_lines=1,
        info="Classifier-free guidance, such as 7.5; more is closer and harsher",
        elem_id=f"{prefix}guidance",
    )
    form["dtype"] = gr.Dropdown(
        [("The model's own", ""), *((d, d) for d in DTYPES)],
        value="",
        label="Number format",
        filterable=False,
        info="What the model computes in (dtype)",
        elem_id=f"{prefix}dtype",
    )


def load_control(form: dict[str, Any], prefix: str, what: str = "picture", ending: str = ".png") -> None:
    """Add the button that fills the form from a file."""
    form["load"] = gr.UploadButton(
        f"Load a recipe ({what} or .json)",
        file_types=[ending, ".json"],
        type="filepath",
        size="md",
        elem_id=f"{prefix}load-recipe",
    )


def attention_controls(form: dict[str, Any], prefix: str, info: str) -> dict[str, Any]:
    """Add the choice of attention, and the settings of each; return the group of each, shown when chosen."""
    groups: dict[str, Any] = {}
    with gr.Group():
        form["attention"] = gr.Dropdown(
            [(method_label(name), name) for name in (STOCK, *PICTURE_METHODS)],
            value=STOCK,
            label="Attention",
            info=info,
            elem_id=f"{prefix}attention",
            filterable=False,
        )
        for name, method in PICTURE_METHODS.items():
            settings = settings_of(method)
            first = [s for s in settings if s.name in FIRST.get(name, ())]
            others = [s for s in settings if s not in first]
            with gr.Column(visible=False, elem_id=f"{prefix}settings-{name}", elem_classes="settings") as groups[name]:
                setting_fields(form, prefix, name, first)
                with gr.Accordion(f"More settings of {name} attention", open=not first, elem_id=f"{prefix}more-{name}"):
                    setting_fields(form, prefix, name, others)
    return groups


def setting_fields(form: dict[str, Any], prefix: str, method: str, settings: Sequence[Setting]) -> None:
    """Add settings of an attention, two fields a row."""
    for i in range(0, len(settings), 2):
        with gr.Row():
            for setting in settings[i : i + 2]:
                form[f"{method}.{setting.name}"] = _setting(setting, f"{prefix}{method}-{setting.name}")


def _setting(setting: Setting, elem_id: str) -> Any:
    common = {"label": setting.label, "info": setting.hint, "elem_id": elem_id}
    if setting.kind == "flag":
        return gr.Checkbox(value=setting.default, **common)
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), value=setting.default, filterable=False, **common)
    if setting.kind == "number":
        return gr.Number(value=setting.default, step=1, precision=0, **common)
    return gr.Textbox(
        value=setting.default, placeholder="not changed" if setting.optional else None, max_lines=1, **common
    )


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
        return {form[name]: gr.update(value=value) for name, value in values.items()}

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
        # what happens, what it calls, from what, to what, and whether it waits in Gradio's queue
        ([generate.click, form["prompt"].submit], run, [session, *fields], [generate, stop, *screen.values()], True),
        *([([screen["go_on"].click], go_on, [session], [generate, stop, *screen.values()], True)] if film else []),
        ([stop.click], stop_run, [session], [], False),
        ([load.upload], upload, [load], [screen["status"], *fields], True),
        ([screen["use_seed"].click], use_seed, [session], fields, False),
        ([screen["use_all"].click], use_all, [session], fields, False),
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


def on(
    triggers: list[Any],
    function: Callable[..., Any],
    inputs: list[Any],
    outputs: list[Any],
    queue: bool = False,
    mode: Literal["once", "always_last"] = "once",
) -> Any:
    """Call a function when something happens; give what `.then` goes on from.

    queue: it waits in Gradio's queue.
    mode: what happens again while the function runs is dropped, or the last of it is answered afterwards.
    """
    return gr.on(
        triggers,
        function,
        inputs,
        outputs,
        queue=queue,
        show_progress="hidden",
        trigger_mode=mode,
        concurrency_limit=SESSIONS,
        api_visibility="private",
    )


def stop_run(session: Session) -> None:
    """Outside Gradio's queue, so that it waits for nothing."""
    session.stop()


def copy_of(growing: Path, player: Any) -> str | None:
    """A growing film as it is now; None if it is whole by now, and has another name."""
    try:
        return processing_utils.save_file_to_cache(growing, cache_dir=player.GRADIO_CACHE)
    except FileNotFoundError:
        return None


def shown_picture(picture: Path | Image.Image) -> str | Image.Image:
    """The file itself, never its pixels: a picture that is sent as pixels is encoded again and loses its recipe."""
    return str(picture) if isinstance(picture, Path) else picture


def status(prefix: str) -> gr.HTML:
    """The line that tells what goes on."""
    return gr.HTML(status_html(View("Ready.")), padding=False, elem_id=f"{prefix}status", elem_classes="status-line")


def told(view: View, starts: Sequence[Any], stop: Any, line: Any) -> dict[Any, Any]:
    """Updates of the line, of the buttons that start something, and of the one that stops it."""
    updates = {button: gr.update(interactive=not view.busy) for button in starts}
    return updates | {stop: gr.update(interactive=view.busy), line: gr.update(value=status_html(view))}


def status_html(view: View) -> str:
    """The message as a line that screen readers announce, with a bar while something runs."""
    bar = ""
    if view.busy:
        known = view.fraction is not None
        percent = round(100 * (view.fraction or 0))
        bar = f'<div class="bar{"" if known else " unknown"}"><div style="width: {percent}%"></div></div>'
    line = f"<span>{html.escape(view.message)}</span>"
    return f'<div class="status {view.tone}" role="status" aria-live="polite">{line}{bar}</div>'
