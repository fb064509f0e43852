"""`reattend distill` from the command line: samples, a run that is stopped and goes on, and bad input."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

from reattend.distill.progress import TrainEvent
from reattend.ui.cli import main
from reattend.ui.distill_commands import TrainBar


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    tiny.flux_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def world(flux_folder, tmp_path, monkeypatch):
    """The tiny random FLUX under the name of a bundled model, and an empty folder with prompts to work in."""
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", flux_folder.parent)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\n")


DATA = ["distill", "data", "--model", "tiny-flux", "--prompts", "prompts.txt", "--samples", "4", "--steps", "1",
        "--text-length", "16", "--size", "32x32", "--device", "cpu"]  # fmt: skip
RUN = ["distill", "run", "--model", "tiny-flux", "--data", "runs/samples", "--batch", "2", "--micro-batch", "2", "--attention",
       "clear", "radius=2", "--set", "log_every=1", "save_every=2"]  # fmt: skip


def test_samples_then_a_run_then_more_of_it(capsys):
    assert main([*DATA, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"samples": 4, "folder": "runs/samples"}
    assert main([*RUN, "--steps", "3"]) == 0
    assert capsys.readouterr().out == "runs/distill/student  (step 3)\n"
    assert main([*RUN, "--steps", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": 5, "finished": True, "student": "runs/distill/student"}
    logged = [json.loads(line)["step"] for line in Path("runs/distill/log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 5]
    config = json.loads(Path("runs/distill/config.json").read_text())
    assert (config["attention"]["radius"], config["model"], config["save_every"]) == (2.0, "tiny-flux", 2)


def test_samples_that_are_made_first_are_told_before_the_steps(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    numbers = {"loss": 0.5, "samples_per_second": 2.0, "memory_mib": 100.0}
    with TrainBar() as bar:
        bar._bar.mininterval = 0
        for done in (1, 2, 2):
            bar.sampled(done, 2)
        bar(TrainEvent(4, 10, numbers, 3.0))
        told = sys.stderr.getvalue()
    assert "| 1/2 [" in told and "making samples" in told
    assert "| 4/10 [" in told.rpartition("\r")[2]
    command = [*RUN[:4], "--data", "prompts.txt", *RUN[6:]]
    assert main([*command, "--steps", "1", "--set", "validation_steps=1"]) == 0


def test_the_student_makes_pictures_from_the_command_line(capsys):
    assert main([*DATA]) == 0
    assert main([*RUN, "--steps", "3", "--lr", "0.05"]) == 0
    draw = ["image", "a cat", "--model", "tiny-flux", "--steps", "2", "--seed", "5", "--width", "32", "--height", "32"]
    student = ["--linear", "runs/distill/student"]
    assert main([*draw, "--out", "stock.png"]) == 0
    assert main([*draw, *student, "--out", "student.png"]) == 0
    assert main(["image", "--recipe", "student.png", "--out", "again.png"]) == 0
    stock, ours, again = (Path(f"{name}.png.json") for name in ("stock", "student", "again"))
    assert json.loads(ours.read_text())["linear"] == "runs/distill/student"
    assert json.loads(again.read_text())["linear"] == "runs/distill/student"
    pixels = [Image.open(path.with_suffix("")).tobytes() for path in (stock, ours, again)]
    assert pixels[1] == pixels[2] != pixels[0]
    capsys.readouterr()
    assert main([*draw, *student, "--attention", "clear", "radius=2"]) == 2
    assert "brings its own attention, got 'clear' besides" in capsys.readouterr().err
    assert main([*draw, "--linear", "nothing"]) == 2
    assert "--linear nothing is not there" in capsys.readouterr().err


@pytest.mark.parametrize("own", [True, False], ids=["prompts", "captions and reader"])
def test_a_student_is_compared_with_its_teacher(own, capsys):
    from reattend.attn_processors import ClearAttnProcessor
    from reattend.distill import save_linear

    save_linear("student", tiny.flux_pipeline().transformer, ClearAttnProcessor(radius=2), {})
    argv = [
        "distill",
        "evaluate",
        "student",
        "--model",
        "tiny-flux",
        "--size",
        "32x32",
        "--steps",
        "2",
        "--text-length",
        "32",
    ]
    argv += ["--prompts", "prompts.txt"] if own else ["--samples", "2"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 2 and found["latent_error"]["mean"] > 0
    assert (found["scores"] is None) == own
    assert 0 < found["student_flops"]["attention"] < found["student_flops"]["model"]
    assert main([*argv[:2], "nothing", *argv[3:]]) == 2
    assert "there is no student at nothing" in capsys.readouterr().err


def test_ranks_wait_for_the_samples_of_the_others_for_longer_than_the_usual_minutes(monkeypatch):
    import torch.distributed as dist

    class Joined(Exception):
        pass

    def group(*args, **kwargs):
        raise Joined(kwargs["timeout"])

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", group)
    with pytest.raises(Joined) as asked:
        main(DATA)
    assert asked.value.args[0].total_seconds() >= 86_400


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([*DATA, "--pictures", "x"], "give either --prompts FILE or --pictures FOLDER"),
        ([*DATA, "--size", "32"], "--size cannot read '32'"),
        ([*DATA, "--size", "36x32"], "width does not work: got 36 pixels"),
        ([*RUN, "--steps", "0"], "steps is out of range: got 0"),
        ([*RUN, "--set", "speed=3"], "the command has an entry 'speed', which is none of model, data"),
        ([*RUN, "--set", "ema"], "--set cannot read 'ema'"),
        (["distill", "run"], "the command tells no 'model'; give one"),
        (["distill", "run", "nothing.toml"], "cannot read nothing.toml"),
        ([*RUN, "--set", "radius_steps=no"], r"DistillConfig(radius_steps=...) wants int, got"),
        (RUN, "there is nothing at runs/samples; make samples with: reattend distill data"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_2(argv, sentence, capsys):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_memory_is_told_before_anything_is_loaded(capsys, flux_folder):
    argv = [
        "distill",
        "plan",
        "--model",
        str(flux_folder),
        "--size",
        "64x64",
        "--text-length",
        "16",
        "--set",
        "micro_batch=1",
    ]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = ("state_bytes", "average_bytes", "activation_bytes", "copy_bytes")
    assert found["total_bytes"] == sum(found[part] for part in parts)
    assert main(argv) == 0
    assert "weights, gradients and optimiser: 0." in capsys.readouterr().out
    assert main(["distill", "plan", "--model", "someone/else"]) == 2
    assert "the architecture of 'someone/else' is not here" in capsys.readouterr().err
