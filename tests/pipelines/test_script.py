"""Stories as JSON: what people write, what is filled in, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reattend.attn_processors.ops.regions import unpack_mask
from reattend.pipelines import Panel, Script, Subject
from reattend.pipelines.files import opened

EXAMPLE = Path(__file__).parents[2] / "examples" / "story.json"
CAT = {"name": "Tom", "phrase": "cat", "prompt": "a blue cat on snow"}
SHORT = {"subjects": [CAT], "panels": [{"prompt": "a cat on sand"}]}


def test_a_story_survives_json():
    script = Script.from_json(json.dumps(SHORT))
    assert Script.from_json(script.to_json()) == script
    assert script.subjects[0] == Subject(**CAT)
    assert script.panels == (Panel(prompt="a cat on sand"),)


def test_subjects_may_be_an_object_and_words_fall_back_on_the_name():
    script = Script.from_json(json.dumps({"subjects": {"cat": "a blue cat", "dog": {}}, "panels": [{"prompt": "x"}]}))
    assert [(one.name, one.phrase, one.drawn) for one in script.subjects] == [
        ("cat", "cat", "a blue cat"), ("dog", "dog", "dog"),
    ]  # fmt: skip


def test_the_example_can_be_read():
    script = Script.read(EXAMPLE)
    assert len(script.subjects) == 2 and len(script.panels) == 3


def test_panels_are_made_in_groups_that_do_not_depend_on_what_is_asked_for():
    script = Script(subjects=(Subject(name="cat"),), panels=tuple(Panel(prompt=str(i)) for i in range(5)), together=2)
    assert [list(script.group(i)) for i in range(5)] == [[0, 1], [0, 1], [2, 3], [2, 3], [4]]


def test_a_new_seed_or_prompt_forgets_where_subjects_were_found():
    script = Script.from_json(json.dumps(SHORT)).with_panel(0, found={"Tom": [0, 0, 1, 1]})
    assert script.panels[0].found is not None
    assert script.with_panel(0, seed=3).panels[0].found is None
    assert script.with_panel(0, prompt="a cat").panels[0].found is None


def test_a_new_prompt_forgets_who_was_in_the_old_one_unless_a_place_is_given():
    script = Script.from_json(json.dumps(SHORT)).with_panel(0, places={"Tom": None})
    assert script.with_panel(0, prompt="sand").panels[0].places is None
    assert script.with_panel(0, seed=3).panels[0].places == {"Tom": None}
    placed = {"Tom": [0, 0, 1, 1]}
    assert script.with_panel(0, places=placed).with_panel(0, prompt="a cat").panels[0].places == placed


def test_mask_and_picture_files_are_found_beside_the_story(tmp_path):
    mask = np.zeros((600, 300), np.uint8)
    mask[:300] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "tom.png")
    story = {
        "subjects": [CAT | {"picture": "tom.png"}],
        "panels": [{"prompt": "a cat", "places": {"Tom": {"mask": "mask.png"}}}],
    }
    (tmp_path / "story.json").write_text(json.dumps(story))
    script = Script.read(tmp_path / "story.json")
    assert script.subjects[0].picture == str(tmp_path / "tom.png")
    kept = unpack_mask(script.panels[0].places["Tom"]["mask"])
    assert kept.shape == (256, 128) and kept[:128].all() and not kept[128:].any()


@pytest.mark.parametrize("name", ["../secret.png", "/secret.png", "link.png", "\ud800.png"])
@pytest.mark.parametrize("part", ["picture", "mask"])
def test_files_elsewhere_are_not_read(tmp_path, name, part):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    folder = tmp_path / "tale"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    name = name if name[0] != "/" else str(tmp_path) + name
    more = {"picture": name} if part == "picture" else {"place": {"mask": name}}
    (folder / "story.json").write_text(json.dumps(SHORT | {"subjects": [CAT | more]}))
    with pytest.raises(ValueError, match="story.json: .*(lies outside|surrogates)"):
        Script.read(folder / "story.json")


def test_only_usual_picture_formats_are_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "m.bmp")
    story = SHORT | {"subjects": [CAT | {"place": {"mask": "m.bmp"}}]}
    (tmp_path / "story.json").write_text(json.dumps(story))
    with pytest.raises(ValueError, match="it is no picture that can be read"):
        Script.read(tmp_path / "story.json")
    with pytest.raises(ValueError, match="it is no picture that can be read"):
        opened(str(tmp_path / "m.bmp"))


BAD = {
    "not JSON": "{",
    "need a JSON object": "[]",
    '"format"': json.dumps({"format": "other"}),
    "format version 9": json.dumps(SHORT | {"version": 9}),
    "list of panels": json.dumps({"subjects": [CAT]}),
    "list of subjects": json.dumps({"panels": []}),
    "unknown entries colour": json.dumps({"subjects": [CAT | {"colour": 1}], "panels": []}),
    "lacks 'prompt'": json.dumps({"subjects": [CAT], "panels": [{}]}),
    "unknown entries stepz": json.dumps(SHORT | {"stepz": 2}),
    "need JSON objects": json.dumps({"subjects": [CAT], "panels": ["a cat"]}),
    "at least one subject": json.dumps({"subjects": [], "panels": [{"prompt": "a cat"}]}),
    "1 to 1000 panels, got 0": json.dumps({"subjects": [CAT], "panels": []}),
    "two subjects are called 'Tom'": json.dumps({"subjects": [CAT, CAT], "panels": [{"prompt": "a cat"}]}),
    "places 'Bob', who is no subject": json.dumps(
        {"subjects": [CAT], "panels": [{"prompt": "a cat", "places": {"Bob": None}}]}
    ),
    "panel has no prompt": json.dumps({"subjects": [CAT], "panels": [{"prompt": " "}]}),
    "subject has no name": json.dumps({"subjects": [{"name": ""}], "panels": [{"prompt": "a cat"}]}),
    "strength is out of range": json.dumps(SHORT | {"strength": 2}),
    "together is out of range": json.dumps(SHORT | {"together": 0}),
    "bank is out of range": json.dumps(SHORT | {"bank": 0}),
    "steps is out of range": json.dumps(SHORT | {"steps": 0}),
    "the story itself does": json.dumps(SHORT | {"consistency": {"panels": []}}),
    "has no setting 'speed'": json.dumps(SHORT | {"consistency": {"speed": 1}}),
    "seed of a panel is out of range": json.dumps({"subjects": [CAT], "panels": [{"prompt": "x", "seed": 10**400}]}),
    "guidance is out of range": json.dumps(SHORT | {"guidance": 10**400}),
    "found of a panel must map": json.dumps({"subjects": [CAT], "panels": [{"prompt": "a cat", "found": [1]}]}),
    "unknown attention": json.dumps(SHORT | {"attention": [{"name": "fast"}]}),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_stories_are_one_sentence(words):
    with pytest.raises((ValueError, TypeError), match=words) as problem:
        Script.from_json(BAD[words])
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.json", None, "cannot read the story"),
        ("bytes.json", b"\xff\xfe\x00", "it is no text"),
        ("mask.json", b"mask", "cannot read the mask"),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(tmp_path, name, content, words):
    if content == b"mask":
        (tmp_path / "m.png").write_bytes(b"no picture")
        content = json.dumps(
            {"subjects": [CAT], "panels": [{"prompt": "a cat", "places": {"Tom": {"mask": "m.png"}}}]}
        ).encode()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        Script.read(tmp_path / name)


def test_a_strength_of_a_script_is_checked_when_it_is_replaced():
    with pytest.raises(ValueError, match="strength"):
        replace(Script.from_json(json.dumps(SHORT)), strength=-1.0)
