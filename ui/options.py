"""What the commands of `reattend` share: how options are read, the progress bar, quiet libraries."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from ..pipelines.checks import attention_entry

if TYPE_CHECKING:
    from ..pipelines.events import StepEvent

__all__ = [
    "FILE",
    "NUMBER",
    "OUT",
    "TEXT",
    "WHOLE",
    "Bar",
    "attention_entry",
    "default",
    "quiet_libraries",
    "read_size",
]

OUT = Path("out")


def _optional(kind: Callable[[str], Any], words: str) -> PrimitiveConstructorSpec:
    """How an option that may be left out is read: without tyro's `None` choice, and with a plain message."""

    def read(texts: list[str]) -> Any:
        try:
            return kind(texts[0])
        except ValueError:
            raise ValueError(f"got {texts[0]!r}, need {words}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, kind),  # type: ignore[arg-type]
        str_from_instance=lambda value: [str(value)],
    )


def default(text: object) -> Any:
    """What the help says about an option that may be left out."""
    return arg(help_behavior_hint=f"(default: {text})")


WHOLE = _optional(int, "a whole number")
NUMBER = _optional(float, "a number")
TEXT = _optional(str, "text")
FILE = _optional(Path, "a file")


def read_size(text: str) -> tuple[int, int]:
    """A size as it is typed, such as 1024x768. Raises ValueError."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"--size cannot read {text!r}: write width x height in pixels, as in --size 1024x768")
    return int(width), int(height)


class Bar:
    """A progress bar with the time left on stderr, fed with step events; silent where stderr is no terminal."""

    def __init__(self, silent: bool = False):
        self.silent = silent

    def __enter__(self) -> Bar:
        from tqdm import tqdm

        # The time left is the event's own: tqdm would take all steps to be equally long.
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        self._bar = tqdm(
            unit="step", file=sys.stderr, disable=True if self.silent else None, leave=False, bar_format=form
        )
        return self

    def __call__(self, event: StepEvent) -> None:
        self._bar.total = event.steps
        if event.stages > 1:
            self._bar.set_description_str(f"size {event.stage + 1} of {event.stages}", refresh=False)
        if event.clips > 1:
            self._bar.set_description_str(f"writing, clip {event.clip + 1} of {event.clips}", refresh=True)
        if event.eta is not None:
            self._bar.set_postfix_str(f"{self._bar.format_interval(event.eta)} left", refresh=False)
        self._bar.update(event.step - self._bar.n)

    def __exit__(self, *problem: object) -> None:
        self._bar.close()


def quiet_libraries() -> None:
    """Keep the libraries' bars and notices off a terminal that is ours; warnings about real trouble stay."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
