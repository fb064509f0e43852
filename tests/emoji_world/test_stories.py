"""The comparison of stories: what is asked of a panel, and that a run goes on where it was."""

from __future__ import annotations

import json

import pytest
import torch

from reattend.emoji_world import stories
from reattend.emoji_world.read import Found, Reading
from reattend.emoji_world.sampled_tokens import SampledTokens
from reattend.emoji_world.stories import ARMS, compare, table
from reattend.emoji_world.tales import Tale, judge, sample_tales, tint_of
from reattend.emoji_world.world import TINTS, parse_caption
from reattend.pipelines import load

TALE = Tale((("dog", "purple"), ("fish", "green")), ("sand", "snow", "grass"), "sea", 0)
TWINS = Tale((("cat", "red"), ("cat", "blue")), ("sand", "snow", "grass"), "sea", 0)


def thing(kind, tint, x, y=0.5):
    return Found(kind, tint, (x - 0.2, y - 0.2, x + 0.2, y + 0.2), 0.9)


def judged(tale, tints, *sprites, background="sand"):
    panel = Reading(background, tuple(sprites))
    return judge(tale, tints, [panel], [[(0.25, 0.5), (0.75, 0.5)]])


def test_captions_name_no_tint_and_tints_of_a_story_differ():
    tales = sample_tales(0, 60, 30)
    assert tales == sample_tales(0, 60, 30) and len({tale.seed for tale in tales}) == 90
    assert [len(tale.characters) for tale in tales] == [2] * 60 + [3] * 30
    assert any(len({kind for kind, _ in tale.characters}) < len(tale.characters) for tale in tales)
    for tale in tales:
        assert len({tint for _, tint in tale.characters}) == len(tale.characters)
        for panel in range(3):
            clauses, background = parse_caption(tale.caption(panel))
            assert all(clause.tint is None for clause in clauses) and background == tale.backgrounds[panel]
        script = tale.script(10)
        assert all(any(tint in one.prompt for tint in TINTS) for one in script.subjects)


def test_a_right_panel_has_everything():
    found = judged(TALE, ["purple", "green"], thing("dog", "purple", 0.25), thing("fish", "green", 0.75))
    assert {name: tuple(found[name]) for name in ("tint kept", "present", "swapped", "fused", "kinds", "background")} == {
        "tint kept": (2, 2), "present": (2, 2), "swapped": (0, 2), "fused": (0, 1), "kinds": (1, 1), "background": (1, 1),
    }  # fmt: skip


def test_swapped_missing_and_unknown_things_are_counted():
    swapped = judged(TALE, ["purple", "green"], thing("dog", "green", 0.25), thing("fish", "purple", 0.75))
    assert swapped["swapped"] == [2, 2] and swapped["tint kept"] == [0, 2]
    other = judged(TALE, ["purple", "green"], thing("dog", "red", 0.25), thing("fish", "green", 0.75))
    assert other["swapped"] == [0, 2] and other["tint kept"] == [1, 2]
    missing = judged(TALE, ["purple", "green"], thing("dog", "purple", 0.25), background="sea")
    assert missing["present"] == [1, 2] and missing["fused"] == [1, 1] and missing["background"] == [0, 1]
    unknown = judged(TALE, ["purple", "green"], thing("dog", "purple", 0.25), thing(None, None, 0.75))
    assert unknown["fused"] == [1, 1] and unknown["kinds"] == [0, 1]


def test_of_two_of_a_kind_places_say_who_is_who():
    right = judged(TWINS, ["red", "blue"], thing("cat", "red", 0.3), thing("cat", "blue", 0.7))
    assert right["tint kept"] == [2, 2]
    turned = judged(TWINS, ["red", "blue"], thing("cat", "blue", 0.3), thing("cat", "red", 0.7))
    assert turned["swapped"] == [2, 2]
    one = judged(TWINS, ["red", "blue"], thing("cat", "blue", 0.7))
    assert one["present"] == [1, 2] and one["tint kept"] == [1, 1]


def test_moves_are_distances_between_panels():
    panels = [Reading("sand", (thing("dog", "purple", x),)) for x in (0.2, 0.5, 0.8)]
    found = judge(TALE, ["purple", "green"], panels, [[None, None]] * 3)
    assert found["moves"] == pytest.approx([0.3, 0.6, 0.3])


def test_the_tint_of_a_character_is_that_of_its_reference_picture():
    assert tint_of(("dog", "purple"), Reading("sea", (thing("dog", "pink", 0.5),))) == "pink"
    assert tint_of(("dog", "purple"), Reading("sea", (thing("cat", "pink", 0.5),))) == "purple"


@pytest.fixture(scope="module")
def model():
    return load("tiny-sd")


def test_a_comparison_goes_on_where_it_was_and_says_the_same(model, tmp_path, monkeypatch):
    settings = {"pairs": 1, "triples": 0, "steps": 2, "arms": ["stock", "all", "sampled tokens"], "out": tmp_path}
    first = compare(model, **settings)
    assert set(first["arms"]) == {"stock", "all", "sampled tokens"}
    assert (tmp_path / "all-1.png").exists()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])  # interrupted in the last line
    again = compare(model, **settings)
    assert again["arms"] == first["arms"]
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines

    def none(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(stories, "story", none)
    assert compare(model, **settings)["arms"] == first["arms"]
    assert "| all | 1 |" in table(json.loads((tmp_path / "summary.json").read_text()))
    with pytest.raises(ValueError, match="steps differ"):
        compare(model, **settings | {"steps": 3})
    monkeypatch.setattr(stories, "USUAL", {"text_mix": 0.9})  # what the arm "all" means
    with pytest.raises(ValueError, match="usual differ"):
        compare(model, **settings)


def test_bad_comparisons_are_one_sentence(model, tmp_path):
    with pytest.raises(ValueError, match="no arm 'fast'; there are stock"):
        compare(model, out=tmp_path, arms=["fast"])
    with pytest.raises(ValueError, match="at least one story"):
        compare(model, out=tmp_path, pairs=0, triples=0)


def test_every_arm_has_settings_the_processor_knows():
    from reattend.attn_processors import IsolationRepositionAttnProcessor

    for settings in ARMS.values():
        if settings is not None:
            IsolationRepositionAttnProcessor.from_settings(settings)


def test_sampled_tokens_of_one_picture_alone_are_stock(unet):
    import tiny

    from reattend.attn_processors import installed

    want = tiny.denoise(unet, batch=2)  # two branches of one picture: nobody else to see
    with installed(unet, SampledTokens()):
        torch.testing.assert_close(tiny.denoise(unet, batch=2), want, atol=1e-5, rtol=0)
    sample = tiny.denoise(unet, batch=4)
    with installed(unet, SampledTokens()):
        assert not torch.allclose(tiny.denoise(unet, batch=4), sample, atol=1e-3)


def test_arms_without_own_words_are_without_them_in_joint_layers(flux, monkeypatch):
    seen = {}

    def watched(script, **_):
        seen[arm] = script
        raise StopIteration

    tale = sample_tales(0, 1, 0)[0]
    monkeypatch.setattr(stories, "story", watched)
    for arm, settings in ARMS.items():
        if settings is not None:
            with pytest.raises(StopIteration):
                stories._story(flux, tale.script(2), arm)
    assert {arm for arm, script in seen.items() if script.consistency.get("text_mix") != 0.0} == {"own words", "all"}
    assert all(one.looks and one.looks not in seen["all"].panels[0].prompt for one in seen["all"].subjects)


def test_sampled_tokens_are_left_out_where_there_is_no_unet(tmp_path):
    settings = {"pairs": 1, "triples": 0, "steps": 1, "arms": ["sampled tokens"], "out": tmp_path}
    assert set(compare("tiny-flux", **settings)["arms"]) == {"stock"}
