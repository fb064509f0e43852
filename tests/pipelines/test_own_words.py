"""Captions as subjects read them, and a subject that fills the panel: then its own caption is the picture's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from reattend.attn_processors import Place
from reattend.pipelines import Panel, Script, Subject, story
from reattend.pipelines.own_words import check_captions, encoded, own_caption, panel_prompt

CAT, DOG = (
    Subject(name="Tom", phrase="cat", looks="orange cat"),
    Subject(name="Rex", phrase="dog", looks="dog in a red hat"),
)
ANOTHER = Subject(name="Tim", phrase="Cat", looks="blue cat")


@pytest.mark.parametrize(
    ("caption", "who", "own"),
    [
        ("a cat and a dog", CAT, "an orange cat and a dog"),
        ("a cat and a dog", DOG, "a cat and a dog in a red hat"),
        ("the cat, concatenated", CAT, "the orange cat, concatenated"),
        ("A cat", CAT, "An orange cat"),
        ("a cat and a cat", CAT, "an orange cat and a cat"),
        ("a cat and a cat", ANOTHER, "a cat and a blue cat"),
        ("two at sea: a cat", ANOTHER, "two at sea: a blue cat"),  # one word for two
        ("a boat", CAT, "orange cat, a boat"),
        ("a cat", Subject(name="Tom", phrase="cat"), ""),
        ("a cat", Subject(name="Tom", phrase="cat", looks="a red cat"), "a red cat"),
        ("The cat", Subject(name="Tom", phrase="cat", looks="an old cat"), "The old cat"),
        ("cat", Subject(name="Tom", phrase="cat", looks="a red cat"), "a red cat"),
        ("a cat lady and a cat", CAT, "a cat lady and an orange cat"),
        ("a cat lady", CAT, "orange cat, a cat lady"),
    ],
)
def test_only_the_subject_itself_is_described(caption, who, own):
    lady = Subject(name="Ann", phrase="cat lady")
    subjects = {one.name: one for one in (CAT, DOG, ANOTHER, lady)} | {who.name: who}
    script = Script(subjects=tuple(subjects.values()), panels=(Panel(prompt=caption),))
    assert own_caption(script, 0, who) == own


@pytest.mark.parametrize(
    ("caption", "placed", "told"),
    [
        ("a dog and a cat on sea", (), "a dog in a red hat and an orange cat on sea"),
        ("a dog and a cat on sea", ("Tom",), "a dog in a red hat and a cat on sea"),
        ("a dog and a cat on sea", ("Tom", "Rex"), "a dog and a cat on sea"),
        ("a cat and a cat", ("Rex",), "an orange cat and a blue cat"),
        ("a cat", ("Rex",), "blue cat, an orange cat"),  # one word for two
        ("a boat", ("Tim", "Rex"), "orange cat, a boat"),
    ],
)
def test_those_without_a_place_are_told_to_the_whole_panel(sd, caption, placed, told):
    there = (CAT, DOG) if "dog" in caption else (CAT, DOG, ANOTHER)
    script = Script(subjects=there, panels=(Panel(prompt=caption, places={one.name: None for one in there}),))
    assert panel_prompt(sd, script, 0, [Place(subject=name) for name in placed]) == told
    plain = replace(script, subjects=tuple(replace(one, looks="", prompt="a cat") for one in there))
    assert panel_prompt(sd, plain, 0, []) == caption


def test_a_subject_that_nobody_found_is_drawn_as_it_looks(sd):
    script = Script(subjects=(CAT,), panels=(Panel(prompt="a cat on sea", seed=3, places={"Tom": None}),), steps=2)
    made = story(script, pipe=sd, find=lambda picture, phrases: [None])
    told = Panel(prompt="an orange cat on sea", seed=3, places={})
    stock = story(Script(subjects=(Subject(name="-"),), panels=(told,), steps=2), pipe=sd)
    assert np.array_equal(made.panels[0], stock.panels[0])
    untold = story(replace(script, consistency={"text_mix": 0}), pipe=sd, find=lambda picture, phrases: [None])
    assert not np.array_equal(untold.panels[0], stock.panels[0])


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_text_is_what_the_pipeline_gives_its_denoiser(name, request):
    pipe = request.getfixturevalue(name)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    try:
        tiny.run(pipe, prompt="an orange cat", num_inference_steps=1)
    finally:
        hook.remove()
    texts = encoded(pipe, ["an orange cat", "a dog", "an orange cat"])
    assert set(texts) == {"an orange cat", "a dog"}
    assert torch.equal(texts["an orange cat"], seen[0][-1])  # the branch with the prompt


def test_a_subject_that_fills_the_panel_gives_the_picture_of_its_own_caption(sd):
    panel = Panel(prompt="a cat on sea", seed=3, places={"Tom": [0, 0, 1, 1]})
    made = story(Script(subjects=(CAT,), panels=(panel,), steps=3, seed=1), pipe=sd)
    stock = story(
        Script(
            subjects=(Subject(name="-"),), panels=(Panel(prompt="an orange cat on sea", seed=3, places={}),), steps=3
        ),
        pipe=sd,
    )
    assert made.references == {}  # how it looks does without
    got, want = (np.asarray(one.panels[0], np.int16) for one in (made, stock))
    assert np.abs(got - want).max() <= 1  # out + (own - out) rounds
    plain = story(Script(subjects=(CAT,), panels=(panel,), steps=3, consistency={"text_mix": 0}), pipe=sd)
    assert np.abs(got - np.asarray(plain.panels[0], np.int16)).max() > 1


def test_a_reference_is_asked_for_by_a_prompt_or_for_want_of_looks():
    assert not CAT.has_reference
    assert Subject(name="cat").has_reference and Subject(name="cat").drawn == "cat"
    both = Subject(name="cat", looks="red cat", prompt="a red cat on sand")
    assert both.has_reference and both.drawn == "a red cat on sand"
    assert Subject(name="cat", looks="red cat", picture="cat.png").drawn == "red cat"


def test_where_text_is_in_joint_layers_captions_are_rows_of_the_call(flux):
    seen = []
    hook = flux.transformer.register_forward_pre_hook(
        lambda _, args, given: seen.append(len(given["hidden_states"])), with_kwargs=True
    )
    panels = (
        Panel(prompt="a cat and a dog", seed=3, places={"Tom": [0, 0, 0.5, 1], "Rex": [0.5, 0, 1, 1]}),
        Panel(prompt="a dog", seed=4, places={"Rex": None}),
    )
    rex = Subject(name="Rex", phrase="dog", looks="red dog", prompt="a red dog on sand")
    script = Script(subjects=(CAT, rex), panels=panels, steps=5, seed=1)
    try:
        made = story(script, pipe=flux)
    finally:
        hook.remove()
    assert seen == [4] * 5 + [3] * 5  # a reference of Rex, a caption for each subject, the panel
    assert set(made.references) == {"Rex"} and set(made.panels) == {0, 1}
    again = story(made.script, pipe=flux, only=[1])
    assert np.array_equal(again.panels[1], made.panels[1])
    plain = story(Script(subjects=(CAT, rex), panels=panels, steps=5, seed=1, consistency={"text_mix": 0}), pipe=flux)
    assert not np.array_equal(plain.panels[0], made.panels[0])


def test_panels_of_one_call_read_captions_in_their_own_noise(flux):
    def made(seeds: tuple[int, int]) -> np.ndarray:
        panels = tuple(Panel(prompt="a cat on sea", seed=seed, places={"Tom": [0, 0, 1, 1]}) for seed in seeds)
        script = Script(subjects=(CAT,), panels=panels, steps=2, seed=1, together=2)
        return np.asarray(story(script, pipe=flux).panels[0])

    assert np.array_equal(made((3, 4)), made((3, 5)))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_own_words_go_with_a_bank(name, request):
    pipe = request.getfixturevalue(name)
    rex = Subject(name="Rex", phrase="dog", looks="red dog", prompt="a red dog on sand", place=[0, 0, 1, 1])
    panel = Panel(prompt="a cat and a dog", seed=3, places={"Tom": [0, 0, 0.5, 1], "Rex": [0.5, 0, 1, 1]})
    script = Script(subjects=(CAT, rex), panels=(panel,), steps=2, seed=1)
    rows, bank = (
        np.asarray(story(one, pipe=pipe).panels[0], np.int16) for one in (script, replace(script, bank=10**9))
    )
    assert np.abs(rows - bank).max() <= 1


def test_captions_that_are_too_long_are_told_and_others_are_not_looked_at(sd):
    long = Subject(name="Z", phrase="zebra", looks="zebra " * 80)
    script = Script(
        subjects=(CAT, long), panels=(Panel(prompt="a cat", places={"Tom": [0, 0, 1, 1]}),), steps=1, seed=1
    )
    assert story(script, pipe=sd).panels
    with pytest.raises(ValueError, match="panel 1 as 'Z' reads it is too long"):
        story(replace(script, panels=(Panel(prompt="a zebra", places={"Z": [0, 0, 1, 1]}),)), pipe=sd)


def test_models_that_mask_padded_text_are_told(sd):
    class QwenImagePipeline:
        def __call__(self, prompt: str) -> None: ...

    script = Script(subjects=(CAT,), panels=(Panel(prompt="a cat"),))
    with pytest.raises(
        ValueError, match="QwenImagePipeline cannot read a caption for each subject; leave out how 'Tom'"
    ):
        check_captions(QwenImagePipeline(), script, [0])
