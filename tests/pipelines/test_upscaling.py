from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from reattend.attn_processors.context import context_of
from reattend.pipelines import Cancelled, CancelToken, Recipe, Upscale, generate, upscale

RECIPE = Recipe(prompt="a blue car on sand", width=24, height=16, steps=4, guidance=4.0, seed=5)
AGENT = ({"name": "agent", "ratio": 0.4},)
CLEAR = ({"name": "clear", "radius": 2},)
FAMILIES = {
    "sd": tiny.sd,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3_pipeline,
    "flux": tiny.flux_pipeline,
}


def pixels(image):
    return np.asarray(image)


def grown(recipe=RECIPE, **settings):
    return replace(recipe, upscale=Upscale(**settings))


def state(pipe):
    """What upscaling touches while it runs."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    attentions = [module for module in model.modules() if hasattr(module, "processor")]
    return {
        "processors": [id(module.processor) for module in attentions],
        "theta": getattr(getattr(model, "pos_embed", None), "theta", None),
        "scheduler": id(pipe.scheduler),
        "scheduler settings": dict(pipe.scheduler.config),
        "shift": getattr(pipe.scheduler, "shift", None),
        "tiling": pipe.vae.use_tiling,
        "parts": {name: id(part) for name, part in pipe.components.items()},
    }


@pytest.fixture(params=FAMILIES)
def family(request):
    return tiny.fresh(FAMILIES[request.param]())


def test_every_family_grows_a_picture_and_its_recipe_repeats_it(family, tmp_path):
    before = state(family)
    picture = upscale(grown(replace(RECIPE, seed=None), scale=1.6), pipe=family)
    assert [image.size for image in (*picture.smaller, picture.image)] == [(24, 16), (40, 24)]
    base = generate(replace(picture.recipe, upscale=None), pipe=family)
    assert np.array_equal(pixels(picture.smaller[0]), pixels(base.image))
    png, _ = picture.recipe.save(picture.image, tmp_path / "car.png")
    again = upscale(Recipe.read(png), pipe=tiny.fresh(family))
    assert np.array_equal(pixels(again.image), pixels(picture.image))
    assert again.recipe == picture.recipe
    assert state(family) == before
    assert picture.recipe.made_with["pipeline"] == type(family).__name__


@pytest.mark.parametrize("attention", [None, ({"name": "agent", "ratio": 0.4},)], ids=["stock", "agent"])
def test_every_size_is_saved_with_the_recipe_that_makes_it(sd, tmp_path, attention):
    picture = upscale(grown(scale=3, attention=attention), pipe=sd)
    saved = picture.save(tmp_path / "car.png")
    names = ["car-24x16.png", "car-40x24.png", "car.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, *(name + ".json" for name in names)])
    for (png, sidecar), name, image in zip(saved, names, (*picture.smaller, picture.image), strict=True):
        assert (png.name, sidecar.name) == (name, name + ".json")
        recipe = Recipe.read(png)
        again = (upscale if recipe.upscale else generate)(recipe, pipe=sd)
        assert np.array_equal(pixels(again.image), pixels(image))


def test_a_source_file_is_not_written_again(sd, tmp_path):
    Image.new("RGB", (24, 16), "red").save(tmp_path / "red.png")
    source = str(tmp_path / "red.png")
    picture = upscale(replace(grown(scale=1.6, source=source), width=None, height=None), pipe=sd)
    assert len(picture.smaller) == 1
    assert [png.name for png, _ in picture.save(tmp_path / "large.png")] == ["large.png"]


def test_a_later_stage_is_the_stock_image_to_image_call_bit_for_bit(sd):
    from diffusers import StableDiffusionImg2ImgPipeline

    picture = upscale(grown(strength=0.5), pipe=sd)
    seed = int(np.random.SeedSequence((5, 1)).generate_state(1, np.uint64)[0])
    stock = StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False)(
        RECIPE.prompt,
        picture.smaller[0].resize((48, 32), Image.Resampling.LANCZOS),
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(seed),
    )
    assert np.array_equal(pixels(picture.image), pixels(stock.images[0]))


def test_stages_grow_one_from_another_and_tell_their_steps(sd):
    events = []
    picture = upscale(grown(scale=4, strength=0.5, steps=2), pipe=sd, on_step=events.append)
    assert [image.size for image in (*picture.smaller, picture.image)] == [(24, 16), (48, 32), (96, 64)]
    assert [(event.stage, event.step) for event in events] == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 5), (2, 6)]
    assert {(event.steps, event.stages, event.clips) for event in events} == {(6, 3, 1)}
    assert [tuple(event.latents.shape[-2:]) for event in events[3:]] == [(8, 12), (16, 24), (32, 48)]
    assert all(a.seconds < b.seconds for a, b in itertools.pairwise(events))
    assert all(event.eta > 0 for event in events[:5])
    assert events[-1].eta == 0


def test_without_settings_a_picture_becomes_twice_as_large_and_a_bare_size_is_the_models_own(sd):
    picture = upscale(replace(RECIPE, steps=2, width=None, height=None), pipe=sd)
    assert picture.image.size == (64, 64)
    assert (picture.recipe.width, picture.recipe.height) == (32, 32)
    assert picture.recipe.upscale == Upscale(scale=2)


def test_settings_change_the_picture(sd3):
    pictures = [
        upscale(grown(**settings), pipe=sd3).image
        for settings in ({}, {"strength": 0.5}, {"steps": 6}, {"shift": 8.0}, {"tile_from": 40})
    ]
    distinct = {image.tobytes() for image in pictures}
    assert len(distinct) == len(pictures)


def test_the_rotary_base_grows_with_the_size_of_training(flux, monkeypatch):
    """The tiny Flux says that it was trained on 32 x 32 pixels."""
    seen = record_theta(flux, monkeypatch)
    upscale(grown(replace(RECIPE, height=24), sizes=((48, 48), (64, 64))), pipe=flux)
    assert seen == [10_000, 10_000, 100_000]
    seen.clear()
    upscale(grown(scale=2, rope_theta_scale=2), pipe=flux)
    assert seen == [10_000, 20_000]


def record_theta(flux, monkeypatch):
    """The rotary bases that the denoiser works with, one after another."""
    seen = []
    forward = flux.transformer.pos_embed.forward

    def recorded(ids):
        theta = flux.transformer.pos_embed.theta
        if seen[-1:] != [theta] or recorded.tokens != len(ids):
            seen.append(theta)
        recorded.tokens = len(ids)
        return forward(ids)

    recorded.tokens = None
    monkeypatch.setattr(flux.transformer.pos_embed, "forward", recorded)
    return seen


def test_a_shift_is_used_also_where_the_model_shifts_by_size(flux):
    pictures = {
        upscale(grown(replace(RECIPE, steps=3), shift=shift), pipe=flux).image.tobytes() for shift in (None, 1.0, 6.0)
    }
    assert len(pictures) == 3


class Broken(Exception):
    pass


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
@pytest.mark.parametrize("how", ["error", "stop"])
def test_theta_shift_tiling_and_attention_come_back_after_an_error_and_a_stop(name, how):
    pipe = tiny.fresh(FAMILIES[name]())
    before, token, during = state(pipe), CancelToken(), []
    settings = {"tile_from": 40, "attention": AGENT if name == "sd" else CLEAR}
    if name != "sd":
        settings["shift"] = 9.0
    if name == "flux":
        settings["rope_theta_scale"] = 3.0

    def end(event):
        if event.stage == 1:
            during.append(state(pipe))
            if how == "error":
                raise Broken
            token.request()

    with pytest.raises(Broken if how == "error" else Cancelled):
        upscale(grown(**settings), pipe=pipe, on_step=end, cancel=token)
    assert len(during) == 1
    assert during[0]["tiling"]
    assert during[0]["theta"] != before["theta"] or name != "flux"
    assert during[0]["processors"] != before["processors"]
    assert state(pipe) == before
    assert np.array_equal(pixels(generate(RECIPE, pipe=pipe).image), fresh_picture(name))


def fresh_picture(name):
    return pixels(generate(RECIPE, pipe=tiny.fresh(FAMILIES[name]())).image)


def test_tiling_that_the_user_chose_stays(sd):
    sd.vae.enable_tiling()
    try:
        upscale(grown(tile_from=8), pipe=sd)
        assert sd.vae.use_tiling
    finally:
        sd.vae.disable_tiling()  # the VAE is shared between tests


def test_attention_of_later_stages_is_the_recipes_own_or_another(sd):
    def stages_with_attention(recipe):
        seen = {}
        upscale(recipe, pipe=sd, on_step=lambda event: seen.update({event.stage: context_of(sd.unet) is not None}))
        return list(seen.values())

    recipe = replace(RECIPE, steps=2)
    assert stages_with_attention(grown(recipe)) == [False, False]
    assert stages_with_attention(grown(recipe, attention=AGENT)) == [False, True]
    assert stages_with_attention(grown(replace(recipe, attention=AGENT))) == [True, True]
    assert stages_with_attention(grown(replace(recipe, attention=AGENT), attention=())) == [True, False]


def test_a_stop_between_stages_ends_there(sd):
    token, seen = CancelToken(), []

    def stop_after_the_first_picture(*args, **settings):
        token.request()
        return postprocess(*args, **settings)

    postprocess = sd.image_processor.postprocess
    sd.image_processor.postprocess = stop_after_the_first_picture
    with pytest.raises(Cancelled):
        upscale(grown(), pipe=sd, on_step=lambda event: seen.append(event.stage), cancel=token)
    assert seen == [0] * 4


def test_a_stop_before_the_start_does_no_work():
    token = CancelToken()
    token.request()
    with pytest.raises(Cancelled):
        upscale(replace(RECIPE, model="no such model"), cancel=token)


def test_a_picture_of_ones_own_can_be_the_start(sd, tmp_path):
    draw = np.random.default_rng(0)
    source = tmp_path / "photo.png"
    Image.fromarray(draw.integers(0, 256, (21, 33, 4), np.uint8), "RGBA").save(source)
    recipe = grown(replace(RECIPE, width=None, height=None), scale=2, source=str(source))
    events = []
    picture = upscale(recipe, pipe=sd, on_step=events.append)
    assert [image.size for image in (*picture.smaller, picture.image)] == [(33, 21), (64, 40)]
    assert [(event.step, event.steps, event.stage, event.stages) for event in events] == [(1, 2, 0, 1), (2, 2, 0, 1)]
    again = upscale(Recipe.from_json(picture.recipe.to_json()), pipe=sd)
    assert np.array_equal(pixels(picture.image), pixels(again.image))
    source.write_text("no picture")
    for path in (source, tmp_path / "missing.png", tmp_path):
        with pytest.raises(ValueError, match=f"cannot read the picture {path}: .*; give a PNG"):
            upscale(replace(recipe, upscale=Upscale(source=str(path))), pipe=sd)
    with pytest.raises(ValueError, match="width and height are those of the source"):
        upscale(grown(source=str(source)), pipe=sd)


REFUSED = {
    "steps": (grown(strength=0.2), "strength leaves no step to do: got 0.2 of 4 steps.* at least 0.25"),
    "shift": (grown(shift=3), "DDIMScheduler has no noise shift, got shift 3; leave it out"),
    "theta": (grown(rope_theta_scale=10), "StableDiffusionImg2ImgPipeline has no rotary embedding"),
    "size": (grown(scale=1.05), "does not enlarge the picture"),
    "attention": (grown(attention=(*AGENT, *AGENT)), "wanted by both|twice"),
    "dtype": (grown(replace(RECIPE, dtype="float16")), "computes in float16, this pipeline in float32"),
    "prompt": (grown(replace(RECIPE, prompt="a " * 80)), "prompt is too long"),
}


@pytest.mark.parametrize(("recipe", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_the_first_step(sd, recipe, words):
    steps = []
    with pytest.raises(ValueError, match=words):
        upscale(recipe, pipe=sd, on_step=steps.append)
    assert steps == []


def test_a_family_without_image_to_image_is_refused(sd, monkeypatch):
    class Other(type(sd)):
        pass

    with contextlib.suppress(TypeError):
        sd.__class__ = Other
    with pytest.raises(ValueError, match="no image-to-image class with a strength for Other; upscale works with"):
        upscale(grown(), pipe=sd)


def test_generate_does_not_enlarge(sd):
    with pytest.raises(ValueError, match="enlarges its picture, which generate does not do; call upscale"):
        generate(grown(), pipe=sd)
