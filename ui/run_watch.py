"""What a distillation run tells about itself, read from its folder: state, curves and pictures. Plain functions, no Gradio.

Runs are found under one root that the page was started with, and asked for by the names found there; a path that somebody
types is never opened. Reading changes nothing, and a run that is writing at the same moment is not disturbed.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from .jobs import duration

__all__ = ["CURVES", "Watched", "find_runs", "fingerprint", "pictures_changed", "read_run", "run_folder"]

DEPTH = 4  # folders below the root that are looked into; a comparison keeps its runs in out/runs/NAME
MOST_RUNS = 100
POINTS = 300  # of a curve; more are averaged
QUIET = 90.0  # seconds without a new line after which a run no longer goes on, if its lines usually come faster
CURVES = {  # entry of the log: what it is
    "loss": "All losses together",
    "output": "Error of the output",
    "attention": "Error of the attention",
    "validation_latent_error": "Error of pictures",
}


@dataclass(frozen=True)
class Watched:
    """One run at one moment.

    Attributes:
        state: "goes on", "finished", or "stopped", which may go on; "waiting" before the first line of the log.
        step, steps: done so far, and asked for.
        facts: (what, value) pairs for people.
        curves: per entry of CURVES that the log has, (step, value) pairs.
        pictures: (step, file, prompts) of validation pictures, newest first.
        student: folder that `load_linear` installs, the newest there is, and the step it is of; None before the first.
        config: what the run was asked for.
    """

    name: str
    state: Literal["goes on", "finished", "stopped", "waiting"]
    step: int
    steps: int
    config: dict[str, Any]
    facts: tuple[tuple[str, str], ...] = ()
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    pictures: tuple[tuple[int, Path, tuple[str, ...]], ...] = ()
    student: tuple[Path, int] | None = None
    seconds_left: float | None = None

    @property
    def line(self) -> str:
        """State in one line."""
        done = f"step {self.step} of {self.steps}"
        if self.state == "finished":
            return f"Finished: {done}."
        if self.state == "waiting":
            return "Begun: nothing is logged yet; the first lines come after some steps."
        if self.state == "stopped":
            return f"Not running: stopped at {done}. The command that began it goes on from there."
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"Training: {done}{left}"

    @property
    def fraction(self) -> float:
        return self.step / self.steps


def find_runs(root: Path) -> list[str]:
    """Names of the runs under `root`, those with the newest log first; a run has a config.json and a log or a student."""
    found: list[tuple[float, str]] = []
    folders = [root]
    for _ in range(DEPTH):
        inner: list[Path] = []
        for folder in folders:
            try:
                there = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
            except OSError:
                continue
            for path in there:
                if (path / "config.json").is_file() and _is_run(path):
                    found.append((_changed(path), path.relative_to(root).as_posix()))
                elif not path.name.startswith("."):
                    inner.append(path)
        folders = inner
    return [name for _, name in sorted(found, reverse=True)[:MOST_RUNS]]


def run_folder(root: Path, name: Any) -> Path:
    """The folder of a run that `find_runs` names. Raises ValueError for any other name."""
    if name not in find_runs(root):
        raise ValueError("There is no such run any more; choose one from the list.")
    return root / str(name)


def fingerprint(root: Path, name: str | None) -> tuple[Any, ...]:
    """Changes when `read_run` would tell something else; cheap. `name` is one that `find_runs` gave, or None."""
    if name is None:
        return ()
    folder = root / name
    changed = _changed(folder)
    parts = [
        changed,
        min(max(time.time() - changed, 0) // QUIET, 40),
    ]  # a run that goes on or not: looked at again for an hour
    return name, *parts, *(_touched(folder / part) for part in ("pictures", "checkpoints", "student"))


def pictures_changed(root: Path, name: str | None) -> int:
    """Changes when there are other pictures; `name` is one that `find_runs` gave, or None."""
    return 0 if name is None else _touched(root / name / "pictures")


def read_run(root: Path, name: Any, now: float | None = None) -> Watched:
    """What a run is doing.

    Args:
        now: seconds since 1970; for tests.

    Raises:
        ValueError: for a name that is no run, or a run whose config.json cannot be read.
    """
    folder = run_folder(root, name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        steps, batch = int(config["steps"]), int(config["batch"])
        attention = dict(config["attention"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"The run {name} has a config.json that cannot be read; start the run again.") from None
    lines = _lines(folder / "log.jsonl")
    trained = [line for line in lines if isinstance(line.get("loss"), (int, float))]
    last = trained[-1] if trained else {}
    step = max((line["step"] for line in lines), default=0)
    state = _state(folder, lines, step >= steps, time.time() if now is None else now)
    pace = float(last.get("samples_per_second") or 0.0)
    left = (steps - step) * batch / pace if pace and state == "goes on" else None
    return Watched(
        name=str(name), state=state, step=step, steps=steps, config=config, facts=_facts(config, attention, last),
        curves={key: curve for key in CURVES if (curve := _curve(lines, key))}, pictures=_pictures(folder),
        student=_student(folder), seconds_left=left,
    )  # fmt: skip


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("log.jsonl", "student", "checkpoints"))


def _changed(folder: Path) -> float:
    """When the log was written last, or the configuration if there is none; 0 where neither is there any more."""
    for name in ("log.jsonl", "config.json"):
        with contextlib.suppress(OSError):
            return (folder / name).stat().st_mtime
    return 0.0


def _touched(path: Path) -> int:
    """When a folder was written last, in nanoseconds since 1970; 0 where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _lines(log: Path) -> list[dict[str, Any]]:
    """The whole lines of the log; one that is being written is left out. None where the log cannot be read."""
    found: list[dict[str, Any]] = []
    try:
        texts = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def _state(folder: Path, lines: Sequence[dict[str, Any]], full: bool, now: float) -> Any:
    """A run says nothing when it is killed: it goes on while lines come about as fast as they used to."""
    if full and (folder / "student" / "linear_config.json").is_file():
        return "finished"
    if not lines:
        return "waiting" if now - _changed(folder) < 10 * QUIET else "stopped"
    times = [line["seconds"] for line in lines if "seconds" in line][-10:]
    between = max((b - a for a, b in pairwise(times)), default=0.0)
    return "goes on" if now - _changed(folder) < max(QUIET, 4 * between) else "stopped"


def _facts(config: dict[str, Any], attention: dict[str, Any], last: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    tiled = attention.get("pattern") == "tile" or "topk" in attention
    shown = ("radius", "pattern", *(["tile"] if tiled else []), "topk", "agents", "active", "pool")
    settings = [f"{key} {_plain(attention[key])}" for key in shown if attention.get(key) is not None]
    teacher = str(config.get("model"))
    facts = [
        ("Teacher", Path(teacher).name if Path(teacher).is_absolute() else teacher),
        ("Attention", ", ".join([str(attention.get("name")), *settings])),
    ]
    if last:
        facts += [
            ("Pace", f"{last['samples_per_second']:.3g} samples a second"),
            ("Memory", f"{last['memory_mib'] / 1024:.2f} GiB at the peak"),
            ("Loss", f"{last['loss']:.4g}"),
            ("Learning rate", f"{last['lr']:.3g}"),
        ]
        if "seconds" in last:
            facts.insert(2, ("Trained for", duration(last["seconds"])))
        if last.get("damaged_samples"):
            facts.append(("Damaged samples", f"{last['damaged_samples']}, others took their places"))
    return tuple(facts)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " x ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _curve(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """At most POINTS points, each the mean of some neighbours."""
    points = [(line["step"], float(line[key])) for line in lines if isinstance(line.get(key), (int, float))]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    each = -(-len(points) // POINTS)
    groups = [points[start : start + each] for start in range(0, len(points), each or 1)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _pictures(folder: Path) -> tuple[tuple[int, Path, tuple[str, ...]], ...]:
    found = []
    for path in sorted((folder / "pictures").glob("step-*.png"), reverse=True):
        try:
            about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            found.append((int(about["step"]), path, tuple(map(str, about["prompts"]))))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # its note is not written yet
    return tuple(found)


def _student(folder: Path) -> tuple[Path, int] | None:
    """The newest student: of a checkpoint while the run goes on, the one at its end if there is none of a later step."""
    there = [path / "student" for path in (folder / "checkpoints").glob("step-*")] + [folder / "student"]
    found = []
    for path in there:
        try:
            about = json.loads((path / "linear_config.json").read_text(encoding="utf-8"))
            found.append((int(about["info"]["steps"]), path == folder / "student", path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if not found:
        return None
    steps, _, path = max(found)
    return path, steps
