"""The form of the story tab: tables to a story and back, and what is kept that it has no field for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from reattend.attn_processors.ops.regions import pack_mask
from reattend.pipelines import Panel, Script, Subject
from reattend.ui.story_form import (
    START,
    box_text,
    fill_story_form,
    kept_words,
    people,
    places_in,
    read_story_form,
    with_place,
)

MODEL = "tiny"
EXAMPLE = Path(__file__).parents[2] / "examples" / "story.json"


def story_form(**changes):
    """The tab's form as it stands when the page opens, with changes."""
    return fill_story_form(replace(START, model=MODEL), [MODEL]) | {"kept": ""} | changes


def made() -> Script:
    """A story as it comes back when it was made: every seed and number filled in."""
    import torch

    mask = pack_mask(torch.eye(8, dtype=torch.bool))
    return Script(
        subjects=(
            Subject(name="Tom", phrase="cat", looks="blue cat", prompt="a blue cat", seed=11, found=[0.25, 0, 0.5, 1]),
            Subject(name="Rex", phrase="dog", prompt="a red dog", seed=12, place=[0, 0, 1, 1]),
            Subject(name="Fly", phrase="bird", seed=13, place={"mask": mask}),
        ),
        panels=(
            Panel(prompt="a cat and a dog", seed=21, places={"Tom": None, "Rex": [0.5, 0, 1, 0.123456789]},
                  found={"Tom": [0, 0.1, 0.2, 0.3]}),
            Panel(prompt="a cat and a dog", seed=22, places={"Rex": {"mask": mask}}),
            Panel(prompt="nobody", seed=23, places={"Fly": [0, 0, 1, 1]}),
        ),
        negative="fog", model=MODEL, width=64, height=32, steps=7, guidance=2.5, seed=9007199254740993, dtype="float32",
        attention=({"name": "agent", "levels": 1},), strength=0.75, consistency={"isolate": [0, 0.8]}, together=2,
        bank=10**6,
    )  # fmt: skip


def test_the_untouched_form_asks_for_the_story_it_shows():
    assert read_story_form(story_form(), [MODEL]) == replace(START, model=MODEL)


@pytest.mark.parametrize("script", [made(), replace(Script.read(EXAMPLE), model=MODEL)], ids=["made", "example"])
def test_a_story_that_fills_the_form_is_asked_for_to_the_last_digit(script):
    form = json.loads(json.dumps(fill_story_form(script, [MODEL])))  # as the browser sends it back
    again = read_story_form(form, [MODEL])
    places = [script.present(panel) for panel in script.panels]
    assert [again.present(panel) for panel in again.panels] == places
    alike = [tuple(replace(panel, places=None) for panel in each.panels) for each in (again, script)]
    assert alike[0] == alike[1]
    assert replace(again, panels=script.panels) == replace(script, made_with={})


def test_masks_and_left_out_characters_show_in_the_table():
    rows = fill_story_form(made(), [MODEL])["places"]
    assert rows == [
        ["own", "Rex", "0, 0, 1, 1"],
        ["own", "Fly", "mask"],
        ["1", "Rex", "0.5, 0, 1, 0.123456789"],
        ["2", "Rex", "mask"],
        ["2", "Tom", "not here"],
        ["3", "Fly", "0, 0, 1, 1"],
    ]
    assert kept_words(made()).startswith("agent attention for other layers; a bank of references of at most 1,000,000")
    assert kept_words(START) == ""


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, (True, True)),
        ({"strength": 0.1}, (True, True)),
        ({"steps": 8}, (False, False)),
        ({"width": ""}, (False, False)),
        ({"negative": ""}, (False, False)),
        ({"panels": [["a cat and a dog", "20"]]}, (True, False)),
        ({"panels": [["a cat or a dog", "21"]]}, (True, False)),
        ({"panels": [["a cat and a dog", "21"], ["a cat", ""]]}, (True, True)),
        ({"characters": [["Tom", "cat", "", "a red cat", "11"], ["Rex", "dog", "", "a red dog", "12"]]}, (False, True)),
        (
            {"characters": [["Tom", "dog", "", "a blue cat", "11"], ["Rex", "dog", "", "a red dog", "12"]]},
            (False, False),
        ),
    ],
)
def test_what_a_rehearsal_found_is_kept_as_long_as_it_would_find_it_again(changes, kept):
    script = replace(made(), panels=made().panels[:1], subjects=made().subjects[:2])
    again = read_story_form(fill_story_form(script, [MODEL]) | changes, [MODEL])
    assert (again.subjects[0].found is not None, again.panels[0].found is not None) == kept


def test_a_picture_belongs_to_its_character_and_what_was_found_in_a_drawn_one_is_forgotten():
    script = replace(made(), subjects=made().subjects[:2], panels=made().panels[:1])
    form = fill_story_form(script, [MODEL])
    given = read_story_form(form | {"pictures": {"Tom": __file__}}, [MODEL])
    assert [(one.picture, one.found) for one in given.subjects] == [(__file__, None), (None, None)]
    form = fill_story_form(given, [MODEL])
    assert form["pictures"] == {"Tom": __file__}
    assert read_story_form(form, [MODEL]).subjects == given.subjects
    rows = [["Tom", "", "", ""], ["", "", "", ""], [" Rex", "", "", ""]]
    assert people(rows, {"Old": "x", "Tom": "y"}) == ["Tom", "Rex", "Old"]


def test_a_new_character_in_a_caption_is_looked_for():
    panel = replace(made().panels[0], places={"Tom": None})
    script = replace(made(), panels=(panel,), subjects=made().subjects[:1])
    form = fill_story_form(script, [MODEL])
    assert read_story_form(form, [MODEL]).panels[0].found is not None
    form["characters"].append(["Rex", "dog", "", "", ""])
    assert read_story_form(form, [MODEL]).panels[0].found is None


def test_empty_rows_and_cells_count_for_nothing():
    form = story_form(
        characters=[["", None, "", ""], [" Tom ", "", "", ""]],
        panels=[["a Tom", ""], [None, ""], ["Tom", "5"]],
        places=[[]],
    )
    script = read_story_form(form, [MODEL])
    assert script.subjects == (Subject(name="Tom"),)
    assert script.panels == (Panel(prompt="a Tom"), Panel(prompt="Tom", seed=5))


def test_places_are_read_as_people_write_them():
    rows = [
        ["Panel 1", "Flora", "(0.1 0.2; 0.5, 1)"],
        ["own", "Hill", "0,0,1,.5"],
        ["02", "Hill", "Not here"],
        ["3", "Hill", ""],
    ]
    script = read_story_form(story_form(places=rows), [MODEL])
    assert [panel.places for panel in script.panels] == [
        {"Flora": [0.1, 0.2, 0.5, 1.0], "Hill": None}, {"Flora": None}, {"Flora": None, "Hill": None},
    ]  # fmt: skip
    assert script.subjects[1].place == [0, 0, 1, 0.5]


def test_a_place_is_put_into_the_table_and_taken_out_again():
    rows = with_place(
        [["3", "Hill", "x"], ["", "", ""], ["own", "Hill", "y"]], 1, "Flora", box_text((0, 1 / 3, 0.5, 1))
    )
    assert rows == [["own", "Hill", "y"], ["2", "Flora", "0, 0.333, 0.5, 1"], ["3", "Hill", "x"]]
    assert with_place(rows, 1, "Flora", "z")[1] == ["2", "Flora", "z"]
    assert with_place(rows, 1, "Flora", None) == [rows[0], rows[2]]
    assert places_in(rows)["2", "Flora"] == "0, 0.333, 0.5, 1"
    typed = [["03", "Hill", "x"], ["Panel 2", "Flora", "y"], ["Own", "Hill", "y"]]
    assert with_place(typed, 1, "Flora", "z") == [typed[2], ["2", "Flora", "z"], typed[0]]
    assert with_place(typed, 2, "Hill", None) == [typed[2], typed[1]]
    assert with_place(typed, "own", "Hill", "w") == [["own", "Hill", "w"], typed[1], typed[0]]


BAD = {
    "does not offer the model": {"model": "/etc"},
    "at least one subject": {"characters": [["", "", "", "", ""]]},
    "1 to 1000 panels": {"panels": []},
    "Row 1 of the characters has no name": {"characters": [["", "cat", "", "", ""]]},
    "two subjects are called 'Tom'": {"characters": [["Tom", "", "", "", ""], ["Tom", "", "", "", ""]]},
    "Panel 2 has no caption": {"panels": [["a cat", ""], ["", "3"]]},
    "seed of panel 1 must be a whole number": {"panels": [["a cat", "x"]]},
    "seed of 'Tom' must be a whole number": {"characters": [["Tom", "", "", "", "1.5"]]},
    "must be a whole number, got 'wide'": {"width": "wide"},
    "steps must be a whole number": {"steps": None},
    "says no panel or not who": {"places": [["", "Flora", "0 0 1 1"]]},
    "given twice": {"places": [["1", "Flora", ""], ["panel 1", "Flora", ""]]},
    "who is no character": {"places": [["1", "Bob", ""]]},
    "name the panel '4'": {"places": [["4", "Flora", ""]]},
    "name the panel 'x'": {"places": [["x", "Flora", ""]]},
    "must be four numbers": {"places": [["1", "Flora", "0 0 1"]]},
    "got 'left'": {"places": [["1", "Flora", "left"]]},
    "is in pixels": {"places": [["1", "Flora", "0 0 128 128"]]},
    "is turned around": {"places": [["1", "Flora", "1 0 0 1"]]},
    "edges that are no numbers": {"places": [["1", "Flora", "nan 0 1 1"]]},
    "There is no mask of 'Flora' to keep": {"places": [["1", "Flora", "mask"]]},
    "There is a picture for 'Bob', who is no character": {"pictures": {"Bob": __file__}},
    "picture for 'Hill' is no longer there": {"pictures": {"Hill": "/nowhere.png"}},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence(words):
    with pytest.raises((ValueError, TypeError), match=words) as problem:
        read_story_form(story_form(**BAD[words]), [MODEL])
    assert "\n" not in str(problem.value)
