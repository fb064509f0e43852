"""Work behind the page: one worker thread makes one thing at a time, each browser session knows its run and results.

The page's handlers submit an order (a recipe, or what else a job makes things from) and read the newest progress; the
worker thread writes it. Nothing here knows Gradio, and nothing lives at module level: a page owns one `Worker`, a
browser session owns one `Session` for each tab.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from ..pipelines.events import Cancelled, CancelToken
from ..pipelines.recipe import Recipe

HISTORY = 24  # results a session remembers; the files of older ones stay in the output folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """What a run is doing: a stage in words; while steps run also their number, seconds left and a small preview.

    `part` says which of several parts the steps are in, such as "Size 2 of 3"; steps count over all parts. `of` is what
    is counted. `film` is a file that grows and can be played already, and how many frames of it.
    """

    stage: str
    step: int | None = None
    steps: int | None = None
    seconds_left: float | None = None
    preview: Image.Image | None = None
    part: str | None = None
    of: str = "step"
    film: tuple[Path, int] | None = None

    @property
    def fraction(self) -> float | None:
        """Share of the steps done in [0, 1]; None where nobody knows."""
        return self.step / self.steps if self.step is not None and self.steps else None

    def line(self, age: float = 0.0) -> str:
        """One line for the page; `age` is the time in seconds since this progress was reported."""
        if self.step is None or self.steps is None:
            return f"{self.stage}, {age:.0f} s" if age >= 1 else self.stage
        line = f"{self.part}, {self.of}" if self.part else self.of.capitalize()
        line = f"{line} {self.step} of {self.steps}"
        if self.seconds_left is None:
            return line
        return f"{line}, {duration(max(0.0, self.seconds_left - age))} left"


class Result(Protocol):
    """What every job gives back: the seconds it took, and its file names in words."""

    @property
    def seconds(self) -> float: ...

    @property
    def where(self) -> str: ...


@dataclass(frozen=True)
class Made:
    """A finished picture or film: its file, the recipe file beside it, the recipe that repeats it, and the seconds it took.

    `smaller` are the files of what it grew from, smallest first, each with a recipe of its own; `beside` is the picture it
    is to be compared with. `sheet` is the picture that stands for a film.
    """

    file: Path
    recipe_file: Path
    recipe: Recipe
    seconds: float
    smaller: tuple[Path, ...] = ()
    beside: Path | None = None
    sheet: Path | None = None

    @property
    def picture(self) -> Path:
        """What can be shown as a picture."""
        return self.file if self.sheet is None else self.sheet

    @property
    def film(self) -> Path | None:
        return None if self.sheet is None else self.file

    @property
    def where(self) -> str:
        """The file names in words."""
        if self.sheet is not None:
            return f"{self.file.name}, its contact sheet as {self.sheet.name}"
        if self.beside is not None:
            return f"{self.beside.name} and {self.file.name}"
        if not self.smaller:
            return self.file.name
        return f"{self.file.name}, and smaller as {', '.join(file.name for file in self.smaller)}"


class Kept(Cancelled):
    """Raised by work that was stopped and keeps what it did.

    Args:
        text: one sentence for the person who stopped it.
        recipe: goes on with it when it is submitted again.
        film: the file that can be played so far.
    """

    def __init__(self, text: str, recipe: Recipe, film: Path | None = None) -> None:
        super().__init__(text)
        self.recipe = recipe
        self.film = film


@dataclass(frozen=True)
class Outcome:
    """How a run ended, with one sentence for the person who asked for it, and what it made or keeps to go on with."""

    state: Literal["done", "stopped", "failed"]
    text: str
    made: Any = None  # a Result
    kept: Kept | None = None


Work = Callable[[Any, CancelToken, Callable[[Progress], None]], Result]


def by_class(works: Mapping[type, Work]) -> Work:
    """The work for each class of orders as one."""
    return lambda order, token, report: works[type(order)](order, token, report)


class Run:
    """One submitted order. The worker writes progress and the outcome, any thread may read them or ask to stop."""

    def __init__(self, order: Any) -> None:
        self.order = order
        self.token = CancelToken()
        self.outcome: Outcome | None = None
        self._changed = threading.Condition()
        self._progress: Progress | None = None
        self._since = time.monotonic()

    def report(self, progress: Progress) -> None:
        with self._changed:
            self._progress = progress
            self._since = time.monotonic()
            self._changed.notify_all()

    def finish(self, outcome: Outcome) -> None:
        with self._changed:
            self.outcome = outcome
            self._changed.notify_all()

    def stopped_text(self) -> str:
        last = self._progress
        where = f" at {last.of} {last.step} of {last.steps}" if last and last.step is not None else ""
        return f"Stopped{where}. Nothing was saved."

    def updates(self, every: float = 0.5) -> Iterator[tuple[Progress | None, float]]:
        """Yield the newest progress (None while waiting for the worker) and its age until the run has an outcome.

        A reader slower than the worker sees only the newest; one with nothing new hears again after `every` seconds.
        """
        seen: Progress | None = None
        while True:
            with self._changed:
                if self.outcome is None and self._progress is seen:
                    self._changed.wait(timeout=every)
                if self.outcome is not None:
                    return
                seen = self._progress
                age = time.monotonic() - self._since
            yield seen, age


class Worker:
    """Runs `work` for one run after another in one daemon thread, in the order they came."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._waiting: deque[Run] = deque()
        self._changed = threading.Condition()
        self._current: Run | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, order: Any) -> Run:
        run = Run(order)
        with self._changed:
            if self._closed:
                raise RuntimeError("The page was closed and takes no more work; start it again.")
            self._waiting.append(run)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="reattend-worker", daemon=True)
                self._thread.start()
            self._changed.notify()
        return run

    def ahead(self, run: Run) -> int:
        """How many runs come before this one; 0 when it runs or has ended."""
        with self._changed:
            if run not in self._waiting:
                return 0
            return self._waiting.index(run) + (self._current is not None)

    def stop(self, run: Run) -> None:
        """Ask a run to stop: at its next step when it runs, at once when it still waits."""
        run.token.request()
        with self._changed:
            if run in self._waiting:
                self._waiting.remove(run)
                run.finish(Outcome("stopped", run.stopped_text()))

    def close(self) -> None:
        """Stop everything and take no more work."""
        with self._changed:
            self._closed = True
            runs = [*self._waiting, *([self._current] if self._current else [])]
            self._changed.notify()
        for run in runs:
            self.stop(run)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                run = self._current = self._waiting.popleft()
            outcome = self._outcome(run)
            with self._changed:
                self._current = None
            run.finish(outcome)

    def _outcome(self, run: Run) -> Outcome:
        try:
            run.token.check()
            made = self._work(run.order, run.token, run.report)
        except Kept as stop:
            return Outcome("stopped", str(stop), kept=stop)
        except Cancelled:
            return Outcome("stopped", run.stopped_text())
        except (ValueError, TypeError, OSError) as error:  # our own sentences about bad input
            log.debug("a run was refused", exc_info=True)
            return Outcome("failed", one_line(error))
        except Exception as error:  # the thread must survive whatever a model throws
            log.exception("a run failed")
            return Outcome("failed", f"This did not work: {one_line(error)} The terminal shows the details.")
        return Outcome("done", f"Done in {duration(made.seconds)}. Saved as {made.where}.", made)


class Session:
    """What one browser session knows: its current run, the result it looks at, and all it has made, newest first.

    `kept` is what the last run left to go on with.

    Not a dataclass: Gradio would turn one into a dict.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.run: Run | None = None
        self.shown: Any = None  # a Result of the tab's job
        self.kept: Kept | None = None
        self.history: list[Any] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Session:
        """A new session on the same worker: Gradio copies the first state for every browser session."""
        return Session(self.worker)

    @property
    def busy(self) -> bool:
        return self.run is not None and self.run.outcome is None

    def start(self, order: Any) -> Run:
        """Submit an order.

        Raises:
            ValueError: this session's last run has not ended.
        """
        if self.busy:
            raise ValueError("This page is already making something; wait for it or press Stop.")
        self.run = self.worker.submit(order)
        return self.run

    def stop(self) -> bool:
        """Ask the current run to stop; False when there is none."""
        if self.run is None or not self.busy:
            return False
        self.worker.stop(self.run)
        return True

    def keep(self, made: Any) -> None:
        self.shown = made
        self.history = [made, *self.history][:HISTORY]

    def show(self, index: int) -> Any:
        """Make an earlier result the one that is shown; None for a place that holds none."""
        if not 0 <= index < len(self.history):
            return None
        self.shown = self.history[index]
        return self.shown


def duration(seconds: float) -> str:
    """A time span in plain words: 0.4 s, 7 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def one_line(error: BaseException) -> str:
    """An error's message as one line that begins and ends like a sentence; the class name when it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."
