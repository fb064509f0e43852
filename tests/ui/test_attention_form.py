"""The form of an attention comes from its class and gives back what the class reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from reattend.attn_processors import ATTN_PROCESSORS, AttnMethod
from reattend.ui.attention_form import METHOD_WORDS, WORDS, settings_of


@dataclass(frozen=True, kw_only=True)
class Example(AttnMethod):
    mode: Literal["fast", "exact"] = "fast"
    flag: bool = True
    count: int = 3
    share: float = 0.5
    limit: float | None = None
    grid: tuple[int, int] = (4, 4)

    name: ClassVar[str] = "example"


def test_every_field_gets_the_control_for_its_type():
    kinds = {s.name: s.kind for s in settings_of(Example)}
    assert kinds == {
        "mode": "choice",
        "flag": "flag",
        "count": "number",
        "share": "text",
        "limit": "text",
        "grid": "text",
        "on_mismatch": "choice",
    }


def test_a_method_s_own_settings_come_before_those_all_methods_share():
    assert [s.name for s in settings_of(Example)][-1] == "on_mismatch"


@pytest.mark.parametrize("method", [Example, *ATTN_PROCESSORS.values()], ids=lambda m: m.__name__)
def test_the_untouched_form_gives_the_default_settings(method):
    given = {s.name: s.read(s.default) for s in settings_of(method)}
    assert method.from_settings(given) == method()


def test_changed_values_survive_the_form():
    changed = Example(mode="exact", flag=False, count=7, share=0.25, limit=1.5, grid=(2, 3))
    shown = {s.name: s.shown(changed.settings()[s.name]) for s in settings_of(Example)}
    assert shown["grid"] == "(2, 3)"
    assert shown["share"] == "0.25"
    assert Example.from_settings({s.name: s.read(shown[s.name]) for s in settings_of(Example)}) == changed


def test_an_empty_field_means_none_only_where_none_is_allowed():
    settings = {s.name: s for s in settings_of(Example)}
    assert settings["limit"].read("  ") is None
    with pytest.raises(ValueError, match=r"count.*default 3"):
        settings["count"].read(None)


def test_every_shipped_setting_has_plain_words_and_its_technical_name():
    for name, method in ATTN_PROCESSORS.items():
        assert name in METHOD_WORDS
        for setting in settings_of(method):
            assert setting.name in WORDS, f"{name}.{setting.name}"
            assert setting.label == WORDS[setting.name][0]
            assert f"({setting.name})" in setting.hint
