"""The reader judges every size of enlarged pictures, in pairs, and a run can go on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from reattend.emoji_world import judge_upscale
from reattend.emoji_world.judge_upscale import judge, main, size_names
from reattend.emoji_world.world import draw, is_held_out, sample_captions, sample_scene
from reattend.pipelines import Recipe, Upscale, upscale
from reattend.pipelines.picture import Picture


def scenes() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    drawn = [sample_scene(rng) for _ in range(200)]
    return {scene.caption: scene for scene in drawn if is_held_out(scene.caption)}


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """`upscale` paints the caption's scene at 1x and 2x, and at 4x a grey picture; the recipes it was called with."""
    known, called = scenes(), []

    def paint(recipe: Recipe, *, pipe: Any) -> Picture:
        called.append(recipe)
        small, middle = (draw(known[recipe.prompt], side, side) for side in (128, 256))
        return Picture(image=Image.new("RGB", (512, 512), "grey"), recipe=recipe, smaller=(small, middle))

    monkeypatch.setattr(judge_upscale, "upscale", paint)
    return called


def test_every_size_is_read_against_its_caption(painted, tmp_path):
    seen: list[tuple[int, int]] = []
    attention = [{"name": "clear", "radius": "6"}]
    found = judge(
        tiny.sd(), out=tmp_path, scenes=3, attention=attention, on_progress=lambda done, of: seen.append((done, of))
    )
    assert list(found.rates) == ["1x", "2x", "4x"]
    assert all(rate.value == 1 for name in ("1x", "2x") for rate in found.rates[name].values())
    assert found.rates["4x"]["kinds (pictures)"].right == 0
    assert found.differences["2x"]["kinds (sprites)"].value == 0
    assert found.differences["4x"]["kinds (sprites)"].value == -1
    assert [recipe.prompt for recipe in painted] == sample_captions(np.random.default_rng(0), 3)
    assert [recipe.seed for recipe in painted] == [0, 1, 2]
    assert painted[0].upscale.attention[0]["radius"] == 6.0
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert Image.open(tmp_path / "contact.png").size == (3 * 260, 3 * 260)
    assert json.loads((tmp_path / "summary.json").read_text())["rates"]["2x"]["background"]["asked"] == 3


def test_a_stopped_run_goes_on_and_other_settings_are_refused(painted, tmp_path):
    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(tiny.sd(), out=tmp_path / "a", scenes=2, on_progress=stop)
    resumed = judge(tiny.sd(), out=tmp_path / "a", scenes=2)
    assert len(painted) == 2
    assert resumed == judge(tiny.sd(), out=tmp_path / "b", scenes=2)
    with pytest.raises(ValueError, match=r"other settings \(strength differ"):
        judge(tiny.sd(), out=tmp_path / "a", scenes=2, strength=0.5)


def test_a_real_pipeline_is_judged_at_the_sizes_upscale_makes(tmp_path: Path) -> None:
    pipe = tiny.fresh(tiny.sd())
    found = judge(pipe, out=tmp_path, scenes=1, scale=2, steps=2, strength=0.5, seed=3)
    shown = {path.stem: Image.open(path) for path in (tmp_path / "pictures").iterdir()}
    assert {name: picture.size for name, picture in shown.items()} == {"1x-000": (32, 32), "2x-000": (64, 64)}
    caption = sample_captions(np.random.default_rng(3), 1)[0]
    recipe = Recipe(prompt=caption, steps=2, seed=3, upscale=Upscale(scale=2, strength=0.5, attention=()))
    again = upscale(recipe, pipe=pipe)
    for name, picture in zip(("1x", "2x"), (*again.smaller, again.image), strict=True):
        assert np.array_equal(np.asarray(shown[f"{name}-000"]), np.asarray(picture))
    assert found.about["pipeline"] == "StableDiffusionPipeline"


@pytest.mark.parametrize(("scale", "names"), [(2, ["1x", "2x"]), (3, ["1x", "1.73x", "3x"]), (1.5, ["1x", "1.5x"])])
def test_sizes_are_named_by_how_much_larger_they_are(scale, names):
    assert size_names(Upscale(scale=scale)) == names


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"scenes": 0}, "scenes is 0"),
        ({"scale": 1}, "scale does not enlarge"),
        ({"attention": ("magic",)}, "unknown attention"),
        ({"attention": ("clear", "radius")}, "key=value"),
        ({"model": "nothing"}, "no model 'nothing'"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_and_exit_code_2(painted, tmp_path, capsys, more, words):
    with pytest.raises(SystemExit) as stopped:
        main(**{"out": tmp_path / "out", **more})
    assert stopped.value.code == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if words in line]) == 1
    assert not painted and not list(tmp_path.iterdir())
