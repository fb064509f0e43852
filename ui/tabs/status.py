"""How a tab shows what goes on: the status line, the buttons that start and stop, and pictures and films as files."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils
from PIL import Image

from ..image_job import View

__all__ = ["copy_of", "shown_picture", "status", "status_html", "told"]


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


def shown_picture(picture: Path | Image.Image) -> str | Image.Image:
    """The file itself, never its pixels: a picture that is sent as pixels is encoded again and loses its recipe."""
    return str(picture) if isinstance(picture, Path) else picture


def copy_of(growing: Path, player: Any) -> str | None:
    """A growing film as it is now; None if it is whole by now, and has another name."""
    try:
        return processing_utils.save_file_to_cache(growing, cache_dir=player.GRADIO_CACHE)
    except FileNotFoundError:
        return None
