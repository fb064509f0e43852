"""The image tab: which components there are and where they stand; `image_job` is what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ..image_job import fill_form, read_form
from ..jobs import Worker
from .fields import attention_controls, load_control, more_controls, prompt_controls, size_controls
from .making import Form, lay_out

PREFIX = ""


def image_tab(worker: Worker, models: Sequence[str]) -> None:
    """Lay out the tab inside the current `gr.Blocks` and connect it.

    Args:
        worker: runs `ImageJob` for all sessions.
        models: names or folders the page offers; the first is chosen.
    """
    lay_out(worker, PREFIX, lambda: _controls(models), Form(read_form, fill_form, models))


def _controls(models: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The left column: form fields by name, and the group of settings of each attention."""
    form: dict[str, Any] = {}
    prompt_controls(form, PREFIX)
    groups = attention_controls(form, PREFIX, "What the model's attention layers compute")
    size_controls(form, PREFIX)
    with gr.Accordion("More", open=False, elem_id=f"{PREFIX}more"):
        more_controls(form, PREFIX, models)
    load_control(form, PREFIX)
    return form, groups
