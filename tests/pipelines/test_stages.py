from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from reattend.pipelines import Recipe, Upscale
from reattend.pipelines.stages import fitting, stage_sizes

FULL = Upscale(
    sizes=((64, 48), (128, 96)),
    strength=0.5,
    steps=9,
    attention=({"name": "agent", "ratio": 0.4},),
    shift=3.0,
    rope_theta_scale=4.0,
    tile_from=100,
    source="car.png",
)


@pytest.mark.parametrize(
    ("scale", "start", "multiple", "sizes"),
    [
        (2, (512, 512), 8, [(1024, 1024)]),
        (4, (512, 768), 8, [(1024, 1536), (2048, 3072)]),
        (3, (512, 512), 8, [(888, 888), (1536, 1536)]),  # 512 sqrt(3) = 886.8
        (1.5, (100, 66), 16, [(144, 96)]),  # 150 and 99 to the nearest 16
        (16, (64, 64), 8, [(128, 128), (256, 256), (512, 512), (1024, 1024)]),
        (8, (1024, 40), 8, [(2048, 80), (4096, 160), (8192, 320)]),
    ],
)
def test_a_scale_is_reached_in_stages_of_at_most_two(scale, start, multiple, sizes):
    assert stage_sizes(Upscale(scale=scale), start, multiple) == sizes


def test_sizes_are_rounded_to_what_the_model_can_make():
    assert stage_sizes(Upscale(sizes=[[63, 45], [130, 95]]), (32, 24), 8) == [(64, 48), (128, 96)]
    assert stage_sizes(Upscale(sizes=((63, 45),)), (32, 24), 16) == [(64, 48)]
    assert fitting((1000, 520), 16) == (992, 512)


def test_more_than_four_times_in_one_stage_warns():
    with pytest.warns(UserWarning, match="enlarges the picture 5.0 times .32x32 to 160x160 pixels.; more than 4"):
        stage_sizes(Upscale(sizes=((160, 160),)), (32, 32), 8)


@pytest.mark.parametrize(
    ("growth", "start", "words"),
    [
        (Upscale(scale=1.1), (32, 32), "does not enlarge the picture: got 32x32 after 32x32"),
        (Upscale(sizes=((64, 64), (64, 64))), (32, 32), "got 64x64 after 64x64 pixels; choose a larger"),
        (Upscale(sizes=((16, 16),)), (32, 32), "got 16x16 after 32x32"),
        (Upscale(sizes=((256, 512),)), (256, 256), "would stretch .* 256x512 for one of 256x256 .* example 256x256"),
        (Upscale(scale=16), (1024, 1024), "too large: got 16384x16384 pixels, at most 8192"),
    ],
)
def test_sizes_that_do_not_work_are_refused_in_one_sentence(growth, start, words):
    with pytest.raises(ValueError, match=words):
        stage_sizes(growth, start, 8)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"scale": 2, "sizes": ((64, 64),)}, ValueError, "say the same: got 2 and 64x64; leave one out"),
        ({"scale": 1}, ValueError, "scale does not enlarge: got 1"),
        ({"scale": 17}, ValueError, "scale is out of range: got 17, need 1.0 to 16.0"),
        ({"scale": "2"}, TypeError, "scale must be a number"),
        ({"scale": float("nan")}, ValueError, "scale is out of range: got nan"),
        ({"sizes": 64}, TypeError, "sizes must be a list of .width, height. in pixels, got 64"),
        ({"sizes": (64, 64)}, TypeError, "sizes must be a list"),
        ({"sizes": ((64, 9000),)}, ValueError, "height of a stage is out of range: got 9000"),
        ({"sizes": ((64.5, 64),)}, TypeError, "width of a stage must be a whole number"),
        ({"strength": 0}, ValueError, "strength is out of range: got 0, need more than 0"),
        ({"strength": 1.1}, ValueError, "strength is out of range: got 1.1"),
        ({"steps": 0}, ValueError, "steps of the later stages is out of range"),
        ({"attention": ({"name": "magic"},)}, ValueError, "unknown attention: got 'magic'"),
        ({"shift": 0}, ValueError, "shift is out of range"),
        ({"rope_theta_scale": -1}, ValueError, "rope_theta_scale is out of range"),
        ({"tile_from": 0}, ValueError, "tile_from is out of range"),
        ({"source": 3}, TypeError, "source must be text"),
        ({"wings": 2}, ValueError, "upscale has unknown entries: got wings; known are attention"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_one_sentence(settings, error, words):
    with pytest.raises(error, match=words) as caught:
        Upscale.from_settings(settings)
    assert "\n" not in str(caught.value)


def test_the_default_is_twice_as_large():
    assert Upscale() == Upscale(scale=2)
    assert replace(Upscale(), scale=None, sizes=((64, 64),)).scale is None


def test_a_recipe_carries_the_growth_through_json_and_png(tmp_path):
    recipe = Recipe(prompt="a car", width=32, height=24, seed=1, upscale=FULL)
    assert Recipe.from_json(recipe.to_json()) == recipe
    png, sidecar = recipe.save(Image.new("RGB", (128, 96)), tmp_path / "car.png")
    assert Recipe.read(png) == Recipe.read(sidecar) == recipe
    with Image.open(png) as image:
        assert "Denoising strength: 0.5, Hires resize: 128x96, Hires steps: 9" in image.text["parameters"]
    assert "Hires upscale: 3.0" in replace(recipe, upscale=Upscale(scale=3)).parameters


def test_a_recipe_refuses_what_is_no_growth():
    with pytest.raises(TypeError, match="upscale must be an Upscale, got 2"):
        Recipe(prompt="a car", upscale=2)
    for entry, words in ((2, "must be an object"), ({"wings": 2}, "unknown entries: got wings")):
        values = json.loads(Recipe(prompt="a car").to_json()) | {"upscale": entry}
        with pytest.raises((TypeError, ValueError), match=words):
            Recipe.from_json(json.dumps(values))


def test_recipes_written_before_still_read():
    old = json.loads(Recipe(prompt="a car").to_json())
    del old["upscale"]
    assert Recipe.from_json(json.dumps(old)).upscale is None
