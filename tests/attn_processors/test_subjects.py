"""Subjects that are nowhere, places of every kind, and bad input."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from two_subjects import ALONE, CLOSE, LEFT, PANEL, REFERENCES, RIGHT, TWO, denoise, noise, rows_of

from reattend.attn_processors import (
    AgentAttnProcessor,
    IsolationRepositionAttnProcessor,
    Place,
    install,
    installed,
)  # fmt: skip
from reattend.attn_processors.ops.regions import pack_mask

# -- bad input and edge cases --------------------------------------------------------------------------------------------


def test_a_subject_that_is_nowhere_is_told_once_counted_and_left_out(unet):
    outside = (Place(subject="cat", box=(1.2, 0.0, 1.5, 1.0)), Place(subject="dog", box=RIGHT))
    method = replace(ALONE, panels=(outside,))
    with installed(unet, method) as handle:
        with pytest.warns(UserWarning, match="'cat' in panel 1 was not found: its box .* is outside the picture"):
            got = denoise(unet, noise(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            denoise(unet, noise(1), t=400)
        assert "not found: 'cat' in panel 1" in str(handle.report())
    torch.testing.assert_close(got, denoise(unet, noise(1)), atol=CLOSE, rtol=0)
    with installed(unet, replace(method, strict=True)), pytest.raises(ValueError, match="give a box or mask"):
        denoise(unet, noise(1))


def test_an_empty_mask_and_an_empty_reference_are_not_found(unet):
    empty = pack_mask(torch.zeros(4, 4, dtype=torch.bool))
    method = replace(TWO, references=(Place(subject="cat", mask=empty), REFERENCES[1]))
    sample = noise(3)
    with pytest.warns(
        UserWarning, match="'cat' in reference 1 was not found: its mask is empty; this reference is left"
    ):
        got = rows_of(method, unet, sample)
    only_dog = rows_of(replace(TWO, references=REFERENCES[1:]), unet, sample[1:])
    torch.testing.assert_close(got[2], only_dog[1], atol=CLOSE, rtol=0)


def test_a_box_is_clipped_to_the_picture(unet):
    wide = (Place(subject="cat", box=(-0.5, -1.0, 0.5, 2.0)), PANEL[1])
    sample = noise(1)
    assert torch.equal(rows_of(replace(ALONE, panels=(wide,)), unet, sample), rows_of(ALONE, unet, sample))


def test_masks_do_what_boxes_do(unet):
    left = torch.zeros(32, 32, dtype=torch.bool)
    left[:, :16] = True
    masks = (Place(subject="cat", mask=pack_mask(left)), Place(subject="dog", mask=pack_mask(~left)))
    sample = noise(3)
    torch.testing.assert_close(
        rows_of(replace(TWO, panels=(masks,)), unet, sample), rows_of(TWO, unet, sample), atol=CLOSE, rtol=0
    )


def test_more_subjects_than_references_and_more_references_than_subjects(unet):
    sample = noise(3)
    only_cat = replace(TWO, references=REFERENCES[:1])  # the dog is only kept apart
    assert not torch.equal(rows_of(only_cat, unet, sample[[0, 2]])[1], rows_of(TWO, unet, sample)[2])
    one_panel = replace(TWO, panels=(PANEL[:1],))  # the dog's reference is not used
    both = rows_of(one_panel, unet, sample)[2]
    torch.testing.assert_close(
        both, rows_of(replace(one_panel, references=REFERENCES[:1]), unet, sample[[0, 2]])[1], atol=CLOSE, rtol=0
    )


def test_two_equal_references_weigh_as_one(unet):
    sample = noise(1)[[0, 0, 0]]
    twice = replace(TWO, references=(REFERENCES[0], REFERENCES[0]))
    once = rows_of(replace(TWO, references=REFERENCES[:1]), unet, sample[:2])
    torch.testing.assert_close(rows_of(twice, unet, sample)[2], once[1], atol=CLOSE, rtol=0)


def test_a_subject_that_fills_the_picture_is_not_kept_from_anything_but_reads(unet):
    whole = ((Place(subject="cat", box=(0, 0, 1, 1)),),)
    sample = noise(2)
    isolated = rows_of(IsolationRepositionAttnProcessor(panels=whole), unet, sample)
    torch.testing.assert_close(isolated, denoise(unet, sample), atol=CLOSE, rtol=0)
    referred = rows_of(IsolationRepositionAttnProcessor(panels=whole, references=REFERENCES[:1]), unet, sample)
    assert not torch.allclose(referred[1], isolated[1], atol=CLOSE)


BAD = {
    "strength is a share": {"strength": 1.5},
    "isolate is a window": {"isolate": (0.5, 0.5)},
    "refer is a window": {"refer": (0.2, 1.1)},
    "warmup is a share": {"warmup": 0.0},
    "no regular expression": {"reference_layers": "("},
    "leave the panels": {"source": "record", "panels": (PANEL,), "references": REFERENCES},
    "has no subject": {"panels": ((Place(subject="", box=LEFT),),)},
    "has no place": {"panels": ((Place(subject="cat"),),)},
    "is twice in panel 1": {"panels": ((PANEL[0], PANEL[0]),)},
    "needs the name": {"references": (Place(subject=""),)},
    "cannot tell them": {"panels": ((Place(subject="one", words=(2,)), Place(subject="two", words=(2, 3))),)},
    "at most 62 subjects": {"panels": (tuple(Place(subject=str(i), box=LEFT) for i in range(63)),)},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_settings_are_one_sentence(words):
    with pytest.raises(ValueError, match=words):
        IsolationRepositionAttnProcessor(**BAD[words])


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("no numbers", {"box": (0, 0, float("nan"), 1)}),
        ("turned around", {"box": (0.5, 0, 0.2, 1)}),
        ("packed mask", {"mask": "x"}),
        ("places from 0 on", {"words": (-1,)}),
    ],
)
def test_bad_places_are_one_sentence(words, place):
    with pytest.raises(ValueError, match=words):
        Place(subject="cat", **place)


def test_it_does_not_share_layers_with_another_attention(unet):
    with pytest.raises(ValueError, match="wanted by both"):
        install(unet, [TWO, AgentAttnProcessor()])
