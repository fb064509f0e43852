"""What a running job tells, and how it is stopped.

Every job calls one function with a `StepEvent` after each denoising step and asks one `CancelToken` between steps.
Progress bars, previews and Stop buttons all hang on these two; jobs know nothing about any user interface.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["CancelToken", "Cancelled", "StepEvent", "stoppable"]


@dataclass(frozen=True, eq=False)
class StepEvent:
    """One denoising step has ended.

    Attributes:
        step: steps done so far, 1 to `steps`.
        steps: steps in all, as the scheduler counts them.
        latents: the latents after this step, on the denoiser's device; of a film this rank's frames, in host memory unless
            the pipeline is offloaded. Read them only for a preview, change nothing.
        clip: index of the clip, 0 for a picture.
        clips: clips in all, 1 for a picture.
        stage: index of the stage, 0 unless a picture is made in several sizes; steps count over all of them.
        stages: stages in all; their sizes, so their time, grow from one to the next.
        seconds: time since the job began, in seconds.
        eta: estimated time until the last step ends, in seconds; of a clip: until the last one is written.
        frames: of a film that is being written: the clip's frames, uint8 of shape (f, H, W, 3), on the first rank.
    """

    step: int
    steps: int
    latents: Tensor | None
    clip: int = 0
    clips: int = 1
    stage: int = 0
    stages: int = 1
    seconds: float = 0.0
    eta: float | None = None
    frames: np.ndarray | None = None


class Cancelled(Exception):
    """The job was stopped on request and the pipeline can be used again.

    Nothing was written, except of a film that had begun: its checkpoints are kept, and the part of the file that plays.
    """


class CancelToken:
    """Set from any thread, also before the job starts; checked between steps and between clips."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def request(self) -> None:
        """Ask the job to stop at its next step."""
        self._event.set()

    @property
    def requested(self) -> bool:
        """Whether a stop has been asked for."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise `Cancelled` if a stop has been asked for."""
        if self._event.is_set():
            raise Cancelled("stopped on request")


@contextlib.contextmanager
def stoppable(token: CancelToken, say: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Ctrl-C or SIGTERM requests the token, for the length of a with block; a second one stops at once.

    say: called with the signal that asked.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if token.requested:
            raise KeyboardInterrupt
        token.request()
        say(signal.Signals(number))

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
