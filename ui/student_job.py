"""Trying the student of a run: one prompt drawn twice from the same noise, by the teacher and by the student.

`read_student_form` turns the form into a recipe, `StudentJob` makes the two pictures of it. The rest of the job is that of
the image tab (`image_job`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..pipelines.events import CancelToken
from ..pipelines.recipe import Recipe
from .image_job import ImageJob, whole
from .jobs import Made, Progress
from .run_watch import read_run

__all__ = ["StudentJob", "read_student_form"]


class StudentJob(ImageJob):
    """`ImageJob` that draws recipes with a student twice: first as the teacher does, with the same seed.

    A run that goes on deletes its older checkpoints, so the student is copied beside the pictures first, once for as many
    pairs as it draws; their recipe names the copy.
    """

    def __call__(self, recipe: Recipe, token: CancelToken, report: Callable[[Progress], None]) -> Made:
        if recipe.linear is None:
            return super().__call__(recipe, token, report)
        report(Progress("Copying the student"))
        copy, new = _copied(Path(recipe.linear), self.out)
        halves: tuple[Path, ...] = ()
        try:
            teacher = super().__call__(replace(recipe, linear=None), token, _named("The teacher", report))
            halves = (teacher.file, teacher.recipe_file)
            same = replace(recipe, seed=teacher.recipe.seed, linear=str(copy))
            student = super().__call__(same, token, _named("The student", report))
        except BaseException:  # one of the pair says nothing
            for file in halves:
                with contextlib.suppress(OSError):
                    file.unlink()
            if new:
                shutil.rmtree(copy, ignore_errors=True)
            raise
        return replace(student, beside=teacher.file, seconds=teacher.seconds + student.seconds)


def read_student_form(form: Mapping[str, Any], root: Path) -> Recipe:
    """The recipe that the form asks for.

    Args:
        form: "run" (a name that `find_runs` gives), "prompt", "steps", "seed".
        root: where runs are found.

    Raises:
        ValueError, TypeError: one sentence about the first field that cannot be used.
    """
    prompt = (form["prompt"] or "").strip()
    if not prompt:
        raise ValueError("The prompt is empty; say what the picture should show.")
    if not form["run"]:
        raise ValueError("No run is chosen; train a student first, with: reattend distill run.")
    run = read_run(root, form["run"])
    if run.student is None:
        raise ValueError("The run has no student yet; the first comes with its first checkpoint.")
    folder, _ = run.student
    width, height = _trained_size(root / run.name, run.config) or (None, None)
    return Recipe(
        prompt=prompt, model=str(run.config["model"]), linear=str(folder), width=width, height=height,
        steps=whole("number of steps", form["steps"]),  # type: ignore[arg-type]  # Recipe refuses None
        seed=whole("seed", form["seed"]), dtype=run.config.get("precision"),
    )  # fmt: skip


def _copied(student: Path, out: Path) -> tuple[Path, bool]:
    """A copy of a student's folder in `out`, named by what is in it; and whether it was not there before."""
    aside = out / f".student-{secrets.token_hex(4)}.part"
    try:
        shutil.copytree(student, aside)
        digest = hashlib.sha256()
        for file in sorted(aside.iterdir()):
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        copy = out / f"student-{digest.hexdigest()[:16]}"
        if new := not copy.exists():
            os.replace(aside, copy)
        return copy, new
    except (OSError, shutil.Error) as error:
        reason = getattr(error, "strerror", None) or "not all of it is there any more"
        raise ValueError(f"The student cannot be copied beside the picture: {reason}; draw again.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _trained_size(folder: Path, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of the run's first samples; None = the model's own."""
    for data in (Path(str(config.get("data", ""))), folder / "data"):
        try:
            width, height = json.loads((data / "dataset.json").read_text(encoding="utf-8"))["sizes"][0]
            return int(width), int(height)
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            continue
    return None


def _named(who: str, report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    def told(progress: Progress) -> None:
        stage = f"{who}: {progress.stage[0].lower()}{progress.stage[1:]}"
        report(replace(progress, stage=stage, part=who if progress.step is not None else None))

    return told
