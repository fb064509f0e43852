"""A student against its teacher, in pairs."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch

from reattend.attn_processors import ClearAttnProcessor
from reattend.attn_processors.ops.cost import attention_flops, dense_flops
from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.patterns import Disc
from reattend.distill import evaluate, save_linear
from reattend.distill.comparison import step_flops
from reattend.distill.linear_folder import read_linear
from reattend.distill.step_cost import timed

PROMPTS = ["a cat", "a blue car", "a hat"]


def student(pipe, folder, radius, change=0.0, **settings):
    model = pipe.transformer
    tensors = {name: value + change for name, value in model.named_parameters() if ".attn.to_q." in name}
    save_linear(folder, model, ClearAttnProcessor(radius=radius, **settings), tensors)
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


@pytest.mark.parametrize("steps", [1, 3])
def test_operations_are_those_of_the_formulas(flux, tmp_path, steps):
    """16 x 16 tokens in windows: what is counted while a picture is made is what `ops.cost` predicts."""
    folder = student(flux, tmp_path, 2, backend="halo")
    found = evaluate(flux, folder, PROMPTS[:1], size=(64, 64), steps=steps, text_length=16)
    layout, width, layers = TokenLayout(16, 16, before=16), 32, 2
    stock = layers * dense_flops(layout, width)
    assert found.teacher_flops.attention == stock
    near = layers * attention_flops(layout, Disc(2), "halo", width)
    padding = layers * 4 * width * layout.grid_tokens * 7  # keys are padded to a multiple of eight
    assert near <= found.student_flops.attention <= near + padding < 0.5 * stock
    for flops in (found.teacher_flops, found.student_flops):
        assert flops.model - flops.attention == found.teacher_flops.model - stock > 0  # the rest is the same
    assert "GFLOP a step" in str(found)
    assert json.loads(found.to_json())["teacher_flops"]["attention"] == stock


def test_a_student_for_the_block_sparse_kernel_is_counted_as_others_are(flux, tmp_path):
    a, b = (student(flux, tmp_path / name, 2, backend=name) for name in ("auto", "flex"))
    read = [read_linear(folder) for folder in (a, b)]
    counts = [step_flops(flux, found, "x", size=(32, 32), text_length=16) for found in read]
    assert counts[0] == counts[1]


def test_time_is_that_of_the_denoiser_with_its_hooks(flux):
    seen = []
    with timed(flux.transformer) as seconds:
        handle = flux.transformer.register_forward_pre_hook(lambda *given: seen.append(len(seconds)))
        tiny.run(flux)
        handle.remove()
    assert len(seconds) == 2 and min(seconds) > 0 and seen == [0, 1]
    tiny.run(flux)
    assert len(seconds) == 2


def test_bad_input_is_one_sentence(flux, tmp_path):
    folder = student(flux, tmp_path, 2)
    with pytest.raises(ValueError, match="there are no prompts to compare with"):
        evaluate(flux, folder, [], size=(32, 32))
    with pytest.raises(ValueError, match="steps is out of range: got 0"):
        evaluate(flux, folder, PROMPTS, size=(32, 32), steps=0)
