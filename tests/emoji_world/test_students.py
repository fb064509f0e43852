"""The comparison of linear students: it survives being stopped anywhere, and its numbers are those of its results."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
from holding import held_elsewhere

from reattend.attn_processors import ATTN_PROCESSORS, ClearAttnProcessor
from reattend.attn_processors.ops.layout import TokenLayout
from reattend.distill.trainer import Run, Trained
from reattend.emoji_world import rates, students
from reattend.emoji_world.read import Score
from reattend.emoji_world.results import Results
from reattend.emoji_world.student_table import COST, TEACHER, TRAINED, arm_of, summarize, table
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
        folder = tmp_path / "whole" / "runs" / slug(form)
        assert (folder / "student" / "student.safetensors").exists()
        assert json.loads((folder / "config.json").read_text())["match"] == "all"
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
    sofar = json.loads((parts / "summary.json").read_text())  # of the form that was done
    assert list(sofar["forms"]) == QUICK["forms"][:1] and "| clear radius=2 |" in table(sofar)
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
    assert shown[5].split(" | ")[-2].endswith("x)") and shown[5].endswith(" s |")  # of the step, of the training
    assert "clear radius=2: " in shown[-1] and "points against the teacher" in shown[-1]


def test_a_signal_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr(students, "distill", lambda config, on_step: Trained(3, False, config.out / "student"))
    with pytest.raises(Stopped, match="stopped in 'linear' after step 3; the same command goes on"):
        compare(MODEL, out=tmp_path / "out", **{**QUICK, "forms": ["linear"], "samples": 1})
    with pytest.raises(SystemExit) as ended:
        main(MODEL, tmp_path / "main", ("linear",), steps=7, data=2, samples=1, batch=2)
    assert ended.value.code == 130


def test_two_comparisons_do_not_work_in_one_folder(tmp_path):
    with held_elsewhere(tmp_path), pytest.raises(ValueError, match="another process works in"):
        compare(MODEL, out=tmp_path, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("before", "after", "value", "words"),
    [
        (90, 90, 0.0, "+0.0 [+0.0, +0.0] points against the teacher, within the goal of -2"),
        (80, 93, 0.03, "points against the teacher, within the goal of -2"),
        (80, 89, -0.01, "within the goal of -2, but the interval reaches across it"),
        (90, 88, -0.02, "within the goal of -2, but the interval reaches across it"),
        (90, 87, -0.03, "NOT within the goal of -2, but the interval reaches across it"),
        (70, 70, -0.2, "points against the teacher, NOT within the goal of -2"),
    ],
)
def test_the_difference_itself_is_judged_and_its_interval_is_told(tmp_path, monkeypatch, before, after, value, words):
    """The teacher draws 90 of 100 pictures right; a student the first ones of them, or some more."""
    monkeypatch.setattr(rates, "RESAMPLES", 400)
    form = "clear radius=4"
    results, near = Results(tmp_path / "results.jsonl", "test", {}), {"latent_error": 0.1, "psnr": 20.0, "ssim": 0.9}
    for arm, right in ((TEACHER, 90), (arm_of(form, "before"), before), (arm_of(form, "after"), after)):
        scores = [Score(kinds=i < right, background=True, sprites=1, sprites_right=1, extra=0, named=0, tints_right=0)
                  for i in range(100)]  # fmt: skip
        results.add([{"arm": arm, "sample": i, "score": asdict(score), **near} for i, score in enumerate(scores)])
    flops = {"model": 2e9, "attention": 1e9}
    results.add([
        {"arm": TRAINED + form, "sample": 0, "steps": 700, "seconds": 612.3},
        {"arm": COST + form, "sample": 0, "ms": 30.0, "teacher_ms": 45.0, "times_faster": 1.5, "flops": flops,
         "teacher_flops": flops, "large_flops": flops, "large_teacher_flops": flops, "large_size": [1024, 1024]},
    ])  # fmt: skip
    summary = summarize(results, [form], 100)
    found = summary["forms"][form]
    assert found["after"]["minus teacher"]["all right"]["value"] == pytest.approx(value)
    assert found["after minus before"]["all right"]["value"] == pytest.approx((after - before) / 100)
    settings = {"steps": 700, "batch": 16, "denoising": 10, "side": 256}
    about = {"model": "m", "device": "cpu", "versions": {"torch": "2"}}
    row, *_, verdict = table(summary | {"settings": settings, "about": about}).splitlines()[5:]
    assert verdict.endswith(words)
    assert row.endswith("| 30.0, 45.0 (1.50 x) | 612 s |")


def test_forms_are_names_and_settings():
    for form in FORMS:
        name, settings = form.split()[0], attention_of(form)
        assert settings["name"] == name and ATTN_PROCESSORS[name]
        method = ATTN_PROCESSORS[name].from_settings({key: value for key, value in settings.items() if key != "name"})
        if isinstance(method, ClearAttnProcessor):
            far, near = (
                float(
                    method.pattern_of(f"single_transformer_blocks.{i}.attn")
                    .key_counts(TokenLayout(16, 16))
                    .double()
                    .mean()
                )
                for i in range(2)
            )
            if method.radii:  # clearly less than the grid at 256 px: in 2 of the 6 layers of tiny-flux as the first
                assert (2 * far + 4 * near) / 6 <= 110
            else:  # all of about one cost
                assert far == near and 30 <= near <= 50
    assert len({slug(form) for form in FORMS}) == len(FORMS)
    assert attention_of("clear pattern=tile tile=(2,2) radius=3.1")["tile"] == (2, 2)
    for form, words in (
        ("clear 4", "the word '4', need key=value"),
        ("fast", "unknown attention"),
        ("clear size=2", "no setting 'size'"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_of(form)


def test_bad_comparisons_are_one_sentence_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for changes, words in (
        ({"samples": 0}, "got samples=0"),
        ({"data": 1}, "data for one batch"),
        ({"steps": 0}, "steps is out of range: got 0, need 1"),
        ({"lr": -1.0}, "lr is out of range: got -1.0"),
        ({"precision": "float15"}, "precision=...\\) wants one of 'float32', 'bfloat16', 'float16', got 'float15'"),
        ({"precision": "float16"}, "float16 trains on CUDA only"),
        ({"forms": ["linear", "linear"]}, "none twice"),
        ({"forms": ["linear", "clear radius=0"]}, "radius"),
        ({"forms": ["linear", "dual-scope"]}, "dual-scope"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(MODEL, out=tmp_path / "out", **QUICK | changes)
    assert not (tmp_path / "out").exists()
