"""Checks of the values in a recipe. Each raises one sentence: what is wrong, what we got, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..attn_processors import AttnMethod

__all__ = [
    "SIDE", "STEPS", "attention_entry", "attention_in_full", "check_number", "check_side", "check_text",
    "complete_attention", "method_of",
]  # fmt: skip

SIDE = (8, 8192)  # smallest and largest width or height, in pixels
STEPS = (1, 1000)  # schedulers are trained on 1000 timesteps


def check_text(name: str, value: object, longest: int) -> None:
    """Raise TypeError or ValueError if `value` is no text of at most `longest` characters."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {value!r}")
    if len(value) > longest:
        raise ValueError(f"{name} is too long: got {len(value)} characters, at most {longest} are allowed; shorten it")


def check_number(name: str, value: object, kind: type, low: float, high: float) -> None:
    """Raise TypeError or ValueError if `value` is no number of that kind (int or float) from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise TypeError(
            f"{name} must be {'a number' if kind is float else 'a whole number'} from {low} to {high}, got {value!r}"
        )
    if not low <= value <= high or not math.isfinite(value):  # whole numbers may be too large for a float
        raise ValueError(f"{name} is out of range: got {value}, need {low} to {high}")


def check_side(name: str, value: object) -> None:
    """Raise TypeError or ValueError if `value` is neither None nor a possible width or height in pixels."""
    if value is None:
        return
    low, high = SIDE
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number of pixels, got {value!r}")
    if not low <= value <= high or value % 8:
        near = min(max(round(value / 8) * 8, low), high)
        raise ValueError(
            f"{name} does not work: got {value} pixels, need a multiple of 8 from {low} to {high}; try {near}"
        )


def complete_attention(entries: object) -> tuple[dict[str, Any], ...]:
    """Each entry with all its settings, checked by the attention it names. Raises TypeError or ValueError."""
    if not isinstance(entries, (tuple, list)) or not all(isinstance(entry, Mapping) for entry in entries):
        raise TypeError(f'attention must be a list like [{{"name": "agent", "ratio": 0.4}}], got {entries!r}')
    if not entries:
        return ()
    from ..attn_processors import ATTN_PROCESSORS

    complete = []
    for entry in entries:
        name = entry.get("name")
        if not isinstance(name, str) or name not in ATTN_PROCESSORS:
            raise ValueError(
                f"unknown attention: got {name!r}, there are {', '.join(ATTN_PROCESSORS)}; choose one of them"
            )
        complete.append({"name": name, **method_of(entry).settings()})
    return tuple(complete)


def attention_in_full(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Complete entries with the schedule that runs, which their settings may leave to a default of this version."""
    return [
        {**entry, "schedule": [asdict(phase) for phase in getattr(method_of(entry), "schedule", ())]}
        for entry in entries
    ]


def method_of(entry: Mapping[str, Any]) -> AttnMethod:
    """What an entry of a recipe stands for. Raises TypeError or ValueError for its settings; its name is a known one."""
    from ..attn_processors import ATTN_PROCESSORS

    return ATTN_PROCESSORS[entry["name"]].from_settings({key: entry[key] for key in entry if key != "name"})


def attention_entry(name: str = "", *pairs: str) -> dict[str, str]:
    """One `--attention NAME key=value ...`; the attention itself reads the values."""
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(
                f"--attention {name} cannot read {pair!r}: settings are written key=value, "
                "as in --attention agent ratio=0.4, and the prompt comes before --attention"
            )
    return {"name": name, **dict(pair.split("=", 1) for pair in pairs)}
