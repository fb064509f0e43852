"""The form of the tab for long videos: its models, what each takes, and form <-> recipe."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace

import diffusers
import pytest
import tiny
from film_forms import MODEL, SMALL, film_form

from reattend.pipelines import Recipe, Upscale, Video, bundled
from reattend.pipelines.film_inputs import NEEDED
from reattend.pipelines.filming import filled_in
from reattend.pipelines.videos import NUMBERS
from reattend.ui import film_form as forms
from reattend.ui.film_form import EVERYTHING, TAKES, fill_film_form, film_models, read_film_form, takes
from reattend.ui.image_job import fill_form, load_recipe, summary


def test_the_untouched_form_asks_for_the_defaults():
    wanted = Recipe(prompt="a car", model=MODEL, video=Video(), attention=({"name": "dual-scope"},))
    assert read_film_form(film_form(), [MODEL]) == wanted


def test_a_form_is_read_into_a_recipe_and_filled_from_it_again():
    filled = film_form(
        frames=256, fps=12, later="64: a blue car\n\n 128 : a car: red", blend=8, negative="a dog", seed="7",
        **{"dual-scope.window": "8", "dual-scope.anchors": 4, "dual-scope.token_scale": "log"},
    )  # fmt: skip
    recipe = read_film_form(filled, [MODEL])
    assert recipe.video == Video(frames=256, fps=12, later=((64, "a blue car"), (128, "a car: red")), blend=8)
    (dual,) = recipe.attention
    assert (dual["window"], dual["anchors"], dual["token_scale"]) == (8, 4, "log")
    assert read_film_form(film_form() | fill_film_form(recipe, [MODEL]), [MODEL]) == recipe
    phases = ({"until": 0.5, "anchors": 3.0}, {"window": 2.0})
    recipe = replace(recipe, attention=({"name": "dual-scope", "phases": phases},))
    assert read_film_form(film_form() | fill_film_form(recipe, [MODEL]), [MODEL]) == recipe
    assert "256 frames, 12 a second" in summary(recipe)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(prompt="a cat", model=MODEL), "makes a picture; load it on the tab Image"),
        (Recipe(prompt="a cat", model=MODEL, upscale=Upscale()), "tab Image or Upscale"),
        (
            Recipe(prompt="a cat", model=MODEL, video=Video(), attention=({"name": "agent"}, {"name": "dual-scope"})),
            "agent and dual-scope attention and this page can hold dual-scope alone",
        ),
        (Recipe(prompt="a cat", model="elsewhere", video=Video()), "does not offer the model"),
        (
            Recipe(prompt="a cat", model=MODEL, video=Video(controlnet_frame_indices=(0, 3))),
            "cannot show; use it on the command line: reattend",
        ),
        (
            Recipe(
                prompt="a cat", model=MODEL, video=Video(ip_adapter_scale=0.8, pictures={"ip_adapter_image": 64 * "0"})
            ),
            "has ip_adapter_image, which this page cannot show; use it from Python: long_video.",
        ),
        (
            Recipe(prompt="a cat", model=MODEL, video=Video(pag_scale=2.0, pag_applied_layers=("up_blocks",))),
            "has pag_applied_layers, which this page cannot show",
        ),
    ],
    ids=["picture", "upscale", "two", "model", "input", "adapter", "guidance"],
)
def test_an_unusable_recipe_is_one_sentence_and_fills_nothing(tmp_path, recipe, words):
    file = tmp_path / "car.json"
    file.write_text(recipe.to_json())
    values, view = load_recipe(file, [MODEL], fill_film_form)
    assert values == {} and view.tone == "bad" and words in view.message


def test_a_film_with_perturbed_attention_guidance_made_here_can_be_loaded_again():
    asked = read_film_form(film_form(**SMALL), [MODEL])
    made = filled_in(asked, tiny.fresh(tiny.animatediff_inputs("PAG")))
    assert made.video.pag_scale is not None and made.video.pag_applied_layers
    again = read_film_form(film_form() | fill_film_form(replace(made, model=MODEL), [MODEL]), [MODEL])
    assert filled_in(again, tiny.fresh(tiny.animatediff_inputs("PAG"))).video == made.video


def test_the_image_tab_sends_films_here():
    with pytest.raises(ValueError, match="load it on the tab Long video"):
        fill_form(Recipe(prompt="a cat", model=MODEL, video=Video()), [MODEL])


def test_models_are_sorted_by_what_they_make(animatediff_folder, sd_folder, tmp_path):
    named = [str(animatediff_folder), str(sd_folder), "owner/name", *bundled()]
    pictures, films = film_models(named)
    assert films[0] == str(animatediff_folder) and "owner/name" in films and str(sd_folder) not in films
    assert str(animatediff_folder) not in pictures and {str(sd_folder), "owner/name", "tiny-sd"} <= set(pictures)
    index = tmp_path / "model_index.json"
    for kind in (name for name in dir(diffusers) if name.startswith("AnimateDiff")):
        index.write_text(json.dumps({"_class_name": kind}))
        accepts = inspect.signature(getattr(diffusers, kind).__call__).parameters.keys()
        sparse = "controlnet_frame_indices" in accepts
        assert film_models([str(tmp_path)]) == ([], [] if sparse else [str(tmp_path)])
        assert sparse or set(takes(str(tmp_path))) == accepts & {*NEEDED, *NUMBERS} - {"ip_adapter_image"}
    index.write_text("[]")
    assert film_models([str(tmp_path)]) == ([str(tmp_path)], [str(tmp_path)])  # it tells when it is used
    assert takes("owner/name") == takes(str(tmp_path)) == EVERYTHING and set(TAKES) & set(dir(diffusers)) == set(TAKES)


def test_a_model_that_was_downloaded_is_known_by_its_class(tmp_path, monkeypatch):
    index = tmp_path / "model_index.json"
    index.write_text('{"_class_name": "AnimateDiffVideoToVideoPipeline"}')
    monkeypatch.setattr(forms, "try_to_load_from_cache", lambda model, file: {"owner/name": str(index)}.get(model))
    assert takes("owner/name") == ("video", "strength") and film_models(["owner/name"])[0] == []
    assert takes("owner/other") == EVERYTHING


def test_what_the_model_does_not_take_is_not_read_and_a_recipe_with_it_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "AnimateDiffPipeline"}')
    model = str(tmp_path)
    hidden = {"given": {"video": 64 * "0"}, "strength": "0.5", "pag_scale": "much"}
    assert read_film_form(film_form(**hidden, model=model), [model]).video == Video()
    with pytest.raises(ValueError, match="has strength, which its model .* does not take; leave it out of the recipe"):
        fill_film_form(Recipe(prompt="a cat", model=model, video=Video(strength=0.5)), [model])
