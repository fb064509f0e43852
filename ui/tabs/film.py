"""The tab for long videos: which components there are and where they stand.

`film_inputs` is the part for what a film is made from besides text. `film_form` reads and fills the form, `film_job` makes
what it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ...pipelines.filming import DUAL_SCOPE
from ...pipelines.videos import Video
from ..film_form import NO_MODEL, SETTINGS, fill_film_form, read_film_form, takes
from ..jobs import Worker
from . import film_inputs
from .fields import load_control, more_controls, prompt_controls, setting_fields, size_controls
from .making import Form, lay_out

PREFIX = "film-"
USUAL = Video()
FIRST = ("anchors", "window")  # what is shown at once; the others unfold


def film_tab(worker: Worker, models: Sequence[str]) -> None:
    """Lay out the tab inside the current `gr.Blocks` and connect it; without a model for films, say so.

    Args:
        worker: runs `FilmJob` for all sessions.
        models: names or folders the page offers for films; the first is chosen.
    """
    if not models:
        gr.Markdown(NO_MODEL, elem_id=f"{PREFIX}no-model")
        return
    form = Form(read_film_form, fill_film_form, models)
    lay_out(worker, PREFIX, lambda: _controls(models), form, film=True)


def _controls(models: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The left column: form fields by name; there is no choice of attention."""
    form: dict[str, Any] = {}
    prompt_controls(form, PREFIX, "film")
    with gr.Group():
        with gr.Row():
            form["frames"] = gr.Number(
                value=USUAL.frames,
                step=1,
                precision=0,
                label="Frames",
                info="As many as you like",
                elem_id=f"{PREFIX}frames",
            )
            form["fps"] = gr.Number(
                value=USUAL.fps,
                step=1,
                precision=0,
                label="Frames per second",
                info="Changes the pace, not the frames",
                elem_id=f"{PREFIX}fps",
            )
        form["later"] = gr.Textbox(
            label="What it shows later",
            placeholder="32: a blue car and a cat on snow",
            info="One change a line: the frame it begins at, a colon, the new prompt",
            lines=2,
            max_lines=8,
            elem_id=f"{PREFIX}later",
        )
        form["blend"] = gr.Number(
            value=USUAL.blend,
            step=1,
            precision=0,
            label="Frames a change takes",
            info="0 changes at once (blend)",
            elem_id=f"{PREFIX}blend",
        )
    inputs = film_inputs.inputs(form, models[0])
    size_controls(form, PREFIX, what="film")
    with gr.Group():
        setting_fields(form, PREFIX, DUAL_SCOPE, [s for s in SETTINGS if s.name in FIRST])
    with gr.Accordion("More", open=False, elem_id=f"{PREFIX}more"):
        more_controls(form, PREFIX, models)
        form["pag_scale"] = gr.Textbox(
            label="Weight of perturbed-attention guidance",
            placeholder="the model's own",
            max_lines=1,
            info="0 is without (pag_scale)",
            visible="pag_scale" in takes(models[0]),
            elem_id=f"{PREFIX}pag_scale",
        )
        with gr.Accordion(f"More settings of {DUAL_SCOPE} attention", open=False, elem_id=f"{PREFIX}more-{DUAL_SCOPE}"):
            setting_fields(form, PREFIX, DUAL_SCOPE, [s for s in SETTINGS if s.name not in FIRST])
    load_control(form, PREFIX, "film", ".mp4")
    film_inputs.connect(form, inputs)
    return form, {}
