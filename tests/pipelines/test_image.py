from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from reattend.attn_processors import install
from reattend.pipelines import Cancelled, CancelToken, Recipe, generate, load, preview
from reattend.pipelines.filling_in import check_length, chosen_guidance
from reattend.pipelines.load import GUIDANCE

RECIPE = Recipe(prompt="a blue car on sand", width=40, height=24, steps=3, guidance=4.0, seed=5)
AGENT = ({"name": "agent", "ratio": 0.4},)


def pixels(picture):
    return np.asarray(picture.image)


def processors(pipe):
    return {name: id(processor) for name, processor in pipe.unet.attn_processors.items()}


def test_the_picture_is_the_stock_pipelines_own_bit_for_bit(sd):
    generator = torch.Generator().manual_seed(5)
    stock = sd(
        "a blue car on sand", width=40, height=24, num_inference_steps=3, guidance_scale=4.0, generator=generator
    )
    assert np.array_equal(pixels(generate(RECIPE, pipe=sd)), np.asarray(stock.images[0]))


@pytest.mark.parametrize("attention", [(), AGENT], ids=["stock", "agent"])
def test_the_recipe_of_a_picture_makes_the_same_pixels_again(sd, sd_folder, tmp_path, attention):
    first = generate(Recipe(prompt="a red cat", steps=2, attention=attention), pipe=sd)
    assert first.recipe.seed is not None
    assert first.recipe.guidance == 7.5
    assert (first.recipe.width, first.recipe.height) == first.image.size == (32, 32)
    assert first.recipe.dtype == "float32"
    assert set(first.recipe.made_with) == {"reattend", "diffusers", "torch", "device", "pipeline", "scheduler"}
    png, _ = first.recipe.save(first.image, tmp_path / "cat.png")
    again = generate(replace(Recipe.read(png), model=str(sd_folder)))  # from a folder with the same weights
    assert np.array_equal(pixels(first), pixels(again))
    assert again.recipe == replace(first.recipe, model=str(sd_folder))


@pytest.mark.parametrize("name", GUIDANCE)
def test_a_bundled_model_has_its_own_guidance_and_others_that_of_the_stock_call(sd, name):
    pipe = load(name)
    assert (chosen_guidance(pipe, None), chosen_guidance(pipe, 5.0)) == (GUIDANCE[name], 5.0)
    assert GUIDANCE[name] != chosen_guidance(sd, None) == 7.5


def test_a_recipe_without_guidance_makes_a_bundled_models_picture_with_its_own():
    picture = generate(Recipe(prompt="a red cat on sea", steps=1, seed=1), pipe=(pipe := load("tiny-sd")))
    assert picture.recipe.guidance == GUIDANCE["tiny-sd"]
    stock = pipe(
        "a red cat on sea", num_inference_steps=1, guidance_scale=GUIDANCE["tiny-sd"], generator=torch.manual_seed(1)
    )
    assert np.array_equal(pixels(picture), np.asarray(stock.images[0]))


def test_guidance_is_refused_where_the_call_takes_none():
    class Unguided:
        def __call__(self, prompt): ...

    assert chosen_guidance(Unguided(), None) is None
    with pytest.raises(ValueError, match=r"Unguided takes no guidance, got 4\.0; leave it out"):
        chosen_guidance(Unguided(), 4.0)


def test_attention_changes_the_picture_and_is_gone_afterwards(sd):
    before = processors(sd)
    stock = generate(RECIPE, pipe=sd)
    agent = generate(replace(RECIPE, attention=AGENT), pipe=sd)
    assert not np.array_equal(pixels(stock), pixels(agent))
    assert processors(sd) == before
    assert np.array_equal(pixels(stock), pixels(generate(RECIPE, pipe=sd)))


def test_an_empty_seed_is_drawn_anew_each_time(sd):
    recipe = replace(RECIPE, seed=None, steps=1)
    assert generate(recipe, pipe=sd).recipe.seed != generate(recipe, pipe=sd).recipe.seed


def test_every_step_is_told_with_the_time_left(sd):
    events = []
    generate(RECIPE, pipe=sd, on_step=events.append)
    assert [(event.step, event.steps, event.clip, event.clips) for event in events] == [
        (1, 3, 0, 1),
        (2, 3, 0, 1),
        (3, 3, 0, 1),
    ]
    assert events[0].latents.shape == (1, 4, 12, 20)
    assert events[0].eta > 0
    assert events[-1].eta == 0
    assert events[0].seconds < events[1].seconds < events[2].seconds


def test_stopping_takes_effect_at_that_step_and_leaves_the_pipeline_as_it_was(sd):
    before, token, seen = processors(sd), CancelToken(), []

    def stop_in_the_second(event):
        seen.append(event.step)
        if event.step == 2:
            token.request()

    with pytest.raises(Cancelled):
        generate(replace(RECIPE, steps=9, attention=AGENT), pipe=sd, on_step=stop_in_the_second, cancel=token)
    assert seen == [1, 2]
    assert token.requested
    assert processors(sd) == before
    assert np.array_equal(pixels(generate(RECIPE, pipe=sd)), pixels(generate(RECIPE, pipe=tiny.fresh(tiny.sd()))))


def test_a_stop_before_the_start_does_no_work():
    token = CancelToken()
    token.request()
    with pytest.raises(Cancelled):
        generate(replace(RECIPE, model="no such model"), cancel=token)


def test_an_error_in_the_callback_takes_the_attention_out(sd):
    before = processors(sd)

    def fail(event):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        generate(replace(RECIPE, attention=AGENT), pipe=sd, on_step=fail)
    assert processors(sd) == before


def test_the_users_progress_bar_settings_come_back(sd):
    sd.set_progress_bar_config(desc="mine")
    generate(replace(RECIPE, steps=1), pipe=sd)
    assert sd._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize("field", ["prompt", "negative"])
def test_a_prompt_that_the_model_would_cut_is_refused(sd, field):
    with pytest.raises(ValueError, match="prompt is too long: got 76 tokens, this model reads 75; shorten it"):
        generate(replace(RECIPE, **{field: "a " * 76}), pipe=sd)
    generate(replace(RECIPE, steps=1, **{field: "a " * 75}), pipe=sd)


def test_long_text_is_padded_to_what_the_tokenizer_says_at_most():
    pipe = copy.deepcopy(tiny.flux_pipeline())  # the builder keeps one for all
    recipe = Recipe(prompt="a cat", steps=1, seed=0, width=16, height=16)
    lengths = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: lengths.append(given["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    generate(recipe, pipe=pipe)
    pipe.tokenizer_2.model_max_length = 24
    generate(recipe, pipe=pipe)
    assert lengths == [512, 24]
    with pytest.raises(
        ValueError, match="too long: got .*, this model reads 7[0-9]"
    ):  # what CLIP reads, the longer one
        generate(replace(recipe, prompt="a " * 90), pipe=pipe)


def test_a_tokenizer_inside_a_processor_is_asked_itself(sd):
    processor = SimpleNamespace(tokenizer=sd.tokenizer)
    pipe = SimpleNamespace(components={"tokenizer": processor, "tokenizer_2": None})
    with pytest.raises(ValueError, match="got 76 tokens, this model reads 75"):
        check_length("prompt", "a " * 76, pipe, {})


def test_values_that_are_not_numbers_are_an_error_and_no_black_picture(sd):
    sd.vae = copy.deepcopy(sd.vae)  # the fixture's is shared
    sd.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not numbers"):
        generate(replace(RECIPE, steps=1), pipe=sd)


def test_too_little_memory_is_told_in_one_sentence(sd, monkeypatch):
    monkeypatch.setattr(type(sd.scheduler), "step", lambda *args, **settings: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(MemoryError, match="not enough memory for a picture of 40 x 24 pixels; choose a smaller width"):
        generate(RECIPE, pipe=sd)


def test_pipelines_that_need_more_than_a_text_are_refused(animatediff, sd_controlnet):
    for pipe in (animatediff, sd_controlnet):
        with pytest.raises(ValueError, match=f"{type(pipe).__name__} does not make a picture from a text alone"):
            generate(RECIPE, pipe=pipe)


def test_another_stock_class_works_too(sdxl):
    picture = generate(replace(RECIPE, attention=AGENT, negative="rain"), pipe=sdxl)
    assert picture.image.size == (40, 24)
    assert picture.recipe.made_with["pipeline"] == "StableDiffusionXLPipeline"


def test_a_recipe_in_another_precision_than_the_pipeline_is_refused(sd):
    with pytest.raises(
        ValueError, match="computes in bfloat16, this pipeline in float32; load it with dtype='bfloat16'"
    ):
        generate(replace(RECIPE, dtype="bfloat16"), pipe=sd)


def test_attention_of_ours_that_is_already_there_is_refused(sd):
    install(sd, "agent")
    for attention in ((), AGENT):
        with pytest.raises(ValueError):
            generate(replace(RECIPE, attention=attention), pipe=sd)


def test_a_preview_is_small_and_shows_the_latents(sd):
    shown = []
    picture = generate(RECIPE, pipe=sd, on_step=lambda event: shown.append(preview(event.latents, sd, side=24)))
    assert [image.size for image in shown] == [(24, 14)] * 3
    last = preview(shown_latents(sd), sd)
    assert last.size == (40, 24)
    assert np.array_equal(np.asarray(last), pixels(picture))  # not shrunk: the picture itself
    with pytest.raises(ValueError, match=r"preview needs latents of shape \(B, C, H, W\), got \(1, 4, 8\)"):
        preview(torch.zeros(1, 4, 8), sd)


def shown_latents(pipe):
    kept = []
    generate(RECIPE, pipe=pipe, on_step=lambda event: kept.append(event.latents.clone()))
    return kept[-1]
