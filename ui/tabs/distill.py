"""The distill tab: watch a training by its folder, and try its student beside the teacher.

`run_watch` reads the folder, `student_job` draws the pair; this file says what is shown where, and refreshes it by itself.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from ..image_job import View, make_image
from ..jobs import Session, Worker
from ..run_watch import CURVES, Watched, find_runs, fingerprint, pictures_changed, read_run
from ..student_job import read_student_form
from .events import on, stop_run
from .status import shown_picture, status, status_html, told

__all__ = ["distill_tab"]

PREFIX = "distill-"
EVERY = 3.0  # seconds between two looks at the folder
NEWEST = "the newest"
TONES: Mapping[str, Any] = {"goes on": "info", "waiting": "info", "finished": "good", "stopped": "info"}
CLOSE = "Lower is nearer to the teacher. Every step draws other noise, so single steps jump and the trend counts."
INTRO = (
    "A model's attention is exchanged for a linear one, and a **student** learns to draw what the model as it was, the "
    "**teacher**, draws. Trainings run in a terminal; here you watch them and try what they have learned so far."
)
NONE = """
#### No training was found in the folder `{root}`

Start one in a terminal; it appears here by itself. In a clone of the repository, first samples of the teacher, then a training of
about ten minutes on two CPU cores, with pictures in between:

```
reattend distill data --model tiny-flux --prompts examples/distill/captions.txt --samples 1000 --steps 10 \\
  --out runs/tiny-flux-samples
reattend distill run examples/distill/tiny-flux.toml
```
"""


def distill_tab(worker: Worker, root: Path, blocks: gr.Blocks) -> None:
    """Lay out the tab inside the current `gr.Blocks` and connect it.

    Args:
        worker: runs `StudentJob` for all sessions.
        root: folder under which runs are found.
        blocks: the page.
    """
    session = gr.State(Session(worker), delete_callback=stop_run)
    seen = gr.State(None)  # fingerprint of what the page shows
    gr.Markdown(INTRO, elem_id=f"{PREFIX}intro")
    watch: dict[str, Any] = {"none": gr.Markdown(NONE.format(root=root.name), visible=False, elem_id=f"{PREFIX}none")}
    with gr.Row(equal_height=False, visible=False) as watch["body"]:
        with gr.Column(scale=5, min_width=340):
            watch |= _state_controls(root)
            trial = _trial_controls()
        with gr.Column(scale=6, min_width=340):
            watch |= _curves()
    timer = gr.Timer(EVERY)

    def look(before: Any, asked: str | None, step: Any) -> dict[Any, Any]:
        runs = find_runs(root)
        name = asked if asked in runs else next(iter(runs), None)
        pictures = (name, step, pictures_changed(root, name))
        now = (tuple(runs), fingerprint(root, name), pictures)
        if now == before:
            return gr.skip()
        updates: dict[Any, Any] = {
            watch["none"]: gr.update(visible=name is None),
            watch["body"]: gr.update(visible=name is not None),
            watch["run"]: gr.update(choices=runs, **_chosen(asked, name)),
        }
        try:
            run = None if name is None else read_run(root, name)
        except ValueError as error:
            return updates | {seen: None, watch["state"]: status_html(View(str(error), "bad")), watch["facts"]: ""}
        if run is not None:
            updates |= _shown(watch, run)
            if before is None or before[-1] != pictures:  # they are large
                updates |= _picture_updates(watch, run, step)
        return updates | {seen: now}

    def draw(session: Session, *values: Any) -> Iterator[dict[Any, Any]]:
        form = dict(zip(("run", "prompt", "steps", "seed"), values, strict=True))
        for view in make_image(session, form, (), lambda form, _: read_student_form(form, root)):
            updates = told(view, [trial["draw"]], trial["stop"], trial["status"])
            if view.made is not None and view.made.beside is not None:
                updates[trial["teacher"]] = shown_picture(view.made.beside)
                updates[trial["student"]] = shown_picture(view.made.file)
            yield updates

    looked = [watch["run"], watch["step"]]
    asks = [watch["run"], trial["prompt"], trial["steps"], trial["seed"]]
    when = [blocks.load, timer.tick, watch["run"].change, watch["step"].change]
    on(when, look, [seen, *looked], [seen, *watch.values()], mode="always_last")
    on([trial["draw"].click, trial["prompt"].submit], draw, [session, *asks], list(trial.values()), queue=True)
    on([trial["stop"].click], stop_run, [session], [])


def _state_controls(root: Path) -> dict[str, Any]:
    """Which run, how far it is, and its facts."""
    return {
        "run": gr.Dropdown(
            [], label="Training", info=f"Found in the folder {root.name}, the one that wrote last first", elem_id=f"{PREFIX}run",
            filterable=False,
        ),
        "state": gr.HTML("", padding=False, elem_id=f"{PREFIX}state", elem_classes="status-line"),
        "facts": gr.HTML("", padding=False, elem_id=f"{PREFIX}facts"),
    }  # fmt: skip


def _trial_controls() -> dict[str, Any]:
    """Prompt, buttons, and the two pictures."""
    trial: dict[str, Any] = {}
    gr.Markdown("### Try the student\nThe same prompt from the same noise, by the teacher and by the newest student.")
    trial["prompt"] = gr.Textbox(
        label="What the picture shows",
        placeholder="a blue car and a cat on sand",
        lines=1,
        max_lines=4,
        elem_id=f"{PREFIX}prompt",
    )
    with gr.Row():
        trial["steps"] = gr.Slider(
            1, 100, value=10, step=1, precision=0, label="Steps", info="More is slower and finer", elem_id=f"{PREFIX}steps",
            buttons=[],
        )  # fmt: skip
        trial["seed"] = gr.Textbox(
            label="Seed", placeholder="random", info="Same seed, same noise", elem_id=f"{PREFIX}seed", max_lines=1
        )
    with gr.Row():
        trial["draw"] = gr.Button("Draw both", variant="primary", elem_id=f"{PREFIX}draw", scale=3)
        trial["stop"] = gr.Button("Stop", variant="stop", elem_id=f"{PREFIX}stop", interactive=False, scale=1)
    trial["status"] = status(PREFIX)
    with gr.Row():
        for who in ("teacher", "student"):
            trial[who] = gr.Image(
                label=who.capitalize(), type="filepath", format="png", interactive=False, height=240, min_width=150,
                buttons=["download", "fullscreen"], elem_id=f"{PREFIX}{who}", elem_classes="shown-picture",
            )  # fmt: skip
    return trial


def _curves() -> dict[str, Any]:
    """Curves two by two, and the pictures the run made in between."""
    watch: dict[str, Any] = {}
    names = list(CURVES)
    for start in range(0, len(names), 2):
        with gr.Row():
            for key in names[start : start + 2]:
                watch[key] = gr.LinePlot(
                    x="step", y="value", title=CURVES[key], x_title="Step", y_title=" ", height=200, min_width=200,
                    visible=False, buttons=[], elem_id=f"{PREFIX}curve-{key}",
                )  # fmt: skip
    watch["note"] = gr.Markdown("", visible=False, elem_id=f"{PREFIX}note")
    watch["step"] = gr.Dropdown(
        [NEWEST], value=NEWEST, label="Pictures in between", info="By the teacher and by the student, after this step",
        filterable=False, visible=False, elem_id=f"{PREFIX}step",
    )  # fmt: skip
    watch["pictures"] = gr.HTML("", padding=False, visible=False, elem_id=f"{PREFIX}pictures")
    return watch


def _chosen(asked: Any, chosen: Any) -> dict[str, Any]:
    """The value of a choice, where it is not the one asked for: an answer that comes late must not undo what was picked."""
    return {} if chosen == asked else {"value": chosen}


def _shown(watch: Mapping[str, Any], run: Watched) -> dict[Any, Any]:
    """The updates that show a run, but for its pictures."""
    tone, busy = TONES[run.state], run.state == "goes on"
    updates: dict[Any, Any] = {
        watch["state"]: status_html(View(run.line, tone, busy=busy, fraction=run.fraction if busy else None)),
        watch["facts"]: _facts_html(run),
        watch["note"]: gr.update(value=_note(run), visible=True),
    }
    for key in CURVES:
        curve = run.curves.get(key, [])
        frame = pd.DataFrame(curve, columns=["step", "value"])
        updates[watch[key]] = gr.update(value=frame, visible=bool(curve))
    return updates


def _picture_updates(watch: Mapping[str, Any], run: Watched, asked: Any) -> dict[Any, Any]:
    steps = [str(number) for number, _, _ in run.pictures]
    step = asked if asked in steps else NEWEST
    chosen = next((found for found in run.pictures if step in (NEWEST, str(found[0]))), None)
    shown = "" if chosen is None else _pairs_html(*chosen)
    return {
        watch["step"]: gr.update(choices=[NEWEST, *steps], visible=bool(shown), **_chosen(asked, step)),
        watch["pictures"]: gr.update(value=shown, visible=bool(shown)),
    }


def _pairs_html(step: int, file: Path, prompts: tuple[str, ...]) -> str:
    """A validation picture cut into its rows, one for each prompt; nothing if it cannot be read.

    Pixels travel inside the page, so that no file of the run has to be served.
    """
    try:
        with Image.open(file, formats=["PNG"]) as opened:
            whole = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""
    height, figures = whole.height // max(len(prompts), 1), []
    for i, prompt in enumerate(prompts):
        kept = io.BytesIO()
        whole.crop((0, i * height, whole.width, (i + 1) * height)).save(kept, "PNG")
        source, words = base64.b64encode(kept.getvalue()).decode(), html.escape(prompt, quote=True)
        figures.append(
            f'<figure><figcaption>{words}</figcaption><img alt="{words}: teacher left, student right" '
            f'src="data:image/png;base64,{source}"><div><span>teacher</span><span>student, step {step}</span></div></figure>'
        )
    return f'<div class="pairs">{"".join(figures)}</div>'


def _note(run: Watched) -> str:
    if not run.curves:
        return "The curves begin with the first line of the log."
    if run.pictures:
        return CLOSE
    return (
        f"{CLOSE} This training makes no pictures in between; with "
        "`--set validate_every=100` and `validation_prompts` it would."
    )


def _facts_html(run: Watched) -> str:
    facts = [*run.facts]
    if run.student is not None:
        facts.append(("Newest student", f"after step {run.student[1]}"))
    rows = "".join(f"<tr><th>{html.escape(what)}</th><td>{html.escape(value)}</td></tr>" for what, value in facts)
    return f'<table class="facts">{rows}</table>'
