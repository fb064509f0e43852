"""The upscale tab: a picture made in stages, each larger than the one before; `upscale_job` reads and fills its form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ...pipelines.stages import Upscale
from ..jobs import Worker
from ..upscale_job import fill_upscale_form, read_upscale_form
from .fields import attention_controls, load_control, more_controls, prompt_controls, size_controls
from .making import Form, lay_out

PREFIX = "upscale-"
USUAL = Upscale()


def upscale_tab(worker: Worker, models: Sequence[str]) -> None:
    """Lay out the tab inside the current `gr.Blocks` and connect it.

    Args:
        worker: runs `ImageJob` for all sessions.
        models: names or folders the page offers; the first is chosen.
    """
    form = Form(read_upscale_form, fill_upscale_form, models)
    lay_out(worker, PREFIX, lambda: _controls(models), form)


def _controls(models: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The left column: form fields by name, and the group of settings of each attention."""
    form: dict[str, Any] = {}
    prompt_controls(form, PREFIX)
    with gr.Group(), gr.Row():
        form["scale"] = gr.Textbox(
            value=f"{USUAL.scale:g}",
            label="How many times larger",
            info="Up to 16, in stages of at most 2 (scale)",
            max_lines=1,
            elem_id=f"{PREFIX}scale",
        )
        form["strength"] = gr.Slider(
            0.05,
            1,
            value=USUAL.strength,
            step=0.05,
            label="How much a stage may change",
            info="More adds detail, less stays closer (strength)",
            elem_id=f"{PREFIX}strength",
            buttons=[],
        )
    groups = attention_controls(form, PREFIX, "What the attention layers compute in the larger sizes")
    form["attention_first"] = gr.Checkbox(
        label="Use this attention for the first size too",
        elem_id=f"{PREFIX}attention-first",
    )
    size_controls(form, PREFIX, of=" of the first size")
    with gr.Accordion("More", open=False, elem_id=f"{PREFIX}more"):
        _rare(form)
        more_controls(form, PREFIX, models)
    load_control(form, PREFIX)
    return form, groups


def _rare(form: dict[str, Any]) -> None:
    """What few people change about the larger sizes."""
    with gr.Row():
        form["later_steps"] = gr.Textbox(
            label="Steps of the larger sizes",
            placeholder="as the first size",
            info="Of these, the share that strength says is run",
            max_lines=1,
            elem_id=f"{PREFIX}later-steps",
        )
        form["tile_from"] = gr.Textbox(
            value=str(USUAL.tile_from),
            label="Save memory from this many pixels on",
            info="Longer side from which the VAE works in tiles (tile_from)",
            max_lines=1,
            elem_id=f"{PREFIX}tile-from",
        )
    with gr.Row():
        form["shift"] = gr.Textbox(
            label="Noise in early steps",
            placeholder="the model's own",
            info="For flow models such as Flux; more changes more (shift)",
            max_lines=1,
            elem_id=f"{PREFIX}shift",
        )
        form["rope_theta_scale"] = gr.Textbox(
            label="How near distant places look",
            placeholder="10 where it is needed, else 1",
            info="For models with a rotary embedding such as Flux (rope_theta_scale)",
            max_lines=1,
            elem_id=f"{PREFIX}rope-theta-scale",
        )
