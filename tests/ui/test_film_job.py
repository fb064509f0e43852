"""The tab for long videos without a browser: the worker's films, what they are made from, and going on after a stop."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny
from film_forms import MODEL, SMALL, film_form
from PIL import Image

from reattend.pipelines import Recipe, Video, filming, long_video, writing
from reattend.pipelines.checkpoint import parts_folder
from reattend.pipelines.film import film_file, frame_count, partial
from reattend.ui import film_job, image_job
from reattend.ui.film_files import keep_film
from reattend.ui.film_form import fill_film_form, read_film_form
from reattend.ui.film_job import FilmJob
from reattend.ui.image_job import ImageJob, load_recipe, make_image, summary
from reattend.ui.jobs import Session, Worker


@pytest.fixture
def session(tmp_path, monkeypatch):
    pipe = tiny.fresh(tiny.animatediff())
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: pipe)
    monkeypatch.setattr(image_job, "PREVIEW_SHARE", 1e9)
    monkeypatch.setattr(film_job, "PREVIEW_SHARE", 1e9)  # a preview after every step
    worker = Worker(FilmJob(tmp_path, ImageJob(tmp_path).pipe, tmp_path / "kept"))
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


def sent(folder, frames, colour=0):
    """Pictures as a browser sends them."""
    folder.mkdir()
    for i in range(frames):
        Image.new("RGB", (24, 16), (colour, 20 * i, 255 - 30 * i)).save(folder / f"frame {i}.png")
    return sorted(folder.iterdir())


def test_a_film_is_made_from_another_as_the_command_line_makes_it_and_its_recipe_finds_that_again(
    session, tmp_path, monkeypatch
):
    pipe = tiny.fresh(tiny.animatediff_inputs("VideoToVideoControlNet"))
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: pipe)
    film, control = sent(tmp_path / "film", 5), sent(tmp_path / "control", 5, 200)
    given = {
        word: keep_film(files, tmp_path / "kept")[0]
        for word, files in (("video", film), ("conditioning_frames", control))
    }
    form = film_form(**SMALL | {"later": "", "frames": 5, "steps": 4}, given=given, strength="0.5")
    form |= {"controlnet_conditioning_scale": "0.7"}
    views = make(session, form)
    assert views[-1].tone == "good", views[-1].message
    assert "Reading what the film is made from" in [view.message for view in views]
    made = views[-1].made
    assert (made.recipe.video.strength, made.recipe.video.controlnet_conditioning_scale) == (0.5, 0.7)
    assert made.recipe.video.pictures == given
    assert "from another film at strength 0.5, along pictures that were given" in summary(made.recipe)
    alone = tmp_path / "alone.mp4"
    recipe = replace(read_film_form(form, [MODEL]), model=made.recipe.model)
    plain = replace(recipe, video=replace(recipe.video, pictures={}))
    long_video(plain, alone, pipe=pipe, video=tmp_path / "film", conditioning_frames=tmp_path / "control")
    assert alone.read_bytes()[-2000:] == made.file.read_bytes()[-2000:]  # the very same frames
    again = film_form() | fill_film_form(replace(made.recipe, model=MODEL), [MODEL])
    assert again["given"] == given and again["strength"] == "0.5"
    assert make(session, again)[-1].made.recipe == made.recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "AnimateDiffVideoToVideoPipeline needs video: give the film to start from"),
        ({"frames": 6}, "video has 5 pictures, but the film has 6 frames; give one for every frame"),
        ({"strength": "0.2"}, "strength 0.2 of 2 steps leaves no step to be done"),
        ({"strength": "1.5"}, "strength is out of range"),
        ({"strength": "much"}, "The share of the film that may change must be a number, got 'much'"),
        ({"controlnet_conditioning_scale": "1"}, "takes no controlnet_conditioning_scale, got 1; leave it out"),
    ],
    ids=["nothing", "frames", "steps", "range", "word", "net"],
)
def test_what_does_not_fit_the_film_given_is_one_sentence(session, tmp_path, monkeypatch, changes, words):
    pipe = tiny.fresh(tiny.animatediff_inputs("VideoToVideo"))
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: pipe)
    given = {"video": keep_film(sent(tmp_path / "film", 5), tmp_path / "kept")[0]} if changes else {}
    last = make(session, film_form(**SMALL | {"later": "", "frames": 5}, given=given) | changes)[-1]
    assert last.tone == "bad" and words.lower() in last.message.lower()


def test_a_film_from_another_that_was_stopped_goes_on_and_tells_what_the_command_line_needs(
    session, tmp_path, monkeypatch
):
    pipe = tiny.fresh(tiny.animatediff_inputs("VideoToVideo"))
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: pipe)
    digest, frames = keep_film(sent(tmp_path / "film", 5), tmp_path / "kept")
    form = film_form(**SMALL | {"later": "", "frames": frames, "steps": 4}, given={"video": digest})
    stopped = make(session, form, stop=lambda view: view.fraction is not None)[-1]
    assert stopped.message.endswith("reattend video --resume on a-car-5.mp4, with --video as here.")
    kept = session.kept
    assert make(session, {}, read=lambda *_: kept.recipe)[-1].made.recipe == kept.recipe


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
    job = FilmJob(tmp_path, lambda *_: pipe, tmp_path)
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
    job = FilmJob(tmp_path, lambda *_: tiny.fresh(tiny.sd()), tmp_path)
    with pytest.raises(ValueError, match="makes no film; use an AnimateDiff pipeline"):
        job(read_film_form(film_form(**SMALL), [MODEL]), image_job.CancelToken(), lambda _: None)


def test_the_manifest_of_a_kept_film_tells_its_recipe(session, tmp_path):
    make(session, film_form(**SMALL | {"steps": 3}), stop=lambda view: view.fraction is not None)
    (manifest,) = parts_folder(tmp_path / "a-car-5.mp4").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["recipe"] == json.loads(session.kept.recipe.to_json())
