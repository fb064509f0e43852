"""The upscale tab without a browser: form, recipe, views."""

from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from reattend.attn_processors import ATTN_PROCESSORS
from reattend.pipelines import Recipe, Upscale
from reattend.ui import image_job
from reattend.ui.attention_form import STOCK, settings_of
from reattend.ui.image_job import FIELDS, ImageJob, fill_form, load_recipe, make_image, summary
from reattend.ui.jobs import Progress, Session, Worker
from reattend.ui.upscale_job import MORE_FIELDS, fill_upscale_form, read_upscale_form

MODEL = "tiny"
SMALL = {"steps": 2, "width": "24", "height": "16"}
AGENT = ({"name": "agent", "ratio": 0.25},)
RECIPE = Recipe(prompt="a car", model=MODEL, width=24, height=16, seed=3)


def upscale_form(**changes):
    """The tab's form as it stands when the page opens, with changes."""
    values = dict.fromkeys(FIELDS, "") | {"prompt": "a car", "model": MODEL, "steps": 20, "attention": STOCK}
    values |= dict(zip(MORE_FIELDS, ("2", 0.7, "", False, "", "", "2048"), strict=True))
    values |= {f"{name}.{s.name}": s.default for name, method in ATTN_PROCESSORS.items() for s in settings_of(method)}
    return values | changes


@pytest.fixture
def session(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: sd)
    worker = Worker(ImageJob(tmp_path))
    yield Session(worker)
    worker.close()


def test_the_untouched_form_asks_for_the_defaults():
    wanted = Recipe(prompt="a car", model=MODEL, upscale=Upscale(attention=()))
    assert read_upscale_form(upscale_form(), [MODEL]) == wanted


@pytest.mark.parametrize("first", [False, True])
def test_a_form_is_read_into_a_recipe_and_filled_from_it_again(first):
    filled = upscale_form(
        scale="1.9375", strength=0.45, later_steps="9", attention_first=first, shift="3", rope_theta_scale="2.5",
        tile_from="512", attention="agent", **{"agent.ratio": "0.25"},
    )  # fmt: skip
    recipe = read_upscale_form(filled, [MODEL])
    growth = recipe.upscale
    assert (growth.scale, growth.strength, growth.steps, growth.shift) == (1.9375, 0.45, 9, 3.0)
    assert (growth.rope_theta_scale, growth.tile_from) == (2.5, 512)
    assert (recipe.attention if first else growth.attention)[0]["ratio"] == 0.25
    assert (growth.attention if first else recipe.attention) == (None if first else ())
    assert read_upscale_form(upscale_form() | fill_upscale_form(recipe, [MODEL]), [MODEL]) == recipe


def test_the_recipe_of_a_picture_that_was_not_enlarged_fills_the_form_too():
    for attention in ((), AGENT):
        recipe = replace(RECIPE, attention=attention)
        again = read_upscale_form(upscale_form() | fill_upscale_form(recipe, [MODEL]), [MODEL])
        assert replace(again, upscale=None) == recipe
        assert again.upscale.scale == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"scale": "1"}, "scale does not enlarge"),
        ({"scale": "big"}, "scale must be a number"),
        ({"strength": 0}, "strength"),
        ({"later_steps": "0"}, "steps of the later"),
        ({"shift": "no"}, "shift must be a number"),
        ({"tile_from": "0"}, "tile_from"),
        ({"attention": "magic"}, "no attention called"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_bad_input_is_one_sentence_and_starts_nothing(session, changes, words):
    views = list(make_image(session, upscale_form(**changes), [MODEL], read_upscale_form))
    assert len(views) == 1
    assert views[0].tone == "bad"
    assert words in views[0].message.lower()
    assert session.run is None


def test_a_picture_is_enlarged_saved_and_shown_with_its_recipe(session):
    views = list(make_image(session, upscale_form(**SMALL), [MODEL], read_upscale_form))
    last = views[-1]
    assert last.tone == "good", last.message
    assert Image.open(last.picture).size == (48, 32)
    recipe = Recipe.read(last.made.file)
    assert recipe == last.made.recipe
    assert "24 × 16, then 2 times as large at strength 0.7" in summary(recipe)
    (first,) = last.made.smaller
    assert Image.open(first).size == (24, 16) and first.name in last.message
    assert Recipe.read(first) == replace(recipe, upscale=None)
    assert "later agent" in summary(replace(recipe, upscale=Upscale(attention=AGENT)))


def test_progress_tells_which_size_is_being_made():
    assert Progress("Drawing", 3, 9, 75.0, part="Size 2 of 3").line() == "Size 2 of 3, step 3 of 9, 1 min 15 s left"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (replace(RECIPE, upscale=Upscale(sizes=((64, 64), (96, 96)))), "lists 2 sizes"),
        (replace(RECIPE, upscale=Upscale(source="/etc/passwd")), "does not open"),
        (replace(RECIPE, attention=AGENT, upscale=Upscale(attention=())), "changes from agent to stock attention"),
        (replace(RECIPE, model="elsewhere"), "does not offer the model"),
    ],
    ids=["sizes", "source", "attention", "model"],
)
def test_an_unusable_recipe_is_one_sentence_and_fills_nothing(tmp_path, recipe, words):
    file = tmp_path / "car.json"
    file.write_text(recipe.to_json())
    values, view = load_recipe(file, [MODEL], fill_upscale_form)
    assert values == {}
    assert view.tone == "bad"
    assert words in view.message


def test_the_image_tab_sends_such_a_recipe_here():
    with pytest.raises(ValueError, match="load it on the tab Upscale"):
        fill_form(replace(RECIPE, upscale=Upscale()), [MODEL])
