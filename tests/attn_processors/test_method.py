"""Settings: checked where they are written, the same from Python, JSON and a command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from reattend.attn_processors import AttnMethod


@dataclass(frozen=True, kw_only=True)
class Stage:
    until: float
    cells: tuple[int, int] = (2, 2)


@dataclass(frozen=True, kw_only=True)
class Many(AttnMethod):
    name: ClassVar[str] = "many"
    ratio: float = 0.5
    count: int = 1
    exact: bool = False
    kind: Literal["a", "b"] = "a"
    label: str = ""
    limit: float | None = None
    stages: tuple[Stage, ...] = (Stage(until=0.4), Stage(until=1.0, cells=(4, 4)))


def test_settings_survive_json():
    method = Many(ratio=0.25, limit=2, stages=(Stage(until=0.1),))
    assert Many.from_settings(json.loads(json.dumps(method.settings()))) == method
    assert hash(method) == hash(Many(ratio=0.25, limit=2.0, stages=(Stage(until=0.1),)))


def test_words_of_a_command_line_become_values():
    words = {"ratio": "0.4", "count": "3", "exact": "yes", "kind": "b", "label": "12", "limit": "none"}
    assert Many.from_settings(words) == Many(ratio=0.4, count=3, exact=True, kind="b", label="12", limit=None)
    stages = "[{'until': 0.5, 'cells': [1, 3]}]"
    assert Many.from_settings({"stages": stages}).stages == (Stage(until=0.5, cells=(1, 3)),)


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"ratoi": 1}, ValueError, "Many has no setting 'ratoi'; it has on_mismatch, ratio, count"),
        ({"ratio": "high"}, TypeError, r"Many\(ratio=...\) wants float, got 'high' \(str\)"),
        ({"count": 1.5}, TypeError, r"Many\(count=...\) wants int, got 1.5 \(float\)"),
        ({"count": True}, TypeError, r"wants int, got True \(bool\)"),
        ({"exact": "maybe"}, TypeError, r"wants bool, got 'maybe'"),
        ({"kind": "c"}, ValueError, r"wants one of 'a', 'b', got 'c'"),
        ({"on_mismatch": "ignore"}, ValueError, "wants one of 'raise', 'stock', got 'ignore'"),
        ({"limit": []}, TypeError, r"wants float or NoneType, got \[\]"),
        ({"stages": [{"untl": 1}]}, ValueError, "has no field 'untl'; it has until, cells"),
        ({"stages": [{"until": 1, "cells": [1]}]}, TypeError, r"stages=...\).cells wants 2 values, got 1"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bad_settings_get_one_sentence(settings, error, sentence):
    with pytest.raises(error, match=sentence):
        Many.from_settings(settings)


def test_direct_construction_checks_types_too():
    with pytest.raises(TypeError, match="wants float"):
        Many(ratio="high")
    assert Many(ratio=1).ratio == 1.0 and isinstance(Many(ratio=1).ratio, float)


def test_phases_are_noticed_by_overriding():
    class Phased(Many):
        def phase(self, progress: float) -> int:
            return int(progress > 0.5)

    assert not Many().phased and Phased().phased


def test_calling_a_method_as_a_processor_says_what_to_do():
    with pytest.raises(RuntimeError, match="pluggable"):
        Many()(None, None)
