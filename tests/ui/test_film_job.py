"""The tab for long videos without a browser: form, recipe, the worker's films, and going on after a stop."""

from __future__ import annotations

import inspect
import json
import time
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import tiny
from PIL import Image

from reattend.pipelines import Recipe, Upscale, Video, bundled, filming, writing
from reattend.pipelines.checkpoint import parts_folder
from reattend.pipelines.film import film_file, frame_count, partial
from reattend.pipelines.film_inputs import NEEDED
from reattend.pipelines.filming import filled_in
from reattend.ui import film_job, image_job
from reattend.ui.film_job import FilmJob, fill_film_form, film_models, read_film_form
from reattend.ui.image_job import ImageJob, fill_form, load_recipe, make_image, summary
from reattend.ui.jobs import Session, Worker

MODEL = "tiny"
PICTURE_FIELDS = ("prompt", "negative", "model", "width", "height", "steps", "guidance", "seed", "dtype")
SMALL = {"steps": 2, "width": "24", "height": "16", "frames": 7, "seed": "5", "later": "3: a blue cat"}
SMALL |= {"dual-scope.window": "4", "dual-scope.anchors": 2}


def film_form(**changes):
    """The tab's form as it stands when the page opens, with changes."""
    values = dict.fromkeys(PICTURE_FIELDS, "") | {"prompt": "a car", "model": MODEL, "steps": 20}
    values |= {"frames": 64, "fps": 8, "later": "", "blend": 0}
    values |= {f"dual-scope.{s.name}": s.default for s in film_job.SETTINGS}
    return values | changes


@pytest.fixture
def session(tmp_path, monkeypatch):
    pipe = tiny.fresh(tiny.animatediff())
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: pipe)
    monkeypatch.setattr(image_job, "PREVIEW_SHARE", 1e9)
    monkeypatch.setattr(film_job, "PREVIEW_SHARE", 1e9)  # a preview after every step
    worker = Worker(FilmJob(tmp_path, ImageJob(tmp_path).pipe))
    yield Session(worker)
    worker.close()


def make(session, form, stop=None, **how):
    """All views of a film; stop(view) says after which one to press Stop."""
    views = []
    for view in make_image(session, form, [MODEL], how.get("read", read_film_form)):
        views.append(view)
        if stop is not None and stop(view):
            session.stop()
            stop = None
    return views


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
    ("changes", "words"),
    [
        ({"prompt": " "}, "say what the film should show"),
        ({"frames": None}, "number of frames is empty"),
        ({"frames": 0}, "frames is out of range"),
        ({"fps": 200}, "fps is out of range"),
        ({"later": "later a cat"}, "a later prompt cannot be read: 'later a cat'; write the frame"),
        ({"later": "soon: a cat"}, "a later prompt cannot be read"),
        ({"later": "64: a cat"}, "need frames that grow, from 1 to 63"),
        ({"later": "3:"}, "the prompt from frame 3 is empty"),
        ({"dual-scope.anchors": -1}, "anchors must not be negative"),
        ({"model": "elsewhere"}, "does not offer the model"),
        ({"width": "33"}, "multiple of 8"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_bad_input_is_one_sentence_and_starts_nothing(session, changes, words):
    (view,) = make(session, film_form(**changes))
    assert view.tone == "bad" and words in view.message.lower() and session.run is None


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
            Recipe(prompt="a cat", model=MODEL, video=Video(strength=0.5)),
            "cannot show; use it on the command line: reattend",
        ),
        (
            Recipe(
                prompt="a cat", model=MODEL, video=Video(ip_adapter_scale=0.8, pictures={"ip_adapter_image": 64 * "0"})
            ),
            "has ip_adapter_image, which this page cannot show; use it from Python: long_video.",
        ),
        (Recipe(prompt="a cat", model=MODEL, video=Video(pag_scale=2.0)), "has pag_scale, which this page cannot show"),
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
    assert again.video == asked.video


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
        needs = NEEDED.keys() & inspect.signature(getattr(diffusers, kind).__call__).parameters.keys()
        assert film_models([str(tmp_path)]) == ([], [] if needs - {"ip_adapter_image"} else [str(tmp_path)])
    index.write_text("[]")
    assert film_models([str(tmp_path)]) == ([str(tmp_path)], [str(tmp_path)])  # it tells when it is used


def test_a_film_is_made_with_its_sheet_and_can_be_loaded_again(session, tmp_path):
    views = make(session, film_form(**SMALL))
    last = views[-1]
    assert last.tone == "good", last.message
    made = last.made
    assert last.film == made.file == tmp_path / "a-car-5.mp4" and last.picture == tmp_path / "a-car-5-sheet.png"
    assert frame_count(made.file) == 7 and Recipe.read(made.file) == made.recipe
    assert made.recipe.video.later == ((3, "a blue cat"),)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-car-5-sheet.png", "a-car-5.mp4", "a-car-5.mp4.json"]
    values, view = load_recipe(made.file, [made.recipe.model], fill_film_form)
    assert view.tone == "good" and values["frames"] == 7 and values["dual-scope.anchors"] == 2
    lines = " | ".join(view.message for view in views)
    assert "Drawing all frames, step 1 of 2" in lines
    previews = [view.picture for view in views if isinstance(view.picture, Image.Image)]
    assert previews and all(one.size == Image.open(made.sheet).size for one in previews)


def test_clips_are_told_while_the_file_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "DECODED", 2)
    pipe, told = tiny.fresh(tiny.animatediff()), []
    job = FilmJob(tmp_path, lambda *_: pipe)
    job(replace(read_film_form(film_form(**SMALL), [MODEL]), steps=1), image_job.CancelToken(), told.append)
    clips = [progress for progress in told if progress.of == "clip"]
    assert [(one.step, one.steps) for one in clips] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert clips[1].line().startswith("Writing the film, clip 2 of 4, ") and clips[-1].seconds_left == 0
    assert all(one.preview is not None for one in clips)


def test_the_growing_film_is_shown_when_it_plays_and_again_when_it_has_grown(tmp_path):
    recipe = Recipe(prompt="a cat", width=32, height=32, video=Video(frames=1200))
    show = film_job._Show(recipe, None, tmp_path / "cat.mp4", lambda _: None)
    draw = np.random.default_rng(0)

    def write(film, frames, at_least):
        for _ in range(frames):
            film.write(draw.integers(0, 255, (32, 32, 3), np.uint8))
        show.written += frames
        end = time.monotonic() + 60
        while frame_count(partial(show.path)) < at_least and time.monotonic() < end:
            time.sleep(0.1)

    with film_file(show.path, 32, 32, recipe) as film:
        write(film, 1, 0)
        assert show._grown() is None  # FFmpeg still keeps the first frames to itself
        write(film, 399, 200)
        first = show._grown()
        assert first[0] == partial(show.path) and 200 <= first[1] <= 400
        assert show._grown() == first  # it has not grown
        write(film, 800, 700)
        assert show._grown()[1] >= 700


def test_what_was_denoised_before_a_stop_is_kept_and_gone_on_with(session, tmp_path):
    whole = make(session, film_form(**SMALL | {"steps": 3, "later": ""}))[-1].made.file.read_bytes()
    for file in tmp_path.iterdir():
        file.unlink()
    form = film_form(**SMALL | {"steps": 3, "later": ""})
    stopped = make(session, form, stop=lambda view: view.fraction is not None)[-1]
    assert "which is kept. Press Go on to finish the film" in stopped.message and stopped.film is None
    kept = session.kept
    assert kept.recipe.seed == 5 and parts_folder(tmp_path / "a-car-5.mp4").exists()
    done = make(session, {}, read=lambda *_: kept.recipe)[-1]
    assert done.tone == "good" and session.kept is None
    assert done.made.file.read_bytes()[-2000:] == whole[-2000:]  # the very same frames
    assert not parts_folder(done.made.file).exists()


def test_a_stop_while_the_file_is_written_leaves_it_playing_and_the_same_form_writes_the_rest(
    session, tmp_path, monkeypatch
):
    monkeypatch.setattr(writing, "DECODED", 2)
    form = film_form(**SMALL)
    plain = filming._Making._told_clip

    def told(self, number, *more):
        if number == 1:
            session.stop()
        plain(self, number, *more)

    with monkeypatch.context() as patch:
        patch.setattr(filming._Making, "_told_clip", told)
        stopped = make(session, form)[-1]
    assert "Stopped after 4 of 7 frames were written; so much of the film plays" in stopped.message
    assert stopped.film == partial(tmp_path / "a-car-5.mp4") and frame_count(stopped.film) == 4
    other = make(session, form | {"seed": "6", "steps": 1})[-1]
    assert other.made.file.name == "a-car-6.mp4" and session.kept is not None  # another film leaves it alone
    done = make(session, form)[-1]  # the same settings
    assert done.made.file == tmp_path / "a-car-5.mp4" and frame_count(done.made.file) == 7
    assert session.kept is None and not stopped.film.exists()


def test_names_of_films_that_are_there_or_begun_are_not_taken(session, tmp_path):
    for name in ("a-car-5.mp4.parts", "a-car-5-2-sheet.png"):
        (tmp_path / name).mkdir() if name.endswith("parts") else (tmp_path / name).write_text("")
    assert make(session, film_form(**SMALL | {"steps": 1}))[-1].made.file.name == "a-car-5-3.mp4"


def test_a_stop_before_the_first_step_keeps_nothing(session, tmp_path):
    stopped = make(session, film_form(**SMALL), stop=lambda view: view.message == "Starting")[-1]
    assert stopped.message.startswith("Stopped") and session.kept is None and not list(tmp_path.iterdir())


def test_a_pipeline_that_makes_no_films_says_so(tmp_path):
    job = FilmJob(tmp_path, lambda *_: tiny.fresh(tiny.sd()))
    with pytest.raises(ValueError, match="makes no film; use an AnimateDiff pipeline"):
        job(read_film_form(film_form(**SMALL), [MODEL]), image_job.CancelToken(), lambda _: None)


def test_the_manifest_of_a_kept_film_tells_its_recipe(session, tmp_path):
    make(session, film_form(**SMALL | {"steps": 3}), stop=lambda view: view.fraction is not None)
    (manifest,) = parts_folder(tmp_path / "a-car-5.mp4").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["recipe"] == json.loads(session.kept.recipe.to_json())
