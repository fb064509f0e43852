from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from reattend.pipelines import Recipe
from reattend.ui.cli import main

QUICK = ["--steps", "2", "--seed", "5", "--width", "24", "--height", "40"]


@pytest.fixture(autouse=True)
def world(sd_folder, tmp_path, monkeypatch):
    """The tiny random pipeline in place of the bundled model, and an empty folder to work in."""
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", sd_folder.parent)
    monkeypatch.chdir(tmp_path)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_image_writes_a_png_with_its_recipe_inside_and_beside_it(tmp_path, capsys):
    assert main(["image", "a blue car", *QUICK, "--negative", "rain", "--attention", "agent", "ratio=0.4"]) == 0
    assert files(tmp_path) == ["out", "out/a-blue-car-5.png", "out/a-blue-car-5.png.json"]
    recipe = Recipe.read("out/a-blue-car-5.png")
    assert recipe == Recipe.read("out/a-blue-car-5.png.json")
    assert (recipe.prompt, recipe.negative, recipe.steps, recipe.seed, recipe.model) == (
        "a blue car",
        "rain",
        2,
        5,
        "tiny-sd",
    )
    assert (recipe.width, recipe.height) == Image.open("out/a-blue-car-5.png").size == (24, 40)
    assert recipe.attention[0]["name"] == "agent"
    assert recipe.attention[0]["ratio"] == 0.4
    out, _ = capsys.readouterr()
    assert out.startswith("out/a-blue-car-5.png  (seed 5, ")


def test_image_makes_the_picture_of_a_recipe_again_and_options_change_it(tmp_path, capsys):
    assert main(["image", "a cat", *QUICK, "--attention", "agent", "ratio=0.4", "--out", "first.png"]) == 0
    assert main(["image", "--recipe", "first.png", "--out", "again.png"]) == 0
    assert main(["image", "a dog", "--recipe", "again.png.json", "--seed", "6", "--out", "other.png"]) == 0
    first, again, other = (np.asarray(Image.open(f"{name}.png")) for name in ("first", "again", "other"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert Recipe.read("first.png") == Recipe.read("again.png")
    assert (Recipe.read("other.png").prompt, Recipe.read("other.png").seed) == ("a dog", 6)
    assert Recipe.read("other.png").attention == Recipe.read("first.png").attention


def test_json_prints_one_object_and_nothing_else(capsys):
    assert main(["image", "a cat", *QUICK, "--json", "--out", "cat.png"]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert made["image"] == "cat.png"
    assert made["recipe_file"] == "cat.png.json"
    assert made["seconds"] > 0
    assert Recipe.from_json(json.dumps(made["recipe"])) == Recipe.read("cat.png")
    assert err == ""


def test_without_a_seed_one_is_drawn_and_told(capsys):
    assert main(["image", "a cat", "--steps", "1", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["image"] == f"out/a-cat-{made['recipe']['seed']}.png"


BAD = {
    "no prompt": (["image"], "no prompt was given"),
    "empty prompt": (["image", " "], "prompt is empty"),
    "prompt too long": (["image", "a " * 80], "prompt is too long: got 80 tokens, this model reads 75; shorten it"),
    "zero size": (
        ["image", "a cat", "--width", "0"],
        "width does not work: got 0 pixels, need a multiple of 8 from 8 to 8192",
    ),
    "huge size": (["image", "a cat", "--height", "100000000"], "height does not work: got 100000000 pixels"),
    "zero steps": (["image", "a cat", "--steps", "0"], "steps is out of range: got 0, need 1 to 1000"),
    "unknown attention": (
        ["image", "a cat", "--attention", "magic"],
        "unknown attention: got 'magic', there are .*agent",
    ),
    "unknown setting": (["image", "a cat", "--attention", "agent", "speed=3"], "speed"),
    "ratio of one": (["image", "a cat", "--attention", "agent", "ratio=1"], "ratio"),
    "negative ratio": (["image", "a cat", "--attention", "agent", "ratio=-0.1"], "ratio"),
    "wrong type": (["image", "a cat", "--attention", "agent", "ratio=lots"], "ratio"),
    "no pair": (["image", "a cat", "--attention", "agent", "0.4"], "cannot read '0.4': settings are written key=value"),
    "attention twice": (
        ["image", "a cat", "--attention", "agent", "--attention", "agent", "levels=2"],
        "wanted by both",
    ),
    "unknown model": (["image", "a cat", "--model", "nothing"], "no model 'nothing'"),
    "no network": (["image", "a cat", "--model", "nobody/nothing"], "cannot get the model"),
    "unreadable model": (["image", "a cat", "--model", "."], "not a diffusers model"),
    "unknown device": (["image", "a cat", "--device", "toaster"], "device is not available: got 'toaster'"),
    "unknown dtype": (["image", "a cat", "--dtype", "int8"], "dtype is unknown: got 'int8'"),
    "missing recipe": (["image", "--recipe", "nothing.png"], "cannot read the recipe nothing.png"),
    "no png": (["image", "a cat", "--out", "cat.jpg"], "give a name ending in .png, or a folder"),
    "seed below zero": (["image", "a cat", "--seed", "-1"], "seed is out of range"),
}


@pytest.mark.parametrize(("argv", "words"), BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(tmp_path, capsys, argv, words):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("reattend: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert re.search(words, err)
    assert files(tmp_path) == []


def hinder_slicing(pipe):
    pipe.enable_attention_slicing()


def hinder_layers(pipe):
    pipe.unet = tiny.unet(
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type="UNetMidBlock2D"
    )


def hinder_family(pipe):
    pipe.unet = tiny.vae()


@pytest.mark.parametrize(
    ("hinder", "words"),
    [
        (hinder_slicing, "cannot take ours"),
        (hinder_layers, "no layer for 'agent'"),
        (hinder_family, "AutoencoderKL is not supported yet; supported are UNet2DConditionModel"),
    ],
)
def test_a_model_that_cannot_take_the_attention_ends_with_exit_code_2(tmp_path, capsys, monkeypatch, sd, hinder, words):
    hinder(sd)
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "_from_folder", lambda *given: sd)
    assert main(["image", "a cat", *QUICK, "--attention", "agent"]) == 2
    assert words in capsys.readouterr().err
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "content", ["{", '{"prompt": "a cat"}', '{"format": "reattend recipe", "version": 2, "prompt": "a"}']
)
def test_a_broken_or_foreign_recipe_ends_with_exit_code_2(tmp_path, capsys, content):
    (tmp_path / "recipe.json").write_text(content)
    assert main(["image", "--recipe", "recipe.json"]) == 2
    assert "recipe.json: " in capsys.readouterr().err
    assert files(tmp_path) == ["recipe.json"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["image", "a cat", "--steps", "many"], "got 'many', need a whole number"),
        (["image", "a cat", "--guidance", "strong"], "got 'strong', need a number"),
        (["image", "a cat", "--wings"], "--wings"),
        (["fly"], "fly"),
        ([], "image"),
    ],
)
def test_options_that_cannot_be_read_end_with_exit_code_2(tmp_path, capsys, argv, words):
    assert main(argv) == 2
    _out, err = capsys.readouterr()
    assert words in " ".join(err.split())
    assert "Traceback" not in err
    assert files(tmp_path) == []


def stop(*args, **settings):
    raise KeyboardInterrupt


def test_ctrl_c_during_the_steps_leaves_nothing_and_ends_with_130(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusers.DDIMScheduler.step", stop)
    assert main(["image", "a cat", *QUICK]) == 130
    assert capsys.readouterr().err == "reattend: stopped\n"
    assert files(tmp_path) == []


def test_ctrl_c_while_writing_leaves_no_half_file(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.Image.Image.save", stop)
    assert main(["image", "a cat", *QUICK, "--out", "cat.png"]) == 130
    assert files(tmp_path) == []


def test_a_picture_of_nan_ends_with_exit_code_1(tmp_path, capsys, monkeypatch):
    decode = "diffusers.image_processor.VaeImageProcessor.postprocess"
    monkeypatch.setattr(decode, lambda self, image, **settings: np.full((1, 8, 8, 3), np.nan, np.float32))
    assert main(["image", "a cat", *QUICK]) == 1
    assert "not numbers" in capsys.readouterr().err
    assert files(tmp_path) == []


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("diffusers.DDIMScheduler.step", lambda *args, **settings: np.zeros(2) + np.zeros(3))
    with pytest.raises(ValueError, match="broadcast"):
        main(["image", "a cat", *QUICK])


@pytest.mark.parametrize("command", [[], ["image"], ["evaluate"], ["bench"], ["doctor"], ["ui"]])
def test_every_command_has_help(capsys, command):
    assert main([*command, "--help"]) == 0
    assert "usage: reattend" in capsys.readouterr().out


def test_help_shows_the_defaults(capsys):
    main(["image", "--help"])
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for default in ("tiny-sd", "20", "the model's own", "drawn, and told", "stock; repeatable", "out"):
        assert f"(default: {default})" in out


def test_evaluate_compares_arms_and_goes_on_where_it_was(tmp_path, capsys):
    argv = ["evaluate", "--attention", "agent", "ratio=0.4", "--steps", "1", "--batch", "2", "--json", "--samples"]
    assert main([*argv, "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["rates"]) == ["stock", "agent-ratio-0.4"]
    lines = (tmp_path / "out" / "evaluate" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 2 * 1
    assert main([*argv, "2"]) == 0
    more = (tmp_path / "out" / "evaluate" / "results.jsonl").read_text().splitlines()
    assert more[: len(lines)] == lines
    assert len(more) == 1 + 2 * 2
    assert main(["evaluate", "--steps", "2", "--samples", "2"]) == 2
    assert "results of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--samples", "0"], "samples is 0"),
        (["--steps", "0"], "steps is out of range"),
        (["--tomesd", "1"], "--tomesd is out of range: got 1.0"),
        (["--attention", "magic"], "unknown attention: got 'magic'"),
        (["--attention", "agent", "--attention", "agent"], "no name twice"),
        (["--model", "nothing"], "no model 'nothing'"),
    ],
)
def test_evaluate_refuses_bad_input(tmp_path, capsys, options, words):
    assert main(["evaluate", *options]) == 2
    assert words in capsys.readouterr().err
    assert files(tmp_path) == []


def test_bench_hands_its_options_to_the_benchmark(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("reattend.bench.agent.run", lambda **settings: seen.update(settings))
    assert main(["bench", "agent", "--quick", "--minutes", "1.5", "--out", "table.json"]) == 0
    assert seen == {"minutes": 1.5, "quick": True, "json": False, "out": Path("table.json"), "device": None}
    assert main(["bench", "agent", "--device", "toaster"]) == 2
    assert main(["bench", "weather"]) == 2
    assert "toaster" in capsys.readouterr().err


def test_ui_hands_its_options_to_the_page(monkeypatch):
    seen = {}
    monkeypatch.setattr("reattend.ui.page.launch", lambda **settings: seen.update(settings))
    assert main(["ui", "--port", "7000", "--no-browser"]) == 0
    assert seen["host"] == "127.0.0.1"
    assert seen["port"] == 7000
    assert not seen["share"]
    assert not seen["open_browser"]
    assert seen["password"] is None
    assert seen["runs"] == Path("runs")


def test_help_does_not_import_anything_heavy():
    script = (
        "import sys; from reattend.ui.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'gradio', 'numpy'};"
        "print(sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
