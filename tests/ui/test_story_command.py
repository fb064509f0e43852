"""`reattend story`: from a JSON file to a folder, and one panel of it again."""

from __future__ import annotations

import importlib
import io
import json

import pytest
from PIL import Image

from reattend.ui.cli import main
from reattend.ui.finding import find_emoji, finder

STORY = {
    "model": "tiny-sd",
    "steps": 2,
    "seed": 3,
    "width": 32,
    "height": 32,
    "subjects": {"Tom": {"phrase": "cat", "prompt": "a blue cat", "place": [0, 0, 1, 1]}},
    "panels": [
        {"prompt": "a cat here", "places": {"Tom": [0, 0, 0.5, 1]}},
        {"prompt": "a cat there", "places": {"Tom": [0.5, 0, 1, 1]}},
    ],
}


@pytest.fixture(autouse=True)
def tiny_model(sd_folder, monkeypatch):
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", sd_folder.parent)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tale.json"
    path.write_text(json.dumps(STORY))
    return path


def test_a_story_becomes_a_folder_and_one_panel_is_made_again(file, tmp_path, capsys):
    out = tmp_path / "made"
    assert main(["story", str(file), "--out", str(out)]) == 0
    assert str(out / "strip.png") in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"panel-1.png", "panel-1-places.png", "panel-2.png", "reference-1.png", "story.json", "strip.png"} <= set(
        before
    )
    assert main(["story", str(out / "story.json"), "--panel", "2", "--seed", "9", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == str(out) and told["story"]["panels"][1]["seed"] == 9
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"panel-2.png", "panel-2-places.png", "strip.png", "story.json", "reference-1.png"}
    assert pixels(after["reference-1.png"]) == pixels(before["reference-1.png"])  # only the story inside is another


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).tobytes()


def test_panels_of_another_story_are_not_mixed(file, tmp_path, capsys):
    out = tmp_path / "made"
    assert main(["story", str(file), "--out", str(out), "--panel", "1"]) == 0
    capsys.readouterr()
    assert main(["story", str(file), "--out", str(out), "--panel", "2", "--steps", "3"]) == 2
    assert "holds the panels of another story or other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--panel", "3"], "--panel is out of range: got 3"),
        (["--prompt", "a dog"], "say which with --panel"),
        (["--bank", "much"], "--bank cannot read 'much'"),
        (["--attention", "fast"], "unknown attention"),
        (["--strength", "2"], "strength is out of range"),
        (["--bank", "1KB"], "at least, 1,000 are allowed"),
    ],
)
def test_bad_options_are_one_sentence(file, tmp_path, capsys, options, words):
    code = main(["story", str(file), "--out", str(tmp_path / "made"), *options])
    said = capsys.readouterr().err
    assert code == (1 if "1KB" in options else 2)
    assert words in said and "Traceback" not in said and said.count("\n") == 1


def test_a_file_that_is_no_story_is_one_sentence(tmp_path, capsys):
    assert main(["story", str(tmp_path / "none.json")]) == 2
    assert "cannot read the story" in capsys.readouterr().err


def test_a_new_seed_of_the_story_gives_all_panels_new_ones(file, tmp_path):
    out = tmp_path / "made"
    main(["story", str(file), "--out", str(out)])
    seeds = [panel["seed"] for panel in json.loads((out / "story.json").read_text())["panels"]]
    main(["story", str(out / "story.json"), "--seed", "4", "--out", str(tmp_path / "other")])
    others = [panel["seed"] for panel in json.loads((tmp_path / "other" / "story.json").read_text())["panels"]]
    assert not set(seeds) & set(others)


@pytest.mark.parametrize("options", [["--seed", "4"], ["--steps", "1"], ["--guidance", "4"]])
def test_options_that_change_the_rehearsal_ask_again_who_is_where(tmp_path, monkeypatch, options):
    asked = []

    def find(picture, phrases):
        asked.append(phrases)
        return [(0, 0, 0.5, 1)] * len(phrases)

    monkeypatch.setattr("reattend.ui.finding.finder", lambda model: find)
    bare = {"subjects": {"Tom": {"phrase": "cat", "prompt": "a blue cat"}}, "panels": [{"prompt": "a cat here"}]}
    (tmp_path / "bare.json").write_text(json.dumps(STORY | bare))
    out = tmp_path / "made"
    assert main(["story", str(tmp_path / "bare.json"), "--out", str(out)]) == 0
    assert asked == [["cat"], ["cat"]]  # the reference, then the panel
    assert main(["story", str(out / "story.json"), "--panel", "1", "--steps", "2"]) == 0  # as it was
    assert len(asked) == 2
    assert main(["story", str(out / "story.json"), "--out", str(tmp_path / "other"), *options]) == 0
    assert len(asked) == 4


def test_characters_of_the_bundled_models_are_found_by_the_reader():
    from reattend.emoji_world.world import Scene, Sprite, draw

    scene = Scene("sand", (Sprite("cat", "red", 0.25, 0.5, 0.4), Sprite("cat", "blue", 0.75, 0.5, 0.4)))
    left, right, none = find_emoji(draw(scene), ["cat", "a cat", "dog"])
    assert left[2] < 0.55 < right[2] and none is None
    assert finder("tiny-sd") is find_emoji and finder("some/other") is None
