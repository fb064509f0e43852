"""Calling a function when something happens on the page, in one way for all tabs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import gradio as gr

from ..jobs import Session

__all__ = ["on", "stop_run"]

SESSIONS = 16  # how many may wait for a picture at once; the worker makes one after another


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
