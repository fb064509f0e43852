"""The part of the film tab for what a film is made from besides text; only models that take such a thing show it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from ...pipelines.files import ENDINGS
from ..film_files import ENDING, folder_in, frames_kept, keep_film, kept_sheet
from ..film_form import takes
from ..image_job import View
from ..jobs import one_line
from .events import on
from .status import status_html

PREFIX = "film-"
PARTS = {
    # argument: (title, said where nothing is there, its name in a sentence), then its number: (name, label, info)
    "video": (
        ("The film to start from", "Choose the film to start from.", "the film to start from"),
        ("strength", "How much of it may change", "Above 0 up to 1; less stays closer to it (strength)"),
    ),
    "conditioning_frames": (
        ("What the ControlNet follows", "Choose what the ControlNet follows.", "what the ControlNet follows"),
        (
            "controlnet_conditioning_scale",
            "How closely it is followed",
            "1 is as trained, 0 not at all (controlnet_conditioning_scale)",
        ),
    ),
}


def inputs(form: dict[str, Any], model: str) -> dict[str, dict[str, Any]]:
    """Lay out the part, as it is for `model`; adds fields to the form, and gives the components by argument."""
    form["given"] = gr.State({})
    words = takes(model)
    parts: dict[str, dict[str, Any]] = {}
    for word, ((title, nothing, _), (number, label, info)) in PARTS.items():
        part: dict[str, Any] = {}
        with gr.Column(visible=word in words, elem_id=f"{PREFIX}{word}", elem_classes="settings") as part["box"]:
            part["sheet"] = gr.Image(
                label=title,
                type="filepath",
                format="png",
                interactive=False,
                visible=False,
                height=170,
                buttons=[],
                elem_id=f"{PREFIX}{word}-sheet",
                elem_classes="shown-picture",
            )
            part["hint"] = gr.HTML(
                status_html(View(nothing)), padding=False, elem_id=f"{PREFIX}{word}-hint", elem_classes="status-line"
            )
            with gr.Row():
                part["give"] = gr.UploadButton(
                    "Choose an MP4, or pictures",
                    scale=2,
                    file_count="multiple",
                    file_types=[ENDING, *ENDINGS],
                    type="filepath",
                    size="md",
                    elem_id=f"{PREFIX}{word}-give",
                )
                part["take"] = gr.Button(
                    "Take it away", size="md", scale=1, visible=False, elem_id=f"{PREFIX}{word}-take"
                )
            form[number] = gr.Textbox(
                label=label, placeholder="the model's own", info=info, max_lines=1, elem_id=f"{PREFIX}{number}"
            )
        parts[word] = part
    return parts


def connect(form: dict[str, Any], parts: dict[str, dict[str, Any]]) -> None:
    """Say what choosing a model, giving something and taking it away do."""
    folder = folder_in(form["model"].GRADIO_CACHE)

    def look(model: str, given: Mapping[str, str]) -> dict[Any, Any]:
        """The part as it is now."""
        words = takes(model)
        updates: dict[Any, Any] = {form["pag_scale"]: gr.update(visible="pag_scale" in words)}
        for word, part in parts.items():
            updates |= {part["box"]: gr.update(visible=word in words)} | _shown(word, part, given.get(word), folder)
        return updates

    def give(word: str, paths: list[str], given: dict[str, str]) -> dict[Any, Any]:
        part = parts[word]
        try:
            digest, count = keep_film([Path(path) for path in paths], folder)
        except (ValueError, OSError) as error:
            return {part["hint"]: gr.update(value=status_html(View(one_line(error), "bad")))}
        updates = {form["given"]: {**given, word: digest}, form["frames"]: count}
        return updates | _shown(word, part, digest, folder)

    def take(word: str, given: dict[str, str]) -> dict[Any, Any]:
        return {form["given"]: {key: value for key, value in given.items() if key != word}}

    seen = [form["pag_scale"], *(component for part in parts.values() for component in part.values())]
    for word, part in parts.items():
        shown = [part[name] for name in ("sheet", "hint", "take")]
        on(
            [part["give"].upload],
            functools.partial(give, word),
            [part["give"], form["given"]],
            [form["given"], form["frames"], *shown],
            queue=True,
        )
        # in the queue: only then Gradio tells the page that a state has changed
        on([part["take"].click], functools.partial(take, word), [form["given"]], [form["given"]], queue=True)
    on([form["model"].change, form["given"].change], look, [form["model"], form["given"]], seen, mode="always_last")


def _shown(word: str, part: dict[str, Any], digest: str | None, folder: Path) -> dict[Any, Any]:
    """Sheet, line and button for what was given, which the digest names."""
    (_, nothing, again), _ = PARTS[word]
    count = frames_kept(folder, digest) if digest is not None else 0
    if digest is None:
        view = View(nothing)
    elif not count:
        view = View(f"A recipe does not hold {again}; choose it once more, or another.", "bad")
    else:
        view = View(f"{count:,} frame{'' if count == 1 else 's'}, one for each of the new film.", "good")
    sheet = str(kept_sheet(folder, digest)) if digest is not None and count else None
    return {
        part["sheet"]: gr.update(value=sheet, visible=sheet is not None),
        part["hint"]: gr.update(value=status_html(view)),
        part["take"]: gr.update(visible=digest is not None),
    }
