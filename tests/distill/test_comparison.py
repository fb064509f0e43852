"""A student against its teacher, in pairs."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch

from reattend.attn_processors import ClearAttnProcessor
from reattend.distill import evaluate, save_linear

PROMPTS = ["a cat", "a blue car", "a hat"]


def student(pipe, folder, radius, change=0.0):
    model = pipe.transformer
    tensors = {name: value + change for name, value in model.named_parameters() if ".attn.to_q." in name}
    save_linear(folder, model, ClearAttnProcessor(radius=radius), tensors)
    return folder


def test_a_student_that_is_the_teacher_is_told_as_one(flux, tmp_path):
    stock = tiny.run(flux)
    same = student(flux, tmp_path, radius=1000.0)
    judge = lambda pixels, prompt: float("car" in prompt)  # noqa: E731
    told = []
    settings = {"size": (32, 32), "steps": 2, "text_length": 16}
    found = evaluate(flux, same, PROMPTS, **settings, judge=judge, on_progress=lambda *pair: told.append(pair))
    assert found.samples == 3 and found.latent_error.mean < 1e-8 and found.ssim.mean > 0.999 and found.psnr.mean > 40
    teacher, pupil, difference = found.scores
    assert teacher == pupil and math.isclose(teacher.mean, 1 / 3) and difference.mean == difference.margin == 0
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert json.loads(found.to_json())["samples"] == 3 and "3 pairs of pictures" in str(found)
    assert torch.equal(tiny.run(flux), stock)


def test_a_student_further_off_is_further_off(flux, tmp_path):
    settings = {"size": (32, 32), "steps": 2, "text_length": 16}
    near = evaluate(flux, student(flux, tmp_path / "a", 3), PROMPTS[:2], **settings)
    far = evaluate(flux, student(flux, tmp_path / "b", 1, change=0.5), PROMPTS[:2], **settings)
    assert 0 < near.latent_error.mean < far.latent_error.mean
    assert near.psnr.mean > far.psnr.mean
    assert near.scores is None


def test_bad_input_is_one_sentence(flux, tmp_path):
    folder = student(flux, tmp_path, 2)
    with pytest.raises(ValueError, match="there are no prompts to compare with"):
        evaluate(flux, folder, [], size=(32, 32))
    with pytest.raises(ValueError, match="steps is out of range: got 0"):
        evaluate(flux, folder, PROMPTS, size=(32, 32), steps=0)
