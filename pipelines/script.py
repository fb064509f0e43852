"""A story as one JSON-able value: who is in it, what its panels show, and how they are made. Pure data, no torch.

A file for people leaves most of it out; what comes back from `story` has every seed and number filled in, so that the same
file gives the same pixels on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .checks import check_number, check_text
from .files import inside
from .recipe import FILE_SIZE, PROMPT_LENGTH, SEED, Recipe

__all__ = ["MOST_PANELS", "OTHER_PICTURES", "Panel", "Script", "Subject"]

FORMAT = "reattend story"
VERSION = 1
MOST_PANELS = 1000
TOGETHER = (1, 64)
BANK = (1, 2**50)  # bytes
# Settings besides the seed with which a rehearsal makes other pictures, so that what it found before is no longer so.
OTHER_PICTURES = ("model", "width", "height", "steps", "guidance", "dtype", "attention")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Somebody or something that has to look the same in all panels.

    Attributes:
        name: what panels call it.
        phrase: the words in the captions that mean it, such as "cat"; by them attention maps find it where a panel gives
            no place. Empty: its name.
        looks: what stands for the phrase where the subject itself reads the caption, such as "red cat"; empty: the phrase.
        prompt: what its reference picture shows. Empty: no reference, or one of the phrase if it does not say how it looks.
        picture: a picture file in place of a made one.
        place: where it is in its reference picture: a box [x0, y0, x1, y1], {"mask": ...}, or None: it is found by its
            phrase if the prompt has it, else it fills the picture. In a picture of one's own, as the file shows it: if
            that has another shape than the story, it is cut around the place.
        seed: of its reference picture; None: from the story's.
        found: where a rehearsal found it, used in place of its phrase; a new prompt or seed forgets it.
    """

    name: str
    phrase: str = ""
    looks: str = ""
    prompt: str = ""
    picture: str | None = None
    place: Any = None
    seed: int | None = None
    found: Any = None

    def __post_init__(self) -> None:
        check_text("name of a subject", self.name, 100)
        if not self.name.strip():
            raise ValueError('a subject has no name; give it one, such as "Tom"')
        for part in ("phrase", "looks", "prompt"):
            check_text(f"{part} of {self.name!r}", getattr(self, part), PROMPT_LENGTH)
            object.__setattr__(self, part, getattr(self, part).strip())
        if not self.phrase:
            object.__setattr__(self, "phrase", self.name)
        if self.picture is not None:
            check_text(f"picture of {self.name!r}", self.picture, 4_000)
        if self.seed is not None:
            check_number(f"seed of {self.name!r}", self.seed, int, *SEED)

    @property
    def drawn(self) -> str:
        """What its reference picture shows."""
        return self.prompt or self.looks or self.phrase

    @property
    def has_reference(self) -> bool:
        """Whether it asks for a reference picture: by a prompt, with a picture, or for want of words."""
        return bool(self.prompt) or self.picture is not None or not self.looks


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of a story.

    Attributes:
        prompt: its caption.
        places: name of a subject -> where it is: a box, {"mask": ...}, or None to find it by its phrase. Left out: every
            subject whose phrase is in the caption, to be found.
        seed: None: from the story's.
        found: name -> where a rehearsal found those without a place (None: nowhere); a new prompt or seed forgets it.
    """

    prompt: str
    places: dict[str, Any] | None = None
    seed: int | None = None
    found: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_text("prompt of a panel", self.prompt, PROMPT_LENGTH)
        if not self.prompt.strip():
            raise ValueError("a panel has no prompt; say what it shows")
        if self.places is not None and not isinstance(self.places, Mapping):
            raise TypeError(f"places of a panel must map names to boxes, got {self.places!r}")
        if self.found is not None and not isinstance(self.found, Mapping):
            raise TypeError(f"found of a panel must map names to boxes, got {self.found!r}")
        if self.seed is not None:
            check_number("seed of a panel", self.seed, int, *SEED)


@dataclass(frozen=True, kw_only=True)
class Script:
    """A whole story. What is not named here is as in a `Recipe`.

    Attributes:
        subjects: who is in it.
        panels: its pictures in order.
        strength: how strongly subjects follow their references, 0 to 1; 0 uses none.
        consistency: other settings of `IsolationRepositionAttnProcessor`, such as {"isolate": [0, 0.8]}.
        together: panels made in one call: more is faster and takes more memory. A panel made again is made with those of
            its call, so that its pixels are those of the whole story.
        bank: most bytes of a bank of references; None: references are rows beside the panels.
        attention: other attention for the layers it is for; the subjects are kept in the layers that are left.

    Raises:
        ValueError, TypeError: one sentence about the first value that cannot be used.
    """

    subjects: tuple[Subject, ...]
    panels: tuple[Panel, ...]
    negative: str = ""
    model: str = "tiny-sd"
    width: int | None = None
    height: int | None = None
    steps: int = 20
    guidance: float | None = None
    seed: int | None = None
    dtype: str | None = None
    attention: tuple[dict[str, Any], ...] = ()
    strength: float = 1.0
    consistency: dict[str, Any] = field(default_factory=dict)
    together: int = 1
    bank: int | None = None
    made_with: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "attention", self.recipe("-").attention)  # checks what recipes share
        names = [subject.name for subject in self.subjects]
        if not names:
            raise ValueError("a story needs at least one subject; for single pictures use reattend image")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two subjects are called {twice[0]!r}; give each a name of its own")
        if not 1 <= len(self.panels) <= MOST_PANELS:
            raise ValueError(f"a story has 1 to {MOST_PANELS} panels, got {len(self.panels)}")
        for number, panel in enumerate(self.panels, start=1):
            if unknown := [name for name in panel.places or {} if name not in names]:
                raise ValueError(
                    f"panel {number} places {unknown[0]!r}, who is no subject; there are {', '.join(names)}"
                )
        check_number("strength", self.strength, float, 0.0, 1.0)
        check_number("together", self.together, int, *TOGETHER)
        if self.bank is not None:
            check_number("bank", self.bank, int, *BANK)
        self._check_consistency()

    def recipe(self, prompt: str) -> Recipe:
        """What the story shares with a picture of this prompt."""
        names = ("negative", "model", "width", "height", "steps", "guidance", "seed", "dtype", "attention", "made_with")
        return Recipe(prompt=prompt, **{name: getattr(self, name) for name in names})

    def subject(self, name: str) -> Subject:
        return next(subject for subject in self.subjects if subject.name == name)

    def group(self, number: int) -> range:
        """The panels made in the same call as this one, counted from 0."""
        first = number // self.together * self.together
        return range(first, min(first + self.together, len(self.panels)))

    def present(self, panel: Panel) -> dict[str, Any]:
        """Where everybody in a panel is; if it does not say, those whose phrase is in the caption, to be found by it."""
        if panel.places is not None:
            return dict(panel.places)
        words = {one.name: rf"(?<!\w){re.escape(one.phrase)}(?!\w)" for one in self.subjects}
        return {name: None for name, phrase in words.items() if re.search(phrase, panel.prompt, re.IGNORECASE)}

    def with_panel(self, number: int, **changes: Any) -> Script:
        """The story with one panel changed, counted from 0. A new prompt says anew who is in it, if no place is given."""
        panels = list(self.panels)
        forget: dict[str, Any] = {"found": None} if {"prompt", "seed"} & set(changes) else {}
        if "prompt" in changes and all(where is None for where in (panels[number].places or {}).values()):
            forget["places"] = None
        panels[number] = replace(panels[number], **forget | changes)
        return replace(self, panels=tuple(panels))

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Script:
        """Read a story. Raises ValueError or TypeError in one sentence for anything else.

        "format" and "version" may be left out; subjects may be a list, or an object from name to the rest.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a story: this is not JSON ({error})") from None
        if not isinstance(values, dict) or values.pop("format", FORMAT) != FORMAT:
            raise ValueError(f'not a story: need a JSON object, with "format": "{FORMAT}" or none')
        if (version := values.pop("version", VERSION)) != VERSION:
            raise ValueError(f"story of format version {version!r}, this reattend reads version {VERSION}")
        if isinstance(values.get("subjects"), dict):
            values["subjects"] = [
                {"name": name, **(rest if isinstance(rest, dict) else {"prompt": rest})}
                for name, rest in values["subjects"].items()
            ]
        for part, kind in (("subjects", Subject), ("panels", Panel)):
            if not isinstance(values.get(part), list):
                raise ValueError(f"a story needs a list of {part}, got {values.get(part)!r}")
            values[part] = tuple(_built(kind, entry, part) for entry in values[part])
        attention = values.get("attention", [])
        if not isinstance(attention, (list, tuple)):
            raise TypeError(f"attention of a story must be a list, got {attention!r}")
        return _built(cls, values | {"attention": tuple(attention)}, "story")

    @classmethod
    def read(cls, path: str | Path) -> Script:
        """The story in a JSON file; its mask and picture files are found beside it, in the same folder.

        Raises ValueError or TypeError in one sentence.
        """
        path = Path(path)
        try:
            if path.stat().st_size > FILE_SIZE * 10:
                raise ValueError(f"{path} is too big for a story: over {FILE_SIZE * 10} bytes")
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot read the story {path}: {error.strerror or error}; check the path") from error
        except UnicodeDecodeError:
            raise ValueError(f"{path} holds no story: it is no text; give a JSON file") from None
        try:
            return cls.from_json(text)._beside(path.parent)
        except (TypeError, ValueError) as error:
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{path}: {error}") from None

    def _beside(self, folder: Path) -> Script:
        """With mask files read and picture files found in `folder`."""
        from .masks import as_place

        def kept(name: str, where: Any) -> Any:
            if not isinstance(where, Mapping):
                return where
            return {"mask": as_place(name, where, folder).mask}

        subjects = tuple(
            replace(
                subject,
                place=kept(subject.name, subject.place),
                picture=None if subject.picture is None else str(inside(folder, subject.picture)),
            )
            for subject in self.subjects
        )
        panels = tuple(
            replace(panel, places={name: kept(name, where) for name, where in panel.places.items()})
            if panel.places is not None
            else panel
            for panel in self.panels
        )
        return replace(self, subjects=subjects, panels=panels)

    def _check_consistency(self) -> None:
        from ..attn_processors import IsolationRepositionAttnProcessor

        if not isinstance(self.consistency, Mapping):
            raise TypeError(f"consistency must map settings to values, got {self.consistency!r}")
        ours = ("panels", "references", "caption_rows", "source", "strength")
        if taken := [name for name in self.consistency if name in ours]:
            raise ValueError(f"consistency cannot set {taken[0]!r}: the story itself does")
        IsolationRepositionAttnProcessor.from_settings(self.consistency)
        object.__setattr__(self, "consistency", dict(self.consistency))


def _built(kind: Any, entry: Any, part: str) -> Any:
    if not isinstance(entry, dict):
        raise TypeError(f"{part}: need JSON objects, got {entry!r}")
    known = [f.name for f in dataclasses.fields(kind)]
    if unknown := sorted(set(entry) - set(known)):
        raise ValueError(f"{part}: unknown entries {', '.join(unknown)}; known are {', '.join(known)}")
    needed = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in entry]:
        raise ValueError(f"{part}: an entry lacks {missing[0]!r}: {json.dumps(entry)[:80]}")
    return kind(**entry)
