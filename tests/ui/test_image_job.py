"""The image job of the page without a browser: form, recipe, views."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from PIL import Image

from reattend.attn_processors import ATTN_PROCESSORS
from reattend.pipelines.recipe import Recipe
from reattend.ui import image_job
from reattend.ui.attention_form import STOCK, settings_of
from reattend.ui.image_job import ImageJob, Previewer, fill_form, load_recipe, make_image, read_form, summary
from reattend.ui.jobs import Session, Worker

MODEL = "tiny"
SOON = 30  # seconds a test waits for another thread before it fails


def form(**changes):
    """The page's form as it stands when the page opens, with changes."""
    values = {
        "prompt": "a car",
        "negative": "",
        "model": MODEL,
        "width": "",
        "height": "",
        "steps": 20,
        "guidance": "",
        "seed": "",
        "dtype": "",
        "attention": STOCK,
    }
    values |= {f"{name}.{s.name}": s.default for name, method in ATTN_PROCESSORS.items() for s in settings_of(method)}
    return values | changes


@pytest.fixture
def session(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: sd)
    worker = Worker(ImageJob(tmp_path))
    yield Session(worker)
    worker.close()


def test_the_untouched_form_asks_for_the_defaults():
    assert read_form(form(), [MODEL]) == Recipe(prompt="a car", model=MODEL)


def test_a_form_is_read_into_a_recipe_and_filled_from_it_again():
    filled = form(
        prompt="a cat",
        negative="fog",
        width="64",
        height="32",
        steps=7,
        guidance="2.5",
        seed="9007199254740993",
        dtype="bfloat16",
    )
    filled |= {"attention": "agent", "agent.ratio": "0.25"}
    recipe = read_form(filled, [MODEL])
    assert (recipe.width, recipe.height, recipe.seed, recipe.guidance) == (64, 32, 2**53 + 1, 2.5)
    assert recipe.attention[0]["name"] == "agent"
    assert recipe.attention[0]["ratio"] == 0.25
    assert read_form(form() | fill_form(recipe, [MODEL]), [MODEL]) == recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"width": "33"}, "multiple of 8"),
        ({"width": "wide"}, "must be a whole number"),
        ({"height": "99999"}, "8192"),
        ({"steps": 0}, "steps"),
        ({"seed": "-1"}, "seed"),
        ({"guidance": "much"}, "must be a number"),
        ({"model": "/etc"}, "does not offer the model"),
        ({"attention": "magic"}, "no attention called"),
        ({"attention": "agent", "agent.ratio": "1.5"}, "ratio"),
        ({"attention": "agent", "agent.levels": None}, "is empty"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_bad_input_is_one_sentence_and_starts_nothing(session, changes, words):
    views = list(make_image(session, form(**changes), [MODEL]))
    assert len(views) == 1
    assert views[0].tone == "bad"
    assert not views[0].busy
    assert words in views[0].message.lower()
    assert "\n" not in views[0].message
    assert session.run is None


def test_a_file_that_cannot_be_read_is_one_sentence_and_starts_nothing(session):
    def read(*_):
        raise PermissionError("no permission to read config.json")

    (view,) = make_image(session, {}, [MODEL], read)
    assert (view.message, view.tone, view.busy) == ("No permission to read config.json.", "bad", False)
    assert session.run is None


def test_a_picture_is_made_saved_and_shown_with_its_recipe(session, tmp_path):
    views = list(make_image(session, form(steps=3, width="32", height="32"), [MODEL]))
    first, last = views[0], views[-1]
    assert first.busy
    assert not last.busy
    assert last.tone == "good"
    assert last.picture == last.made.file
    assert last.made.file.parent == tmp_path
    recipe = Recipe.read(last.made.file)
    assert recipe == Recipe.read(last.made.recipe_file) == last.made.recipe
    assert recipe.seed is not None
    assert f"Seed {recipe.seed}" in last.message
    assert session.history == [last.made]
    assert f"seed {recipe.seed}" in summary(recipe)


def test_the_used_seed_makes_the_same_picture_again(session):
    settings = {"steps": 2, "width": "32", "height": "32"}
    first = list(make_image(session, form(**settings), [MODEL]))[-1].made
    again = list(make_image(session, form(**settings, seed=str(first.recipe.seed)), [MODEL]))[-1].made
    assert first.file != again.file
    assert Image.open(first.file).tobytes() == Image.open(again.file).tobytes()


def test_the_chosen_attention_changes_the_picture_and_leaves_the_model_as_it_was(session, sd):
    settings = {"steps": 2, "width": "32", "height": "32", "seed": "5"}
    before = {name: type(p) for name, p in sd.unet.attn_processors.items()}
    agent = {"attention": "agent", "agent.ratio": "0.75"}
    files = [list(make_image(session, form(**settings, **extra), [MODEL]))[-1].made.file for extra in ({}, agent, {})]
    stock, with_agent, stock_again = (Image.open(file).tobytes() for file in files)
    assert stock == stock_again != with_agent
    assert {name: type(p) for name, p in sd.unet.attn_processors.items()} == before


def test_stop_ends_within_two_steps_saves_nothing_and_the_next_picture_works(session, tmp_path, monkeypatch):
    seen, asked = [], threading.Event()

    class SlowPreviewer(Previewer):
        def __call__(self, latents):  # holds the run at step 2 until the stop has been asked for
            seen.append(1)
            if len(seen) == 2:
                assert asked.wait(SOON)
            return None

    monkeypatch.setattr(image_job, "Previewer", SlowPreviewer)
    views = make_image(session, form(steps=50, width="32", height="32"), [MODEL])
    while next(views).fraction != 2 / 50 and len(seen) < 2:
        pass
    session.stop()
    asked.set()
    last = list(views)[-1]
    assert last.message.startswith("Stopped at step")
    assert not last.busy
    assert len(seen) <= 4
    assert list(tmp_path.iterdir()) == []
    assert list(make_image(session, form(steps=2, width="32", height="32"), [MODEL]))[-1].tone == "good"


def test_closing_the_view_stops_the_run(session):
    views = make_image(session, form(steps=1000, width="32", height="32"), [MODEL])
    next(views)
    run = session.run
    views.close()
    for _ in run.updates(every=SOON):
        pass
    assert run.outcome.state == "stopped"


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    session = Session(Worker(ImageJob(tmp_path / "out")))
    last = list(make_image(session, form(model=str(folder)), [str(folder)]))[-1]
    assert last.tone == "bad"
    assert "model_index.json" in last.message
    assert not last.busy
    session.worker.close()


def test_previews_are_small_pictures_and_take_a_share_of_the_time(sd, monkeypatch):
    import torch

    latents = torch.randn(1, 4, 16, 24)
    now = [0.0]
    monkeypatch.setattr(image_job.time, "monotonic", lambda: now[0])
    costly = image_job.preview
    monkeypatch.setattr(image_job, "preview", lambda *a: (now.__setitem__(0, now[0] + 1.0), costly(*a))[1])
    show = Previewer(sd)
    first = show(latents)
    assert first.width > first.height
    now[0] += 4.9  # a preview of 1 s at a share of 0.2: the next one 5 s after it
    assert show(latents) is None
    now[0] += 0.2
    assert show(latents) is not None
    assert show(torch.randn(1, 64, 16)) is None


def test_a_recipe_file_fills_the_form_without_running(tmp_path):
    recipe = Recipe(prompt="a cat", model=MODEL, seed=3, width=64, height=64)
    picture, sidecar = recipe.save(Image.new("RGB", (64, 64)), tmp_path / "cat.png")
    for file in (picture, sidecar):
        values, view = load_recipe(file, [MODEL])
        assert view.tone == "good"
        assert values["prompt"] == "a cat"
        assert values["seed"] == "3"
        assert values["attention"] == STOCK


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a recipe", "cat.json"),
        (b"\x89PNG\r\n\x1a\nbroken", "cat.json"),
        (Recipe(prompt="a cat", model="elsewhere").to_json().encode(), "does not offer the model 'elsewhere'"),
        (
            Recipe(prompt="a cat", model=MODEL, attention=({"name": "agent"}, {"name": "agent"})).to_json().encode(),
            "combines 2",
        ),
    ],
    ids=["text", "broken picture", "other model", "two attentions"],
)
def test_an_unusable_recipe_is_one_sentence_and_fills_nothing(tmp_path, content, words):
    file = tmp_path / "cat.json"
    file.write_bytes(content)
    values, view = load_recipe(file, [MODEL])
    assert values == {}
    assert view.tone == "bad"
    assert words in view.message
    assert str(tmp_path) not in view.message


def test_waiting_says_how_many_come_first():
    assert image_job.waiting_line(1) == "Waiting: 1 other job comes first"
    assert image_job.waiting_line(2) == "Waiting: 2 other jobs come first"


def test_files_are_named_after_the_prompt(session):
    made = list(make_image(session, form(prompt="A Cat, red!", steps=2, width="32", height="32"), [MODEL]))[-1].made
    assert made.file.name == "a-cat-red.png"
    assert Path(f"{made.file}.json") == made.recipe_file
