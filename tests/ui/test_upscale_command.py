from __future__ import annotations

import importlib
import io
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from reattend.pipelines import Recipe
from reattend.pipelines.events import StepEvent
from reattend.ui.cli import main
from reattend.ui.options import Bar

QUICK = ["--steps", "2", "--seed", "5", "--width", "24", "--height", "16"]


@pytest.fixture(autouse=True)
def world(sd_folder, tmp_path, monkeypatch):
    """The tiny random pipeline in place of the bundled model, and an empty folder to work in."""
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", sd_folder.parent)
    monkeypatch.chdir(tmp_path)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def pixels(name):
    return np.asarray(Image.open(name))


def test_upscale_writes_every_size_with_the_recipe_which_makes_it_again(tmp_path, capsys):
    argv = ["upscale", "a car", *QUICK, "--size", "47x32", "--strength", "0.5", "--later-steps", "4", "--json"]
    assert main([*argv, "--attention", "agent", "ratio=0.4", "--tile-from", "40"]) == 0
    made = json.loads(capsys.readouterr().out)
    names = ["a-car-5-24x16.png", "a-car-5-24x16.png.json", "a-car-5.png", "a-car-5.png.json"]
    assert files(tmp_path) == ["out", *(f"out/{name}" for name in names)]
    assert made["smaller"] == ["out/a-car-5-24x16.png"]
    assert Image.open(made["image"]).size == (48, 32)
    recipe = Recipe.read(made["image"])
    assert recipe == Recipe.from_json(json.dumps(made["recipe"]))
    assert (recipe.width, recipe.height, recipe.steps, recipe.attention) == (24, 16, 2, ())
    growth = recipe.upscale
    assert (growth.scale, growth.sizes, growth.strength, growth.steps) == (None, ((47, 32),), 0.5, 4)
    assert (growth.attention[0]["ratio"], growth.tile_from) == (0.4, 40)
    assert Image.open(made["smaller"][0]).size == (24, 16)
    assert Recipe.read(made["smaller"][0]).upscale is None
    assert main(["image", "--recipe", made["smaller"][0], "--out", "first.png"]) == 0
    assert np.array_equal(pixels("first.png"), pixels(made["smaller"][0]))
    for command in ("upscale", "image"):
        assert main([command, "--recipe", made["image"], "--out", f"{command}.png"]) == 0
        assert np.array_equal(pixels(f"{command}.png"), pixels(made["image"]))


def test_the_recipe_of_a_picture_and_a_picture_file_can_be_enlarged(capsys):
    assert main(["image", "a car", *QUICK, "--attention", "agent", "--out", "car.png"]) == 0
    assert main(["upscale", "--recipe", "car.png", "--scale", "1.5", "--out", "large.png"]) == 0
    large = Recipe.read("large.png")
    assert Image.open("large.png").size == (40, 24)
    assert (large.seed, large.upscale.attention) == (5, None)
    assert large.attention == Recipe.read("car.png").attention
    assert main(["upscale", "--recipe", "car.png", "--source", "car.png", "--out", "other.png"]) == 0
    assert Image.open("other.png").size == (48, 32)
    assert Recipe.read("other.png").upscale.source == "car.png"
    assert Recipe.read("other.png").width is None


BAD = {
    "no prompt": (["upscale"], 'no prompt was given.* reattend upscale "a blue car'),
    "scale and size": (["upscale", "a", "--scale", "2", "--size", "64x64"], "say the same"),
    "scale of one": (["upscale", "a", "--scale", "1"], "scale does not enlarge"),
    "size in words": (["upscale", "a", "--size", "big"], "--size cannot read 'big': write width x height in pixels"),
    "size of nothing": (["upscale", "a", "--size", "0x64"], "width of a stage is out of range: got 0"),
    "too large": (["upscale", "a", "--scale", "16", "--width", "1024"], "too large: got 16384x"),
    "strength": (["upscale", "a", "--strength", "2"], "strength is out of range: got 2"),
    "no step left": (["upscale", "a", "--steps", "1"], "strength leaves no step to do: got 0.7 of 1 steps"),
    "later steps": (["upscale", "a", "--later-steps", "0"], "steps of the later stages is out of range"),
    "attention": (["upscale", "a", "--attention", "magic"], "unknown attention: got 'magic'"),
    "shift": (["upscale", "a", "--shift", "3"], "DDIMScheduler has no noise shift"),
    "theta": (["upscale", "a", "--rope-theta-scale", "3"], "no rotary embedding"),
    "source": (["upscale", "a", "--source", "none.png"], "cannot read the picture none.png: No such file"),
    "source and size": (["upscale", "a", "--source", "none.png", "--width", "64"], "width and height are those of"),
    "number": (["upscale", "a", "--scale", "much"], "got 'much', need a number"),
}


@pytest.mark.parametrize(("argv", "words"), BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(tmp_path, capsys, argv, words):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert re.search(words, " ".join(err.replace("│", " ").split()))
    assert files(tmp_path) == []


def test_help_tells_the_defaults(capsys):
    assert main(["upscale", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for default in ("2", "0.7", "as --steps", "2048", "that of --recipe, or stock; repeatable", "the model's own"):
        assert f"(default: {default})" in out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_tells_the_size_and_the_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Bar() as bar:
        bar._bar.mininterval = 0.0
        bar(StepEvent(3, 9, None, stage=1, stages=3, eta=75.0))
        shown = sys.stderr.getvalue()
    assert "size 2 of 3" in shown
    assert "3/9" in shown
    assert "01:15 left" in shown
