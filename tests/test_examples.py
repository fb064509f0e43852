from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from reattend.pipelines import Recipe, Video
from reattend.pipelines.film import frame_count

EXAMPLES = Path(__file__).parents[1] / "examples"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def tiny_model(sd_folder, monkeypatch):
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", sd_folder.parent)


def test_image_makes_a_stock_and_an_agent_picture(tmp_path, capsys, monkeypatch):
    script("image", monkeypatch).main(["a cat", "--steps", "2", "--out", str(tmp_path)])
    stock, agent = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("stock", "agent"))
    assert stock.shape == agent.shape
    assert not np.array_equal(stock, agent)
    assert Recipe.read(tmp_path / "agent.png").attention[0]["name"] == "agent"
    assert capsys.readouterr().out.split() == [str(tmp_path / "stock.png"), str(tmp_path / "agent.png")]


def test_demo_makes_pictures_a_table_a_story_and_a_film(animatediff_folder, tmp_path, capsys, monkeypatch):
    demo = script("demo", monkeypatch)
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    tale = json.loads(demo.STORY.read_text())
    tale["panels"] = [tale["panels"][0] | {"places": {"Flora": [0, 0, 0.5, 1], "Hill": [0.5, 0, 1, 1]}}]
    (tmp_path / "tale.json").write_text(json.dumps(tale))
    monkeypatch.setattr(demo, "STORY", tmp_path / "tale.json")
    film = replace(demo.FILM, model=str(animatediff_folder), video=Video(frames=17))
    monkeypatch.setattr(demo, "FILM", film)
    out = tmp_path / "demo"
    demo.main(["--steps", "2", "--out", str(out)])
    pictures = {f"1-{arm}.png" for arm in demo.ARMS}
    recipes = {f"{name}.json" for name in pictures}
    tables, film_files = {"sheet.png", "table.md", "table.json"}, {"film.mp4", "film.mp4.json", "film.png"}
    assert {path.name for path in out.iterdir()} == pictures | recipes | tables | film_files | {"story"}
    assert Image.open(out / "story" / "strip.png").size == Image.open(out / "story" / "panel-1.png").size
    assert frame_count(out / "film.mp4") == 17 and Image.open(out / "film.png").width > 64
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert [row["attention"] for row in rows] == ["stock", "agent", "clear"]
    for row in rows:
        assert row["seconds"] > 0
        assert all(0 <= row[part] <= 1 for part in ("kinds", "tints", "background"))
    assert (out / "table.md").read_text().strip() in capsys.readouterr().out
    assert Image.open(out / "sheet.png").height > 2 * demo.SIDE


def test_the_picture_of_the_patterns_in_the_readme_is_what_the_operators_say(tmp_path, monkeypatch):
    script("patterns", monkeypatch).main(tmp_path / "patterns.png")
    made, kept = (
        np.asarray(Image.open(path)) for path in (tmp_path / "patterns.png", EXAMPLES / "pictures" / "patterns.png")
    )
    below = 26 + 44  # the titles depend on the font
    np.testing.assert_array_equal(made[below:], kept[below:])
