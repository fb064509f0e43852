"""A file of results that grows line by line, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..pipelines.files import hold, written_whole

__all__ = ["Results", "print_table"]


def print_table(file: Path, table: Callable[[dict[str, Any]], str], program: str) -> None:
    """Print the table of a summary.json. Ends the program in one sentence if the file is none of its summaries."""
    try:
        print(table(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{program}: {file} holds no summary of {program} ({error})") from None


class Results:
    """The results file: a first line of settings, then one line per arm and sample, kept in `entries`.

    Its folder is held as long as this lives, so that no other process adds to it.

    Raises ValueError if the file holds results of other settings, or is none, or another process holds the folder.
    """

    def __init__(self, path: Path, form: str, settings: dict[str, Any]) -> None:
        self.path = path
        weakref.finalize(self, hold(path.parent).close)
        self.entries: dict[tuple[str, int], dict[str, Any]] = {}
        header = {"format": form, **json.loads(json.dumps(settings))}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a last line without its end was interrupted
        if not whole:
            with written_whole(path) as (aside,):
                aside.write_text(json.dumps(header) + "\n")
            return
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            differing = [key for key in header if first.get(key) != header[key]]
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a file of results ({error}); use another folder or delete it") from None
        if differing:
            raise ValueError(
                f"{path} holds results of other settings ({', '.join(differing)} differ); use another folder or delete it"
            )
        if whole != text:
            with written_whole(path) as (aside,):
                aside.write_text(whole)
        for line in lines:
            self.entries[line["arm"], line["sample"]] = line

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append results at once; each has at least "arm" and "sample"."""
        entries = [json.loads(json.dumps(entry)) for entry in entries]
        for entry in entries:
            self.entries[entry["arm"], entry["sample"]] = entry
        with self.path.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())
