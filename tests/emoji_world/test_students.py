"""The comparison of linear students: it survives being stopped anywhere, and its numbers are those of its results."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import tiny

from reattend.attn_processors import ATTN_PROCESSORS
from reattend.distill.trainer import Run, Trained
from reattend.emoji_world import students
from reattend.emoji_world.students import FORMS, Judge, Stopped, attention_of, compare, main, slug

MODEL = "tiny-flux"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of bundled models with the tiny random FLUX, whose base size is 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("models") / MODEL
    tiny.flux_pipeline().save_pretrained(folder)
    return folder.parent


@pytest.fixture(autouse=True)
def bundle(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", models)
    monkeypatch.setattr(students, "PAIRS", 2)
    monkeypatch.setattr(students, "LARGER", 2)


class Killed(BaseException):
    """Like the end of the process: nothing of ours catches it."""


def dying(function: Any, after: int) -> Any:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return function(*args, **kwargs)

    return call


QUICK: dict[str, Any] = {"forms": ["clear radius=2", "linear"], "data": 4, "samples": 3, "denoising": 1, "batch": 2}


ROUNDING = 1e-5  # a picture is made again in a batch of another size, fp32
LEFT_OUT = ("seconds", "ms", "teacher_ms", "times_faster", "large_size")


def numbers(summary: Any, path: str = "") -> dict[str, Any]:
    """The numbers by their places, but for times."""
    if isinstance(summary, dict):
        found = [numbers(value, f"{path}/{key}") for key, value in summary.items() if key not in LEFT_OUT]
        return {place: value for some in found for place, value in some.items()}
    return {path: summary}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for part in ("teacher", "forms"):
        assert numbers(a[part]) == pytest.approx(numbers(b[part]), rel=ROUNDING, abs=ROUNDING)


def test_a_comparison_that_dies_anywhere_goes_on_and_says_the_same(tmp_path, monkeypatch, capsys):
    whole = compare(MODEL, out=tmp_path / "whole", steps=6, **QUICK)
    assert list(whole["forms"]) == QUICK["forms"]
    for form, row in whole["forms"].items():
        assert row["training"]["steps"] == 6 and row["training"]["samples"] == 12
        assert row["before"]["latent_error"]["mean"] != row["after"]["latent_error"]["mean"] > 0
        assert (
            row["cost"]["flops"]["attention"] > 0
            and row["cost"]["large_flops"]["model"] > row["cost"]["flops"]["model"]
        )
        assert (tmp_path / "whole" / "runs" / slug(form) / "student" / "student.safetensors").exists()
    clear, linear = (row["cost"]["large_flops"]["attention"] for row in whole["forms"].values())
    assert linear < whole["forms"]["linear"]["cost"]["large_teacher_flops"]["attention"] > clear

    parts, again = tmp_path / "parts", {"out": tmp_path / "parts", "steps": 6, **QUICK}
    for target, name, after in (
        (Run, "learn", 4),  # in the first training
        (students, "pictures", 1),  # of the first student
        (Run, "write_student", 2),  # after the last checkpoint, before the student
        (Judge, "cost", 0),  # of the second student
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, dying(getattr(target, name), after))
            with pytest.raises(Killed):
                compare(MODEL, **again)
    lines = (parts / "results.jsonl").read_text()
    (parts / "results.jsonl").write_text(lines[:-30])  # interrupted in the last line
    assert_same(compare(MODEL, **again), whole)

    with monkeypatch.context() as patch:  # all is there: nothing is made again
        for target, name in ((students, "pictures"), (students, "distill"), (Judge, "cost")):
            patch.setattr(target, name, dying(None, 0))
        assert_same(compare(MODEL, **again), whole)
        with pytest.raises(Killed):
            compare(MODEL, **again | {"forms": ["clear radius=3"]})  # but for a new form
    with pytest.raises(ValueError, match="results of other settings \\(steps differ\\)"):
        compare(MODEL, **again | {"steps": 7})
    main(show=parts / "summary.json")
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in shown if line.startswith("| ")] == [
        "| form", "| teacher", "| clear radius=2", "| linear",
    ]  # fmt: skip
    assert len({line.count("|") for line in shown if line.startswith("|")}) == 1
    assert "clear radius=2: " in shown[-1] and "points of the teacher" in shown[-1]


def test_time_ends_a_training_and_a_signal_ends_all(tmp_path, monkeypatch):
    quick = {**QUICK, "forms": ["linear"], "samples": 1}
    made = compare(MODEL, out=tmp_path / "timed", minutes=1e-5, **quick)
    training = made["forms"]["linear"]["training"]
    assert training["steps"] == 5 and training["seconds"] >= 60e-5  # ended when it was told first
    assert compare(MODEL, out=tmp_path / "timed", minutes=1e-5, **quick)["forms"] == made["forms"]

    def stopped(config: Any, on_step: Any, cancel: Any) -> Trained:
        cancel.request()
        return Trained(3, False, config.out / "student")

    monkeypatch.setattr(students, "distill", stopped)
    with pytest.raises(Stopped, match="stopped in 'linear' after step 3; the same command goes on"):
        compare(MODEL, out=tmp_path / "stopped", minutes=1, **quick)
    for steps, code in ((None, 130), (7, 130)):
        with pytest.raises(SystemExit) as ended:
            main(MODEL, tmp_path / f"{steps}", ("linear",), steps=steps, data=2, samples=1, batch=2)
        assert ended.value.code == code


def test_forms_are_names_and_settings():
    for form in FORMS:
        name, settings = form.split()[0], attention_of(form)
        assert settings["name"] == name and ATTN_PROCESSORS[name]
    assert len({slug(form) for form in FORMS}) == len(FORMS)
    assert attention_of("clear pattern=tile tile=(2,2) radius=2")["tile"] == (2, 2)
    for form, words in (
        ("clear 4", "the word '4', need key=value"),
        ("fast", "unknown attention"),
        ("clear size=2", "no setting 'size'"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_of(form)


def test_bad_comparisons_are_one_sentence(tmp_path):
    for changes, words in (
        ({"samples": 0}, "got samples=0"),
        ({"data": 1}, "data for one batch"),
        ({"minutes": 0.0}, "minutes > 0"),
        ({"forms": ["linear", "linear"]}, "none twice"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(MODEL, out=tmp_path / "out", **QUICK | changes)
    assert not (tmp_path / "out").exists()
