"""What a script leaves open, filled in: seeds that do not depend on each other, and who is where."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reattend.attn_processors import Place
from reattend.pipelines import Panel, Script, Subject
from reattend.pipelines.masks import text_tokens, words_of
from reattend.pipelines.placing import filled_in_story, panel_places, reference_place

LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
TWO = Script(
    subjects=(Subject(name="Tom", phrase="cat", prompt="a blue cat"), Subject(name="Rex", phrase="dog", prompt="a pet")),
    panels=(Panel(prompt="a cat and a dog"), Panel(prompt="a dog alone")),
    seed=1,
)  # fmt: skip


def test_what_is_open_is_filled_in_and_one_more_changes_no_other(sd):
    filled = filled_in_story(TWO, sd)
    assert filled.width == filled.height == sd.unet.config.sample_size * sd.vae_scale_factor
    assert [panel.places for panel in filled.panels] == [{"Tom": None, "Rex": None}, {"Rex": None}]
    seeds = [one.seed for one in (*filled.subjects, *filled.panels)]
    assert len(set(seeds)) == 4 and None not in seeds
    more = filled_in_story(
        replace(TWO, subjects=(*TWO.subjects, Subject(name="Fly")), panels=(*TWO.panels, Panel(prompt="Fly"))), sd
    )
    assert (more.subjects[:2], more.panels[:2]) == (filled.subjects, filled.panels)
    assert filled_in_story(filled, sd) == filled


def test_a_place_is_given_or_found_or_meant_by_words(sd):
    script = filled_in_story(
        replace(TWO, panels=(Panel(prompt="a cat and a dog", places={"Tom": LEFT, "Rex": None}),)), sd
    )
    words = words_of(sd, "a cat and a dog", "dog")
    assert panel_places(sd, script, 0) == (
        (Place(subject="Tom", box=tuple(LEFT)), Place(subject="Rex", words=words)),
        [],
    )
    for found, place in ((RIGHT, [Place(subject="Rex", box=tuple(RIGHT))]), (None, [])):
        known = replace(script, panels=(replace(script.panels[0], found={"Rex": found}),))
        places, lost = panel_places(sd, known, 0)
        assert list(places) == [Place(subject="Tom", box=tuple(LEFT)), *place]
        assert lost == ([] if place else ["not found: 'Rex' in panel 1 (nowhere in the rehearsal)"])


def test_in_flux_the_other_words_are_the_background(flux):
    script = filled_in_story(TWO, flux)
    places, _ = panel_places(flux, script, 1)
    assert [place.subject for place in places] == ["Rex", ""]
    words = [word for place in places for word in place.words]
    assert sorted(words) == list(range(text_tokens(flux, "a dog alone")))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"place": LEFT, "found": RIGHT}, Place(subject="Tom", box=tuple(LEFT))),
        ({"found": RIGHT}, Place(subject="Tom", box=tuple(RIGHT))),
        ({"prompt": "a pet"}, Place(subject="Tom")),
        ({"prompt": "a pet", "found": RIGHT, "picture": "tom.png"}, Place(subject="Tom")),
    ],
)
def test_a_reference_is_where_it_was_put_or_found_or_fills_its_picture(sd, changes, place):
    assert reference_place(sd, replace(TWO.subjects[0], **changes)) == place


def test_a_reference_is_found_by_its_phrase_in_its_own_prompt(sd):
    assert reference_place(sd, TWO.subjects[0]).words == words_of(sd, "a blue cat", "cat")
