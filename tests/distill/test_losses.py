"""The losses against their formula, the choice of layers, and the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reattend.distill import DistillConfig
from reattend.distill.losses import matched_layers, student_losses

NAMES = [f"transformer_blocks.{i}.attn" for i in range(3)] + [f"single_transformer_blocks.{i}.attn" for i in range(6)]


def test_losses_are_means_of_squares():
    draw = torch.Generator().manual_seed(0)
    s, t, u = torch.randn(3, 2, 5, 4, generator=draw, dtype=torch.float64).float()
    image, text = torch.randn(2, 2, 3, 4, generator=draw), torch.randn(2, 2, 7, 4, generator=draw)
    ours, theirs = {"a": [image[0], text[0]], "b": [image[1]]}, {"a": [image[1], text[1]], "b": [image[0]]}
    got = student_losses(s, t, u, ours, theirs, flow_weight=1.0, output_weight=0.5, attention_weight=0.25)
    first = torch.cat([(image[0] - image[1]).flatten(), (text[0] - text[1]).flatten()]).square().mean()
    attention = (first + (image[1] - image[0]).square().mean()) / 2
    torch.testing.assert_close(got.attention, attention)
    total = (s - u).square().mean() + 0.5 * (s - t).square().mean() + 0.25 * attention
    torch.testing.assert_close(got.total, total)
    assert float(student_losses(s, s, s, {}, {}).total) == 0


@pytest.mark.parametrize(
    ("match", "want"),
    [
        ("every:4", [NAMES[3], NAMES[7]]),
        ("single:4", [NAMES[6]]),
        ("every:100", [NAMES[-1]]),
        ("all", NAMES),
        (r"^transformer_blocks\.[01]", NAMES[:2]),
    ],
)
def test_layers_are_chosen(match, want):
    assert matched_layers(NAMES, match) == want


@pytest.mark.parametrize(
    ("match", "sentence"), [("every:0", "needs a whole number from 1"), ("(", "is no regular"), ("x", "fits no")]
)
def test_bad_choices_are_one_sentence(match, sentence):
    with pytest.raises(ValueError, match=sentence):
        matched_layers(NAMES, match)


def test_a_configuration_survives_its_file(tmp_path):
    config = DistillConfig(
        model="m", data="d", attention={"name": "clear", "radius": 3}, rank=4, validation_prompts=("a",)
    )
    config.write(tmp_path / "config.json")
    assert DistillConfig.read(tmp_path / "config.json") == config
    assert config.data == Path("d")
    assert config.attention["pool"] is None  # all settings are there
    (tmp_path / "r.toml").write_text('model = "m"\ndata = "d"\nlr = 1\n[attention]\nname = "clear"\nradius = 3\n')
    read = DistillConfig.read(tmp_path / "r.toml", steps=7)
    assert (read.lr, read.steps, read.attention["radius"]) == (1.0, 7, 3.0)
    assert read.conflict(config) == "rank"
    assert read.conflict(DistillConfig.read(tmp_path / "r.toml", out="elsewhere", steps=9)) is None
    falling = DistillConfig.read(tmp_path / "r.toml", schedule="cosine")
    assert falling.conflict(DistillConfig.read(tmp_path / "r.toml", schedule="cosine", steps=9)) == "steps"


def test_the_defaults_are_those_published_with_clear():
    config = DistillConfig(model="m", data="d")
    assert (config.flow_weight, config.output_weight, config.attention_weight, config.match) == (
        1.0,
        0.5,
        0.5,
        "every:4",
    )
    assert (config.steps, config.batch, config.lr, config.times, config.logit_mean) == (
        10_000, 32, 1e-4, "logit-normal", 0.0,
    )  # fmt: skip


def test_one_prompt_is_a_text_and_several_are_a_list():
    make = lambda prompts: DistillConfig(model="m", data="d", validation_prompts=prompts).validation_prompts  # noqa: E731
    assert make("a cat, in a hat") == ("a cat, in a hat",)
    assert make(" ") == make("()") == ()
    assert make("('a cat', 'a hat')") == make(["a cat", "a hat"]) == ("a cat", "a hat")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "steps is out of range: got 0"),
        ({"attention": {"name": "linaer"}}, "unknown attention: got 'linaer'"),
        ({"attention": {"name": "clear", "radius": 0}}, "radius"),
        ({"schedule": "step"}, "wants one of 'constant', 'linear', 'cosine', got 'step'"),
        ({"flow_weight": 0, "output_weight": 0, "attention_weight": 0}, "there is nothing to learn"),
        ({"radius_steps": 5, "attention": {"name": "linear"}}, "shrinks the radius"),
        ({"attention": {"name": "clear", "start": 0.25}}, "another attention in some sampling steps .* load_linear"),
        ({"attention": {"name": "agent"}}, "another attention in some sampling steps"),
        ({"logit_mean": 11}, "logit_mean is out of range"),
        ({"logit_mean": 1, "times": "uniform"}, "got times='uniform'"),
        ({"trackers": ("paper",)}, "no tracker 'paper'"),
        ({"validate_every": 5}, "validation_prompts is empty"),
    ],
)
def test_bad_settings_are_one_sentence(changes, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        DistillConfig(**({"model": "m", "data": "d"} | changes))


def test_recipes_that_are_none_are_told(tmp_path):
    (tmp_path / "r.toml").write_text("model = ")
    with pytest.raises(ValueError, match="is no recipe"):
        DistillConfig.read(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot read .*utf-8.*; give a recipe file"):
        DistillConfig.read(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text('model = "m"\nspeed = 3\n')
    with pytest.raises(ValueError, match="has an entry 'speed', which is none of"):
        DistillConfig.read(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text('model = "m"\n')
    with pytest.raises(ValueError, match="tells no 'data'"):
        DistillConfig.read(tmp_path / "r.toml")
