"""The command `reattend story`: a folder of panels from a JSON file, and single panels of it made again."""

from __future__ import annotations

import json as json_text
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from .options import FILE, NUMBER, OUT, TEXT, WHOLE, Bar, attention_entry, default, quiet_libraries

if TYPE_CHECKING:
    from ..pipelines.script import Script

__all__ = ["Story"]


@dataclass(frozen=True, kw_only=True)
class Story:
    """Make a story: characters that stay themselves over any number of panels. One panel can be made again.

    FILE is JSON with subjects and panels; examples/story.json is one. The result is a folder with every panel, the places of
    the characters laid over it, a strip, and story.json, from which everything can be made again.
    """

    file: Annotated[Path, Positional, arg(metavar="FILE", help_behavior_hint="")]
    """The story, or the story.json of one that was made."""
    panel: Annotated[
        tuple[int, ...], UseAppendAction, arg(metavar="N", help_behavior_hint="(default: all; repeatable)")
    ] = ()
    """Make only this panel, counted from 1; the others in the folder stay as they are."""
    prompt: Annotated[str | None, TEXT, default("as in FILE")] = None
    """Another caption for the panel of --panel."""
    seed: Annotated[int | None, WHOLE, default("as in FILE, or drawn and told")] = None
    """Another seed: of the panels of --panel, else of the whole story."""
    model: Annotated[str | None, TEXT, default("as in FILE")] = None
    """Bundled name, local diffusers folder, or hub id."""
    width: Annotated[int | None, WHOLE, default("as in FILE")] = None
    """In pixels, a multiple of 8."""
    height: Annotated[int | None, WHOLE, default("as in FILE")] = None
    """In pixels, a multiple of 8."""
    steps: Annotated[int | None, WHOLE, default("as in FILE")] = None
    """Denoising steps; more = slower and finer."""
    guidance: Annotated[float | None, NUMBER, default("as in FILE")] = None
    """How strongly the prompts are followed."""
    strength: Annotated[float | None, NUMBER, default("as in FILE")] = None
    """How strongly characters follow their references, 0 to 1."""
    together: Annotated[int | None, WHOLE, default("as in FILE")] = None
    """Panels in one call; more = faster and more memory."""
    bank: Annotated[str | None, TEXT, default("as in FILE")] = None
    """Keep references in a bank of at most this size, such as 500MB, in place of rows beside the panels."""
    attention: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: as in FILE; repeatable)"),
    ] = ()
    """Attention for other layers, for example: --attention agent levels=1"""
    out: Annotated[Path | None, FILE, default("out/ and the name of FILE; the folder of a story that was made")] = None
    """Folder for the story."""
    device: Annotated[str | None, TEXT, default("the first of cuda, mps, cpu")] = None
    """Where to compute."""
    dtype: Annotated[str | None, TEXT, default("as in FILE")] = None
    """Numbers to compute in: float32, float16 or bfloat16."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Make the story. Raises ValueError or TypeError for bad input, as early as possible."""
        from ..pipelines.files import check_writable
        from ..pipelines.script import Script

        found = Script.read(self.file)
        script, only = self.to_script(found)
        folder = self.out or (self.file.parent if found.made_with else OUT / self.file.stem)
        check_writable(folder / "story.json")
        if only is not None:
            check_same_story(folder, script, only)
        began = time.monotonic()
        quiet_libraries()
        from ..pipelines import load, story
        from .finding import finder

        pipe = load(script.model, device=self.device, dtype=script.dtype)
        with Bar() as bar:
            made = story(script, pipe=pipe, only=only, find=finder(script.model), on_step=bar)
        files = made.save(folder)
        seconds = time.monotonic() - began
        for line in made.report:
            print(f"reattend: {line}", file=sys.stderr)
        if self.json:
            told = {"folder": str(folder), "files": [str(file) for file in files], "report": made.report}
            print(
                json_text.dumps({**told, "seconds": round(seconds, 3), "story": json_text.loads(made.script.to_json())})
            )
        else:
            print(f"{folder / 'strip.png' if folder / 'strip.png' in files else folder}  ({seconds:.1f} s)")

    def to_script(self, script: Script) -> tuple[Script, list[int] | None]:
        """The story with the options that were given, and the panels to make, counted from 0; None = all."""
        from ..pipelines.script import OTHER_PICTURES

        names = ("model", "width", "height", "steps", "guidance", "strength", "together", "dtype")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.bank is not None:
            given["bank"] = _bytes(self.bank)
        if self.attention:
            given["attention"] = tuple(attention_entry(*words) for words in self.attention)
        if self.seed is not None and not self.panel:
            given["seed"] = self.seed
        old, script = script, replace(script, **given)
        if "seed" in given or any(getattr(script, name) != getattr(old, name) for name in OTHER_PICTURES):
            fresh: dict[str, Any] = {"found": None} | ({"seed": None} if "seed" in given else {})
            panels = tuple(replace(panel, **fresh) for panel in script.panels)
            script = replace(script, panels=panels, subjects=tuple(replace(one, **fresh) for one in script.subjects))
        if not self.panel:
            if self.prompt is not None:
                raise ValueError("--prompt changes one panel; say which with --panel")
            return script, None
        for number in self.panel:
            if not 1 <= number <= len(script.panels):
                raise ValueError(
                    f"--panel is out of range: got {number}, the story has panels 1 to {len(script.panels)}"
                )
            changes = {"seed": self.seed, "prompt": self.prompt}
            changes = {name: value for name, value in changes.items() if value is not None}
            script = script.with_panel(number - 1, **changes)
        return script, [number - 1 for number in self.panel]


def check_same_story(folder: Path, script: Script, only: list[int]) -> None:
    """Raise ValueError if the panels in a folder, but for those made now, are of another story."""
    from ..pipelines.script import Script

    there = folder / "story.json"
    if not there.exists():
        return
    old = Script.read(there)
    if len(old.panels) == len(script.panels):
        panels = tuple(script.panels[i] if i in only else panel for i, panel in enumerate(old.panels))
        if replace(old, panels=panels, made_with={}) == replace(script, made_with={}):
            return
    raise ValueError(
        f"{folder} holds the panels of another story or other settings; make single panels from its own story.json "
        f"(reattend story {there} --panel ...), or give another folder with --out"
    )


def _bytes(text: str) -> int:
    """A number of bytes as it is typed, such as 500MB. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if found is None:
        raise ValueError(f"--bank cannot read {text!r}: write a size such as 500MB or 2GB")
    return int(float(found[1]) * 1000 ** " kmgt".index(found[2] or " "))
