"""Fields of a form that several tabs have: prompt, size, what few people change, the choice of attention.

Each function adds components to `form` by name. Each tab gives a prefix for `elem_id`, so that two tabs can stand on one page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from ...pipelines.recipe import DTYPES
from ..attention_form import FIRST, STOCK, Setting, method_label, settings_of
from ..image_job import PICTURE_METHODS

__all__ = [
    "attention_controls",
    "load_control",
    "more_controls",
    "prompt_controls",
    "setting_fields",
    "size_controls",
]


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
