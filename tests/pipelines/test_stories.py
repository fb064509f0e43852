"""The story job on tiny random pipelines: which rows are made, what stays the same, and what is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageOps

from reattend.attn_processors import Place
from reattend.attn_processors.ops.regions import pack_mask, tight_box, unpack_mask
from reattend.pipelines import Cancelled, CancelToken, Panel, Script, Subject, story
from reattend.pipelines.masks import mask_picture, overlay, read_mask, text_tokens, words_of
from reattend.pipelines.references import encode, fitted, plan_bank
from reattend.pipelines.told import Story, strip

LEFT, RIGHT = [0, 0, 0.5, 1], [0.5, 0, 1, 1]
WHOLE = [0, 0, 1, 1]
TWO = Script(
    subjects=(
        Subject(name="Tom", phrase="cat", prompt="a blue cat", place=WHOLE),
        Subject(name="Rex", phrase="dog", prompt="a red dog", place=WHOLE),
    ),
    panels=tuple(Panel(prompt=f"a cat and a dog {where}", places={"Tom": LEFT, "Rex": RIGHT}) for where in "abc"),
    steps=2,
    width=32,
    height=32,
    seed=1,
)  # fmt: skip


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def close(a: Image.Image, b: Image.Image) -> bool:
    """Batches of other sizes round differently: at most one level of 255."""
    return bool(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1)


@pytest.fixture(scope="module")
def made() -> Any:
    return story(TWO, pipe=tiny.fresh(tiny.sd()))


def test_a_story_can_be_made_again_from_what_comes_back(made, sd):
    assert set(made.panels) == {0, 1, 2} and set(made.references) == {"Tom", "Rex"}
    script = made.script
    assert script.seed == 1 and script.guidance == 7.5 and len({panel.seed for panel in script.panels}) == 3
    again = story(Script.from_json(script.to_json()), pipe=sd)
    assert again.script == script
    assert all(same(again.panels[i], made.panels[i]) for i in range(3))


@pytest.mark.parametrize("together", [1, 2])
def test_one_panel_made_again_leaves_the_others_bit_for_bit(sd, together):
    whole = story(replace(TWO, together=together), pipe=sd)
    changed = whole.script.with_panel(1, seed=99)
    one = story(changed, pipe=sd, only=[1])
    assert set(one.panels) == {1} and not same(one.panels[1], whole.panels[1])
    again = story(changed, pipe=sd)
    assert same(again.panels[1], one.panels[1])
    assert same(again.panels[0], whole.panels[0]) and same(again.panels[2], whole.panels[2])


def test_panels_made_together_equal_those_made_alone(made, sd):
    together = story(replace(made.script, together=3), pipe=sd)
    assert all(close(together.panels[i], made.panels[i]) for i in range(3))


def test_a_panel_added_changes_no_other(made, sd):
    longer = replace(TWO, panels=(*TWO.panels, Panel(prompt="a cat", places={"Tom": LEFT})))
    again = story(longer, pipe=sd, only=[0, 3])
    assert same(again.panels[0], made.panels[0])


def test_references_are_what_the_stock_model_makes(made, sd):
    subject = made.script.subjects[0]
    generator = torch.Generator().manual_seed(subject.seed)
    stock = sd(subject.prompt, num_inference_steps=2, width=32, height=32, generator=generator).images[0]
    assert close(made.references["Tom"], stock)


def test_the_pipeline_is_left_as_it_was(sd):
    want = tiny.run(sd)
    story(TWO, pipe=sd, only=[0])
    assert torch.equal(tiny.run(sd), want)
    token = CancelToken()

    def stop(event: Any) -> None:
        token.request()

    with pytest.raises(Cancelled):
        story(TWO, pipe=sd, on_step=stop, cancel=token)
    assert torch.equal(tiny.run(sd), want)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sd.unet.modules())


def test_steps_count_over_all_calls(sd):
    events = []
    story(TWO, pipe=sd, on_step=events.append)
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert {event.steps for event in events} == {6}
    assert [event.clip for event in events] == [0, 0, 1, 1, 2, 2]
    assert events[-1].eta == pytest.approx(0)


def test_without_strength_and_isolation_panels_are_stock(sd):
    neutral = replace(TWO, strength=0.0, consistency={"isolate": None})
    panel = story(neutral, pipe=sd, only=[0])
    seed = panel.script.panels[0].seed
    generator = [torch.Generator().manual_seed(seed)]
    stock = sd([TWO.panels[0].prompt], num_inference_steps=2, width=32, height=32, generator=generator).images[0]
    assert same(panel.panels[0], stock)
    assert not panel.references


@pytest.mark.parametrize("family", ["sdxl", "flux", "sd3"])
def test_other_families_make_stories_too(family, request):
    pipe = request.getfixturevalue(family)
    made = story(TWO, pipe=pipe, only=[0])
    stock = story(replace(made.script, strength=0.0, consistency={"isolate": None}), pipe=pipe, only=[0])
    assert not same(made.panels[0], stock.panels[0])


# -- bank ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_bank_makes_the_same_panels_and_holds_what_was_said(family, request, made):
    pipe = request.getfixturevalue(family)
    rows = story(TWO, pipe=pipe, only=[0]) if family == "flux" else made
    banked = story(replace(TWO, bank=10**9), pipe=pipe, only=[0])
    assert close(banked.panels[0], rows.panels[0])
    assert close(banked.references["Tom"], rows.references["Tom"])
    plan, held = banked.report
    assert plan.startswith("bank of references: ")
    assert plan.split()[3] == held.split()[1]  # predicted == held
    assert "0 times nothing was kept" in held


def test_a_bank_gives_up_branch_layers_and_steps_before_it_refuses(sd):
    def said(limit: int) -> str:
        return story(replace(TWO, bank=limit, consistency={"branches": "both"}), pipe=sd, only=[0]).report[0]

    whole = int(said(10**9).split()[3].replace(",", ""))
    assert "prompt branch only" in said(whole - 1)
    assert "every second layer" in said(whole // 2 - 1)
    assert "every second step" in said(whole // 4 - 1000)
    events: list[Any] = []
    with pytest.raises(MemoryError, match="at least, 1,000 are allowed"):
        story(replace(TWO, bank=1000), pipe=sd, on_step=events.append)
    assert not events  # before the first step


def test_a_bank_beside_other_attention_holds_what_was_said(sd):
    agent = ({"name": "agent", "levels": 1},)
    plan, held = story(replace(TWO, bank=10**9, attention=agent), pipe=sd, only=[0]).report
    assert plan.split()[3] == held.split()[1]
    alone = story(replace(TWO, bank=10**9), pipe=sd, only=[0]).report[0]
    assert int(plan.split()[3].replace(",", "")) < int(alone.split()[3].replace(",", ""))


def test_text_that_subjects_read_is_held_in_the_bank(sd):
    def said(mix: float) -> list[int]:
        settings = {"branches": "cond", "text_mix": mix}
        plan, held = story(replace(TWO, bank=10**9, consistency=settings), pipe=sd, only=[0]).report
        return [int(line.split()[at].replace(",", "")) for line, at in ((plan, 3), (held, 1))]

    (plan, held), (without, _) = said(0.5), said(0.0)
    assert plan == held == without + 2 * 77 * tiny.TEXT_WIDTH * 4  # two references, the branch with the prompt


def test_smaller_boxes_make_smaller_banks(sd):
    from reattend.attn_processors import IsolationRepositionAttnProcessor, LayerInfo, Place

    layers = [LayerInfo(name="a", role="spatial", level=0, heads=2, width=8)]
    sizes = [
        plan_bank(
            IsolationRepositionAttnProcessor(references=(Place(subject="a", box=box),), source="record"), layers,
            [(4, 4)], steps=range(3), branches=2, item=4, limit=None,
        ).bytes
        for box in (None, (0, 0, 0.5, 0.5))
    ]  # fmt: skip
    assert sizes == [16 * 8 * 4 * 6, 4 * 8 * 4 * 6]


# -- references, masks, attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd3"])
def test_a_picture_of_ones_own_stays_in_its_row(family, request, tmp_path):
    pipe = request.getfixturevalue(family)
    picture = Image.fromarray((np.indices((32, 32)).sum(0)[..., None] * [4, 2, 1]).astype(np.uint8))
    picture.save(tmp_path / "tom.png")
    own = replace(TWO.subjects[0], picture=str(tmp_path / "tom.png"))
    made = story(replace(TWO, subjects=(own, TWO.subjects[1])), pipe=pipe, only=[0])
    with torch.no_grad():
        clean = encode(pipe, picture, (32, 32))
        vae = pipe.vae
        latents = clean / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        want = pipe.image_processor.postprocess(vae.decode(latents, return_dict=False)[0])[0]
    assert close(made.references["Tom"], want)


def test_a_picture_of_another_shape_is_cut_around_its_place():
    values = np.zeros((20, 80, 3), np.uint8)
    values[5:15, 50:60] = 255
    picture = Image.fromarray(values)

    def white(place: Place) -> tuple[list[float], Place]:
        cut, there = fitted(picture, place, (40, 40))
        rows, columns = np.nonzero(np.asarray(cut)[..., 0] > 127)
        return [edge / 40 for edge in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)], there

    seen, place = white(Place(subject="Tom", box=(50 / 80, 0.25, 60 / 80, 0.75)))
    assert seen == pytest.approx([0.25, 0.25, 0.75, 0.75], abs=0.03) and place.box == pytest.approx(seen, abs=0.03)
    seen, place = white(Place(subject="Tom", box=(50 / 80, 0.25, 1.0, 0.75)))  # wider than what is kept
    assert seen == pytest.approx([0.0, 0.25, 0.25, 0.75], abs=0.03) and place.box == pytest.approx((0, 0.25, 1, 0.75))
    mask = torch.from_numpy(values[::5, ::5, 0] > 127)
    seen, place = white(Place(subject="Tom", mask=pack_mask(mask)))
    assert place.mask is not None and tight_box(unpack_mask(place.mask)) == pytest.approx(seen, abs=0.03)
    cut, place = fitted(picture, Place(subject="Tom"), (40, 40))
    assert same(cut, ImageOps.fit(picture, (40, 40), Image.Resampling.LANCZOS)) and place == Place(subject="Tom")
    box = Place(subject="Tom", box=(0.1, 0.2, 0.3, 0.4))
    assert fitted(picture, box, (80, 20)) == (picture, box)


def test_a_picture_that_cannot_be_read_is_one_sentence(sd, tmp_path):
    own = replace(TWO.subjects[0], picture=str(tmp_path / "none.png"))
    with pytest.raises(ValueError, match="cannot read the reference picture"):
        story(replace(TWO, subjects=(own, TWO.subjects[1])), pipe=sd, only=[0])


def test_other_attention_takes_its_layers_and_leaves_the_rest(sd):
    made = story(replace(TWO, attention=({"name": "agent", "levels": 1},)), pipe=sd, only=[0])
    assert made.script.attention[0]["name"] == "agent"
    with pytest.raises(ValueError, match="agent takes all layers and leaves none"):
        story(replace(TWO, attention=({"name": "agent", "levels": 2},)), pipe=sd, only=[0])


def test_words_that_are_missing_or_alike_are_told(sd):
    lost = replace(TWO, panels=(Panel(prompt="a bird and a dog", places={"Tom": None, "Rex": RIGHT}),))
    with pytest.raises(ValueError, match="'cat' is not in the prompt.*its words are a, bird, and, dog"):
        story(lost, pipe=sd)
    twins = tuple(replace(subject, phrase="dog") for subject in TWO.subjects)
    both = replace(TWO, subjects=twins, panels=(*TWO.panels[:2], Panel(prompt="a dog and a dog")))
    events: list[Any] = []
    with pytest.raises(ValueError, match="'Tom' and 'Rex' are both 'dog' in panel 3.*give boxes or masks"):
        story(both, pipe=sd, on_step=events.append)
    kinds = (replace(TWO.subjects[0], phrase="black dog"), TWO.subjects[1])
    with pytest.raises(ValueError, match="'Tom' and 'Rex' are partly the same words in panel 3"):
        story(replace(both, subjects=kinds, panels=(*TWO.panels[:2], Panel(prompt="a black dog"))), pipe=sd,
              on_step=events.append)  # fmt: skip
    assert not events


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"panels": (TWO.panels[0], Panel(prompt="a cat", places={"Tom": [0, 0, 1]}))}, "place of 'Tom' must be a box"),
        ({"panels": (TWO.panels[0], Panel(prompt="a cat", places={"Tom": [0, 0, 10**400, 1]}))}, "is in pixels"),
        ({"panels": (TWO.panels[0], Panel(prompt="a cat", found={"Tom": "left"}))}, "place of 'Tom' must be a box"),
        ({"panels": (TWO.panels[0], Panel(prompt="a bird", places={"Tom": None}))}, "'cat' is not in the prompt"),
        ({"subjects": (TWO.subjects[0], replace(TWO.subjects[1], place=[0, 0]))}, "place of 'Rex' must be a box"),
        ({"subjects": (TWO.subjects[0], replace(TWO.subjects[1], picture="none.png"))}, "cannot read the reference"),
    ],
)
def test_bad_input_is_told_before_any_panel_is_made(sd, changes, words):
    events: list[Any] = []
    with pytest.raises((ValueError, TypeError), match=words):
        story(replace(TWO, **changes), pipe=sd, on_step=events.append)
    assert not events


def test_panels_that_do_not_exist_are_told(sd):
    with pytest.raises(ValueError, match="no panel 4; the story has 3"):
        story(TWO, pipe=sd, only=[3])
    with pytest.raises(ValueError, match="no panel was asked for"):
        story(TWO, pipe=sd, only=[])


def test_a_rehearsal_finds_subjects_and_is_remembered(sd):
    asked = []

    def find(picture: Image.Image, phrases: list[str]) -> list[Any]:
        asked.append(phrases)
        return [tuple(LEFT) if phrase == "cat" else None for phrase in phrases]

    bare = tuple(Panel(prompt=panel.prompt) for panel in TWO.panels)
    subjects = (replace(TWO.subjects[0], place=None), TWO.subjects[1])
    made = story(replace(TWO, panels=bare, subjects=subjects), pipe=sd, only=[0], find=find)
    assert asked == [["cat"], ["cat", "dog"]]  # the reference, then the panel
    assert made.script.panels[0].found == {"Tom": LEFT, "Rex": None}
    assert made.script.subjects[0].found == LEFT
    assert [place.subject for place in made.places[0]] == ["Tom"]
    assert any("not found: 'Rex' in panel 1" in line for line in made.report)
    again = story(made.script, pipe=sd, only=[0], find=find)
    assert len(asked) == 2 and same(again.panels[0], made.panels[0])
    with pytest.raises(ValueError, match="asked for 1 subjects and told of 0"):
        story(replace(TWO, subjects=subjects), pipe=sd, only=[0], find=lambda picture, phrases: [])


def test_who_was_not_found_is_told_by_the_panel_of_the_story(sd):
    bare = replace(TWO, panels=tuple(Panel(prompt=panel.prompt) for panel in TWO.panels))
    made = story(bare, pipe=sd, only=[2])  # two steps are too few for attention maps
    assert [line.split(" (")[0] for line in made.report] == [
        "not found: 'Tom' in panel 3", "not found: 'Rex' in panel 3",
    ]  # fmt: skip


def test_warnings_on_the_way_count_panels_as_the_story_does(sd):
    outside = [1.2, 0, 1.5, 1]
    panels = (*TWO.panels[:2], replace(TWO.panels[2], places={"Tom": LEFT, "Rex": outside}))
    with pytest.warns(UserWarning, match="'Rex' in panel 3 was not found: its box .* is outside"):
        made = story(replace(TWO, panels=panels), pipe=sd, only=[2])
    assert [line.split(" (")[0] for line in made.report] == ["not found: 'Rex' in panel 3"]
    strict = replace(TWO, panels=panels, consistency={"strict": True})
    with pytest.raises(ValueError, match="'Rex' in panel 3 was not found"):
        story(strict, pipe=sd, only=[2])


def test_words_are_found_as_tokens(sd, flux):
    tokens = sd.tokenizer("a cat on a Cat", return_offsets_mapping=True)["offset_mapping"]
    words = words_of(sd, "a cat on a Cat", "cat")
    assert ["a cat on a Cat"[slice(*tokens[i])].lower() for i in words] == list("catcat")
    assert words_of(sd, "cats and a cat", "cat")[0] > 5  # whole words
    assert len(words_of(flux, "a cat", "cat")) in (3, 4) and text_tokens(flux, "a cat") >= 5
    with pytest.raises(ValueError, match="beyond the 77 tokens"):
        words_of(sd, "a " * 100 + "cat", "cat")


def test_masks_can_be_looked_at_edited_and_read_again(made, tmp_path):
    shown = made.shown(0)
    assert shown.size == (32, 32) and not same(shown, made.panels[0])
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16, 4:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    packed = read_mask(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(mask_picture(packed, (32, 32))), mask)
    from reattend.attn_processors import Place

    covered = overlay(Image.new("RGB", (32, 32)), [Place(subject="Tom", mask=packed)])
    assert np.asarray(covered)[10, 15].any() and not np.asarray(covered)[30, 30].any()


def test_a_story_is_saved_whole_and_a_panel_beside_the_others(made, sd, tmp_path):
    files = made.save(tmp_path)
    assert {file.name for file in files} == {path.name for path in tmp_path.iterdir()}
    assert Image.open(tmp_path / "strip.png").size == strip(list(made.panels.values())).size == (3 * 36 - 4, 32)
    assert Script.from_json(Image.open(tmp_path / "panel-2.png").text["reattend story"]) == made.script
    before = {name: (tmp_path / name).read_bytes() for name in ("panel-1.png", "panel-3.png")}
    one = story(Script.read(tmp_path / "story.json").with_panel(1, seed=5), pipe=sd, only=[1])
    one.save(tmp_path)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert Script.read(tmp_path / "story.json").panels[1].seed == 5
    assert same(Image.open(tmp_path / "panel-2.png"), one.panels[1])


def test_a_saved_story_can_be_moved_with_its_own_pictures(sd, tmp_path):
    picture = Image.fromarray((np.indices((20, 24)).sum(0)[..., None] * [4, 2, 1]).astype(np.uint8))
    picture.save(tmp_path / "tom.jpg")
    own = replace(TWO.subjects[0], picture=str(tmp_path / "tom.jpg"))
    made = story(replace(TWO, subjects=(own, TWO.subjects[1])), pipe=sd, only=[0])
    (tmp_path / "tom.jpg").unlink()
    files = made.save(tmp_path / "made")
    assert tmp_path / "made" / "picture-1.png" in files
    for text in ((tmp_path / "made" / "story.json").read_text(), Image.open(files[0]).text["reattend story"]):
        assert str(tmp_path) not in text and Script.from_json(text).subjects[0].picture == "picture-1.png"
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    again = story(Script.read(moved / "story.json"), pipe=sd, only=[0])
    assert same(again.panels[0], made.panels[0])


def test_a_broken_panel_beside_a_new_one_costs_the_strip_alone(made, tmp_path):
    (tmp_path / "panel-2.png").write_bytes(b"broken")
    one = Story(script=made.script, panels={0: made.panels[0]}, places=made.places)
    assert {file.name for file in one.save(tmp_path)} == {"panel-1.png", "panel-1-places.png", "story.json"}


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_scheduler_that_visits_a_timestep_twice_reads_the_right_tokens(sd, name):
    sd.scheduler = getattr(diffusers, name).from_config(sd.scheduler.config, skip_prk_steps=True)
    rows = story(replace(TWO, steps=3), pipe=sd, only=[0])
    banked = story(replace(TWO, steps=3, bank=10**9), pipe=sd, only=[0])
    plan, held = banked.report
    assert plan.split()[3] == held.split()[1]  # predicted == held
    assert "0 times nothing was kept" in held
    assert close(banked.panels[0], rows.panels[0])
