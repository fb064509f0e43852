"""The story tab without a browser: what is made, one panel again, and what the page shows of it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reattend.attn_processors import Place
from reattend.attn_processors.ops.regions import pack_mask
from reattend.pipelines import Panel, Recipe, Script, Subject
from reattend.pipelines.masks import COLOURS
from reattend.ui import image_job, story_job
from reattend.ui.image_job import ImageJob, Previewer, make_image
from reattend.ui.jobs import Session, Worker, by_class
from reattend.ui.story_files import keep_picture, load_story
from reattend.ui.story_form import fill_story_form, with_place
from reattend.ui.story_job import (
    GONE,
    Order,
    StoryJob,
    StoryMade,
    found_places,
    make_story,
    own_picture,
    panel_picture,
    story_words,
    strip_picture,
)

MODEL = "tiny"
TWO = Script(
    subjects=(Subject(name="Tom", phrase="cat", prompt="a blue cat"), Subject(name="Rex", phrase="dog", place=[0, 0, 1, 1])),
    panels=tuple(Panel(prompt=f"a cat and a dog {where}", places={"Rex": [0.5, 0, 1, 1]}) for where in "ab"),
    model=MODEL, steps=2, width=32, height=24, seed=1,
)  # fmt: skip


@pytest.fixture
def session(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: sd)
    pictures = ImageJob(tmp_path)
    worker = Worker(by_class({Recipe: pictures, Order: StoryJob(tmp_path, pictures.pipe)}))
    yield Session(worker)
    worker.close()


def form(**changes):
    return fill_story_form(TWO, [MODEL]) | {"kept": ""} | changes


def made_by(session, values, **how) -> StoryMade:
    views = list(make_story(session, values, [MODEL], **how))
    assert views[-1].tone == "good", views[-1].message
    assert all(view.busy for view in views[:-1]) and not views[-1].busy
    return views[-1].made


def contents(made: StoryMade) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in made.folder.iterdir()}


def test_one_panel_is_made_again_beside_the_others_and_the_story_before_stays(session):
    first = made_by(session, form())
    before = contents(first)
    assert {"panel-1.png", "panel-2.png", "strip.png", "story.json", "reference-2.png"} <= set(before)
    assert Script.read(first.story_file) == first.script
    again = made_by(session, form(), panel=1)  # nothing has changed
    assert contents(again) == before
    other = made_by(session, form(), panel=1, new_seed=True)
    after = contents(other)
    changed = {"panel-2.png", "panel-2-places.png", "strip.png", "story.json", "reference-2.png"}  # holds the story too
    assert {name for name in before if before[name] != after[name]} == changed
    own = [Image.open(made.own["Rex"]).tobytes() for made in (first, other)]
    assert own[0] == own[1]
    assert other.script.panels[0] == first.script.panels[0]
    assert other.script.panels[1].seed != first.script.panels[1].seed
    assert contents(first) == before
    assert session.history == [other, again, first]


def test_a_panel_takes_its_caption_seed_and_places_from_the_form_as_it_is_now(session):
    made_by(session, form())
    changed = form(panels=[["a cat and a dog a", ""], ["a dog", "7"]])
    changed["places"] = with_place(changed["places"], 1, "Rex", "0.25, 0, 1, 1")
    again = made_by(session, changed, panel=1)
    panel = again.script.panels[1]
    assert (panel.prompt, panel.seed, panel.places) == ("a dog", 7, {"Rex": [0.25, 0, 1, 1]})
    whole = made_by(session, fill_story_form(again.script, [MODEL]))
    same = [np.array_equal(np.asarray(again.panel(i)), np.asarray(whole.panel(i))) for i in range(2)]
    assert same == [True, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 3}, "(steps changed)"),
        ({"negative": "fog"}, "(what it should not show changed)"),
        ({"strength": 0.5, "together": 2}, "(strength, panels in one call changed)"),
        (
            {"characters": [["Tom", "cat", "", "a red cat", ""], ["Rex", "dog", "", "dog", ""]]},
            "(the characters changed)",
        ),
        ({"panels": [["a cat", ""], ["a cat and a dog b", ""]]}, "(other panels changed)"),
        ({"panels": [["a cat and a dog a", "3"], ["a cat and a dog b", ""]]}, "(other panels changed)"),
        ({"panels": [["a cat and a dog a", ""]], "places": []}, "no panel 2 any more"),
        ({"model": "other"}, "does not offer the model"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_panel_of_another_story_is_refused(session, changes, words):
    filled = tuple(replace(panel, seed=i) for i, panel in enumerate(TWO.panels))
    session.shown = StoryMade(Path("nowhere"), replace(TWO, panels=filled), {}, (), 0.0)
    (view,) = make_story(session, form(**changes), [MODEL], panel=1)
    assert view.tone == "bad" and words in view.message and "\n" not in view.message
    assert session.run is None


def test_without_a_story_there_is_no_panel_to_make_again(session):
    (view,) = make_story(session, form(), [MODEL], panel=0)
    assert view.tone == "bad" and "no story yet" in view.message


def test_a_story_whose_files_are_gone_says_so(session, tmp_path):
    made = made_by(session, form())
    (made.folder / "panel-2.png").unlink()
    with pytest.raises(ValueError, match=GONE):
        panel_picture(made, 1)
    assert strip_picture(made, True) == made.strip_file
    shutil.rmtree(made.folder)
    last = list(make_story(session, form(), [MODEL], panel=1))[-1]
    assert (last.message, last.tone, last.busy) == (GONE, "bad", False)
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_is_remembered_and_its_places_can_be_taken_over(session, monkeypatch):
    asked = []

    def find(picture, phrases):
        asked.append(phrases)
        return [(0, 0.25, 0.5, 0.75) for _ in phrases]

    monkeypatch.setattr(story_job, "finder", lambda model: find)
    bare = form(places=[["own", "Rex", "0, 0, 1, 1"]])
    first = made_by(session, bare)
    assert asked == [["cat"], ["cat", "dog"], ["cat", "dog"]]  # Tom's own picture and the first panel; the second
    rows = found_places(first, [["1", "Tom", "0, 0, 1, 1"]])
    assert rows == [["1", "Tom", "0, 0, 1, 1"], ["1", "Rex", "0, 0.25, 0.5, 0.75"],
                    ["2", "Tom", "0, 0.25, 0.5, 0.75"], ["2", "Rex", "0, 0.25, 0.5, 0.75"]]  # fmt: skip
    asked.clear()
    made_by(session, bare, panel=0)
    assert asked == []
    made_by(session, bare, panel=0, new_seed=True)
    assert asked == [["cat", "dog"]]
    asked.clear()
    session.shown = first
    placed = made_by(session, bare | {"places": [*bare["places"], ["2", "Tom", "0, 0, 1, 1"]]}, panel=1)
    assert asked == [] and placed.script.panels[1].found is not None  # Rex is still where he was found
    made_by(session, bare, panel=1)
    assert asked == []


def test_a_picture_of_ones_own_stays_with_its_story(session, tmp_path):
    colours = Image.linear_gradient("L").resize((60, 24))
    colours.save(tmp_path / "sent.jpg")
    kept = keep_picture(tmp_path / "sent.jpg", "Rex", tmp_path / "kept")
    given = form(pictures={"Rex": kept}, places=[["own", "Rex", "0, 0, 0.4, 1"]])
    plain = made_by(session, form())
    first = made_by(session, given)
    assert plain.download == plain.story_file and first.download.name == "story.zip"
    assert not np.array_equal(np.asarray(first.panel(0)), np.asarray(plain.panel(0)))
    again = made_by(session, given, panel=1)
    assert contents(again) == contents(first)
    other = made_by(session, given, panel=1, new_seed=True)
    assert np.array_equal(np.asarray(other.panel(0)), np.asarray(first.panel(0)))
    values, wrong = load_story([other.download], [MODEL], tmp_path / "kept")
    assert wrong == "" and values["pictures"] == {"Rex": kept}
    whole = made_by(session, values)
    assert [np.array_equal(np.asarray(whole.panel(i)), np.asarray(other.panel(i))) for i in range(2)] == [True, True]
    session.shown = first
    (view,) = make_story(session, given | {"pictures": {}}, [MODEL], panel=1)
    assert view.tone == "bad" and "(the characters changed)" in view.message


def test_a_picture_is_shown_with_its_place(tmp_path):
    Image.new("RGB", (30, 60), (9, 9, 9)).save(tmp_path / "tom.png")
    bare = own_picture(str(tmp_path / "tom.png"), "Tom", ["Tom"])
    assert bare.size == (320, 640)
    rows = [["own", "Tom", "0.5, 0, 1, 0.5"], ["1", "Tom", "0, 0, 1, 1"]]
    placed = np.asarray(own_picture(str(tmp_path / "tom.png"), "Tom", ["Rex", "Tom"], rows))
    assert placed[200, 160].tolist() == list(COLOURS[1]) and placed[400, 160].tolist() == [9, 9, 9]
    crossed = own_picture(str(tmp_path / "tom.png"), "Tom", ["Tom"], None, (50, 60))
    assert np.asarray(crossed)[60, 50].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="picture for 'Tom' is no longer there; give it again"):
        own_picture(str(tmp_path / "gone.png"), "Tom", ["Tom"])


def test_what_was_not_found_is_told(session):
    bare = form(places=[])
    assert "not found: 'Tom' in panel 1" in story_words(made_by(session, bare))


def test_progress_names_the_panel_and_stop_leaves_no_folder(session, tmp_path, monkeypatch):
    lines = []

    class Stopping(Previewer):
        def __call__(self, latents):
            assert latents.shape[0] == 1
            session.stop()
            return None

    monkeypatch.setattr(story_job, "Previewer", Stopping)
    for view in make_story(session, form(steps=50), [MODEL]):
        lines.append(view.message)
    assert view.message.startswith("Stopped at step") and not view.busy
    assert list(tmp_path.iterdir()) == []


def test_parts_of_the_progress_are_named(session, monkeypatch):
    told = []
    job = session.worker._work
    monkeypatch.setattr(story_job, "finder", lambda model: lambda picture, phrases: [(0, 0, 1, 1) for _ in phrases])
    bare = tuple(Panel(prompt=panel.prompt) for panel in TWO.panels)
    three = replace(TWO, panels=(*bare, Panel(prompt="a cat")), together=2)
    job(
        Order(three),
        story_job.CancelToken(),
        lambda progress: told.append((progress.part, progress.step, progress.steps)),
    )
    parts = list(dict.fromkeys(part for part, step, _ in told if step is not None))
    assert parts == [
        "Panels 1 to 2 (finding who is where)",
        "Panels 1 to 2",
        "Panel 3 (finding who is where)",
        "Panel 3",
    ]
    assert [(step, steps) for _, step, steps in told if step is not None] == [(i, 8) for i in range(1, 9)]


def test_a_model_is_loaded_once_for_pictures_and_stories(session, monkeypatch, sd):
    loads = []
    monkeypatch.setattr(image_job, "load", lambda model, dtype=None: loads.append(model) or sd)
    first = made_by(session, form())
    made_by(session, fill_story_form(first.script, [MODEL]))  # says float32, which it was
    other = Session(session.worker)
    views = list(make_image(other, {}, [MODEL], lambda form, models: TWO.recipe("a cat")))
    assert views[-1].tone == "good"
    assert loads == [MODEL]


def test_panels_are_shown_large_with_places_and_the_corner_clicked(session):
    made = made_by(session, form())
    plain, shown = made.panel(0), panel_picture(made, 0)
    assert plain.size == shown.size == (640, 480)
    edge = np.asarray(shown)[300, 320:326].astype(int)
    assert (np.abs(edge - np.array(COLOURS[1])).max(-1) == 0).any()  # Rex's frame, second colour
    moved = panel_picture(made, 0, [["1", "Rex", "0, 0, 0.25, 1"], ["2", "Rex", "mask"]])
    assert np.array_equal(np.asarray(moved)[:, 400:600], np.asarray(plain)[:, 400:600])
    marked = panel_picture(made, 1, None, (50, 60))
    assert np.asarray(marked)[60, 50].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="four numbers"):
        panel_picture(made, 0, [["1", "Rex", "0, 0"]])
    assert strip_picture(made, False) == made.strip_file
    assert strip_picture(made, True).size == (2 * 320 + 4, 240)
    masked = replace(made, places={0: (Place(subject="Tom", mask=pack_mask(torch.eye(2, dtype=torch.bool)[:1])),)})
    assert found_places(masked, []) == [["1", "Tom", "0, 0, 0.5, 1"]]
    assert not np.array_equal(np.asarray(panel_picture(masked, 0)), np.asarray(plain))


def test_facts_and_files_are_told(session):
    made = made_by(session, form())
    assert story_words(made).startswith("tiny, 32 × 24, 2 steps, guidance 7.5, seed 1; seeds of the panels ")
    assert made.where == made.folder.name == "a-cat-and-a-dog-a"
    assert list(made.own) == ["Rex"]
    assert Image.open(made.own["Rex"]).size == (32, 24)
