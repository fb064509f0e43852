"""What the page reads from the folder of a training, and the pair of pictures it makes with the student."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from reattend.attn_processors import ClearAttnProcessor
from reattend.distill import save_linear
from reattend.pipelines.events import Cancelled, CancelToken
from reattend.pipelines.recipe import Recipe
from reattend.ui import image_job
from reattend.ui.image_job import load_recipe, make_image
from reattend.ui.jobs import Session, Worker
from reattend.ui.run_watch import POINTS, Watched, find_runs, fingerprint, pictures_changed, read_run
from reattend.ui.student_job import StudentJob, read_student_form

CONFIG = {"model": "tiny", "data": "runs/samples", "steps": 100, "batch": 8, "precision": "float32",
          "attention": {"name": "clear", "radius": 4.0, "pattern": "disc", "pool": None}}  # fmt: skip


def line(step: int, **more: Any) -> str:
    told = {"step": step, "loss": 1 / step, "output": 0.5 / step, "attention": 0.1, "layers": {}, "lr": 1e-3,
            "seconds": 2.0 * step, "samples_per_second": 4.0, "memory_mib": 512.0, "gradient_norm": 1.0, **more}  # fmt: skip
    return json.dumps(told) + "\n"


def run(root: Path, name: str, steps: int = 0, age: float = 0.0) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "checkpoints").mkdir()
    if steps:
        (folder / "log.jsonl").write_text("".join(line(step) for step in range(1, steps + 1)))
    for path in (folder / "config.json", folder / "log.jsonl"):
        if path.exists():
            os.utime(path, (time.time() - age,) * 2)
    return folder


def student(folder: Path, steps: int) -> Path:
    save_linear(folder, tiny.flux_pipeline().transformer, ClearAttnProcessor(radius=2), {}, info={"steps": steps})
    return folder


def test_runs_are_found_below_the_root_and_nowhere_else(tmp_path):
    root = tmp_path / "runs"
    run(root, "old", 3, age=1000)
    run(root, "students/runs/linear", 3)
    run(tmp_path, "outside", 3)
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "samples").mkdir()
    (root / "samples" / "config.json").write_text("{}")
    assert find_runs(root) == ["students/runs/linear", "old"]
    assert find_runs(tmp_path / "nothing") == []
    for name in ("../outside", "link", str(tmp_path / "outside"), "", None, "samples"):
        with pytest.raises(ValueError, match="There is no such run any more"):
            read_run(root, name)


def test_a_run_tells_how_far_it_is(tmp_path):
    folder = run(tmp_path, "a", 20)
    found = read_run(tmp_path, "a")
    assert (found.state, found.step, found.steps, found.fraction) == ("goes on", 20, 100, 0.2)
    assert found.line == "Training: step 20 of 100, 2 min 40 s left"
    assert dict(found.facts) == {
        "Teacher": "tiny", "Attention": "clear, radius 4, pattern disc", "Trained for": "40 s", "Pace": "4 samples a second",
        "Memory": "0.50 GiB at the peak", "Loss": "0.05", "Learning rate": "0.001",
    }  # fmt: skip
    assert found.curves["loss"][:2] == [(1, 1.0), (2, 0.5)] and "validation_latent_error" not in found.curves
    later = read_run(tmp_path, "a", now=time.time() + 1000)
    assert later.state == "stopped" and later.line.startswith("Not running: stopped at step 20 of 100.")
    slow = read_run(tmp_path, "a", now=time.time() + 60)
    assert slow.state == "goes on"
    before = fingerprint(tmp_path, "a")
    assert before == fingerprint(tmp_path, "a")
    with (folder / "log.jsonl").open("a") as log:
        log.write(line(100, damaged_samples=3) + '{"step": 100, "validation_latent_error": 0.2}\n{"step": 101, "los')
    assert fingerprint(tmp_path, "a") != before
    student(folder / "student", 100)
    ended = read_run(tmp_path, "a")
    assert (ended.state, ended.line) == ("finished", "Finished: step 100 of 100.")
    assert dict(ended.facts)["Damaged samples"] == "3, others took their places"
    assert ended.curves["validation_latent_error"] == [(100, 0.2)]


def test_a_run_that_has_not_logged_waits_and_long_curves_are_thinned(tmp_path):
    folder = run(tmp_path, "a")
    assert read_run(tmp_path, "a").state == "waiting"
    (folder / "log.jsonl").write_text(line(1, loss=None) + "".join(line(step) for step in range(2, 1002)))
    curve = read_run(tmp_path, "a").curves["loss"]
    assert len(curve) <= POINTS and curve[-1][0] == 1001
    assert curve[0][1] == pytest.approx(np.mean([1 / 2, 1 / 3, 1 / 4, 1 / 5]))
    with (folder / "log.jsonl").open("a") as log:
        log.write(line(1002, loss=None))  # all steps since the line before were skipped
    found = read_run(tmp_path, "a")
    assert found.step == 1002 and dict(found.facts)["Loss"] == f"{1 / 1001:.4g}"
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"has a config.json that cannot be read"):
        read_run(tmp_path, "a")


def test_a_log_that_vanishes_tells_nothing(tmp_path, monkeypatch):
    run(tmp_path, "a", 20)
    read = Path.read_text

    def vanished(path, *args, **more):
        if path.name == "log.jsonl":
            raise FileNotFoundError(path)
        return read(path, *args, **more)

    monkeypatch.setattr(Path, "read_text", vanished)
    found = read_run(tmp_path, "a")
    assert (found.state, found.step, found.curves) == ("waiting", 0, {})


def test_what_was_picked_is_not_sent_back_and_a_picture_that_cannot_be_read_is_left_out(tmp_path):
    from reattend.ui.tabs.distill import _picture_updates

    pictures = []
    for step, content in ((30, b"no picture"), (20, b"P6 2 2 255 ppm is not opened"), (10, None)):
        file = tmp_path / f"{step}.png"
        if content is None:
            Image.new("RGB", (8, 4)).save(file)
        else:
            file.write_bytes(content)
        pictures.append((step, file, ("a cat",)))
    found = Watched("a", "goes on", 30, 100, {}, pictures=tuple(pictures))
    watch = {name: name for name in ("step", "pictures")}
    picked = _picture_updates(watch, found, "10")
    assert "value" not in picked["step"] and picked["step"]["choices"] == ["the newest", "30", "20", "10"]
    assert picked["pictures"]["value"].count("<img") == 1
    for step in ("20", "30"):
        assert _picture_updates(watch, found, step)["pictures"]["value"] == ""
    assert _picture_updates(watch, found, "7")["step"]["value"] == "the newest"
    newer = fingerprint(tmp_path, "a"), pictures_changed(tmp_path, "a")
    (tmp_path / "a" / "pictures").mkdir(parents=True)
    assert newer[1] == 0 != pictures_changed(tmp_path, "a") and fingerprint(tmp_path, "a") != newer[0]


def test_pictures_are_told_newest_first_and_half_written_ones_are_not(tmp_path):
    folder = run(tmp_path, "a", 20) / "pictures"
    folder.mkdir()
    for step in (10, 20, 30):
        Image.new("RGB", (8, 4)).save(folder / f"step-{step:08d}.png")
        if step < 30:
            (folder / f"step-{step:08d}.json").write_text(json.dumps({"step": step, "prompts": ["a cat"]}))
    assert [(step, prompts) for step, _, prompts in read_run(tmp_path, "a").pictures] == [
        (20, ("a cat",)),
        (10, ("a cat",)),
    ]


def test_the_form_asks_for_the_newest_student_at_the_size_it_was_trained_on(tmp_path):
    folder = run(tmp_path, "a", 20)
    form = {"run": "a", "prompt": " a cat ", "steps": 3, "seed": "5"}
    with pytest.raises(ValueError, match="The run has no student yet"):
        read_student_form(form, tmp_path)
    student(folder / "student", 5)  # of an earlier session
    newest = student(folder / "checkpoints" / "step-00000015" / "student", 15)
    (folder / "data").mkdir()
    (folder / "data" / "dataset.json").write_text(json.dumps({"sizes": [[48, 32]]}))
    wanted = Recipe(
        prompt="a cat", model="tiny", linear=str(newest), width=48, height=32, steps=3, seed=5, dtype="float32"
    )
    assert read_student_form(form, tmp_path) == wanted
    for changes, words in (
        ({"prompt": ""}, "The prompt is empty"),
        ({"run": None}, "No run is chosen"),
        ({"run": "../a"}, "There is no such run"),
        ({"seed": "x"}, "seed must be a whole number"),
    ):
        with pytest.raises(ValueError, match=words):
            read_student_form(form | changes, tmp_path)


def test_teacher_and_student_draw_the_same_noise(flux, tmp_path, monkeypatch):
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: flux)
    folder = student(run(tmp_path / "runs", "a", 20) / "student", 20)
    out = tmp_path / "out"
    worker = Worker(StudentJob(out))
    form = {"run": "a", "prompt": "a cat", "steps": 2, "seed": ""}
    (tmp_path / "runs" / "a" / "data").mkdir()
    (tmp_path / "runs" / "a" / "data" / "dataset.json").write_text(json.dumps({"sizes": [[32, 32]]}))
    views = list(make_image(Session(worker), form, (), lambda form, _: read_student_form(form, tmp_path / "runs")))
    worker.close()
    last = views[-1]
    assert last.tone == "good", last.message
    made = last.made
    teacher, ours = Recipe.read(made.beside), Recipe.read(made.file)
    assert teacher.linear is None and teacher.seed == ours.seed
    (copy,) = out.glob("student-*")
    assert ours.linear == str(copy)
    assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}
    pixels = [np.asarray(Image.open(path)) for path in (made.beside, made.file)]
    assert pixels[0].shape == pixels[1].shape == (32, 32, 3) and (pixels[0] != pixels[1]).any()
    assert f"Saved as {made.beside.name} and {made.file.name}." in last.message
    values, view = load_recipe(made.file, ["tiny"])  # on another tab
    assert values == {} and "draws with a linear student" in view.message


def test_a_student_that_its_run_deletes_meanwhile_is_drawn_from_its_copy(flux, tmp_path, monkeypatch):
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: flux)
    job, out = StudentJob(tmp_path / "out"), tmp_path / "out"
    folder = student(tmp_path / "student", 20)
    recipe = Recipe(prompt="a cat", model="tiny", linear=str(folder), width=32, height=32, steps=2, seed=3)

    def report(progress):
        if progress.part == "The teacher":
            shutil.rmtree(folder, ignore_errors=True)  # its checkpoint is not among the newest any more

    first = job(recipe, CancelToken(), report)
    assert not folder.exists() and Recipe.read(first.file).linear == str(next(out.glob("student-*")))
    student(folder, 20)
    again = job(recipe, CancelToken(), lambda progress: None)
    assert len(list(out.glob("student-*"))) == 1  # the same student is kept once
    assert np.array_equal(*(np.asarray(Image.open(made.file)) for made in (first, again)))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"The student cannot be copied beside the picture: .*; draw again"):
        job(recipe, CancelToken(), lambda progress: None)


def test_a_pair_that_is_stopped_leaves_no_half(flux, tmp_path, monkeypatch):
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: flux)
    folder, token, parts = student(tmp_path / "student", 20), CancelToken(), []

    def report(progress):
        parts.append(progress.part)
        if progress.part == "The student":
            token.request()

    recipe = Recipe(prompt="a cat", model="tiny", linear=str(folder), width=32, height=32, steps=3)
    with pytest.raises(Cancelled):
        StudentJob(tmp_path / "out")(recipe, token, report)
    assert "The teacher" in parts and parts[-1] == "The student"
    assert list((tmp_path / "out").iterdir()) == []
