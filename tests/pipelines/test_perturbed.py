"""Perturbed-attention guidance does in a film what it does in the stock pipeline, whoever makes which part of it."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from films import close, make, make_on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from reattend.attn_processors import installed
from reattend.pipelines import Recipe, Video, long_video
from reattend.pipelines.noise import frame_noise
from reattend.pipelines.perturbed import perturbed
from reattend.pipelines.videos import LAYER_LENGTH, LAYERS

DUAL = {"name": "dual-scope", "window": 4, "anchors": 2}
SIZE = {"width": 32, "height": 24}
SPATIAL = "attentions.*attn1"


@pytest.fixture
def pag():
    return tiny.fresh(tiny.animatediff_inputs("PAG"))


def recipe(frames: int, guidance: float = 5.0, attention=(DUAL,), **video) -> Recipe:
    video = {"pag_scale": 2.0} | video
    return Recipe(
        prompt="a red cat", negative="a dog", seed=5, steps=2, guidance=guidance, attention=attention,
        video=Video(frames=frames, **video), **SIZE,
    )  # fmt: skip


def stock(pipe, frames: int, guidance: float = 5.0, scale: float = 2.0) -> torch.Tensor:
    noise = frame_noise(5, (0, frames), (4, 12, 16))
    settings = {"prompt": "a red cat", "negative_prompt": "a dog", "num_inference_steps": 2, "output_type": "latent"}
    settings |= {"num_frames": frames, "latents": noise, "guidance_scale": guidance, "pag_scale": scale}
    return pipe(**settings, **SIZE).frames


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_it_is_the_stock_pipeline_within_the_window(pag, guidance, tmp_path):
    """The layers of the pipeline's own choice: in the middle block, also those between frames."""
    assert pag.pag_applied_layers == ["mid_block.*attn1"]
    want = stock(pag, 3, guidance)
    film = make(pag, recipe(3, guidance), tmp_path / "cat.mp4")
    close(film.latents[2], want)
    assert (stock(pag, 3, guidance, scale=0.0) - want).abs().max() > 1e-2
    assert {type(part) for part in pag.unet.attn_processors.values()} == {AttnProcessor2_0}
    made = Recipe.read(tmp_path / "cat.mp4").video
    assert made.pag_scale == 2.0 and made.pag_applied_layers == ("mid_block.*attn1",)


@pytest.mark.parametrize("layers", [SPATIAL, "mid.*motion_modules.*attn"])
def test_layers_within_frames_and_layers_between_them_count(pag, layers, tmp_path):
    pag.set_pag_applied_layers(layers)
    want = stock(pag, 3)
    pag.set_pag_applied_layers("mid_block.*attn1")
    film = make(pag, recipe(3, pag_applied_layers=[layers]), tmp_path / "cat.mp4")
    close(film.latents[2], want)
    assert pag.pag_applied_layers == ["mid_block.*attn1"]


def test_beyond_the_window_layers_within_frames_are_those_of_the_stock_pipeline(pag, tmp_path):
    pag.set_pag_applied_layers(SPATIAL)
    with installed(pag, "dual-scope", window=4, anchors=2):
        want = stock(pag, 7)
    close(make(pag, recipe(7), tmp_path / "cat.mp4").latents[2], want)


def test_ranks_begin_the_film_of_one_and_one_process_ends_it(pag, tmp_path, monkeypatch):
    agent = {"name": "agent", "ratio": 0.4}
    want = make(pag, recipe(7, attention=(DUAL, agent)), tmp_path / "whole.mp4").latents
    out = tmp_path / "cat.mp4"
    begun = make_on_ranks(
        monkeypatch,
        2,
        recipe(7, attention=(DUAL, agent)),
        out,
        stop_after=1,
        build=lambda: tiny.animatediff_inputs("PAG"),
    )
    close(begun[1], want[1])
    close(make(pag, recipe(7, attention=(DUAL, agent)), out).latents[2], want[2])


def test_processors_are_put_back_after_a_stop(pag, tmp_path):
    make(pag, recipe(7), tmp_path / "cat.mp4", stop_after=1)
    assert {type(part) for part in pag.unet.attn_processors.values()} == {AttnProcessor2_0}
    assert "_set_pag_attn_processor" not in vars(pag)


def test_what_cannot_be_is_told_in_one_sentence(pag, animatediff, tmp_path):
    out = tmp_path / "cat.mp4"
    with pytest.raises(ValueError, match="AnimateDiffPipeline takes no pag_scale, got 2; leave it out"):
        long_video(recipe(3), out, pipe=animatediff)
    with pytest.raises(ValueError, match="perturbs no layers, got pag_applied_layers mid; leave them out"):
        long_video(recipe(3, pag_scale=None, pag_applied_layers=["mid"]), out, pipe=animatediff)
    pag.set_pag_applied_layers("mid", (AttnProcessor2_0(), AttnProcessor2_0()))
    with pytest.raises(ValueError, match="perturbs attention with AttnProcessor2_0, which a film would not know"):
        long_video(recipe(3), out, pipe=pag)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_is_not_there_is_told_before_any_text_is_encoded(pag, tmp_path, monkeypatch):
    monkeypatch.setattr(pag, "encode_prompt", None)
    film = recipe(3, pag_applied_layers=["mid", "upper.*attn1"])
    with pytest.raises(
        ValueError, match=r"no self-attention that pag_applied_layers 'upper.\*attn1' is part of the name"
    ):
        long_video(film, tmp_path / "cat.mp4", pipe=pag)
    assert not list(tmp_path.iterdir())


def test_processors_are_put_back_when_the_pipeline_fails_half_way(pag):
    with installed(pag, "dual-scope"), perturbed(pag):
        before = dict(pag.unet.attn_processors)
        with pytest.raises(ValueError, match="Cannot find PAG layer"):
            pag._set_pag_attn_processor(["mid", "nowhere"], True)
        after = pag.unet.attn_processors
        assert all(after[name] is processor for name, processor in before.items())


@pytest.mark.parametrize(
    "layer", ["mid", "mid_block.*attn1", "mid.*motion_modules.*attn", "blocks.(0|1)", "down.(1.at|2.*s).0", "up|mid"]
)
def test_usual_names_of_layers_are_taken(layer):
    assert Video(pag_applied_layers=[layer]).pag_applied_layers == (layer,)


@pytest.mark.parametrize(
    "layer",
    ["(", "a)", "*", "a*", r"(\w+\.?)+#", "(a|b)*", "(a)(b)", "((a))", "a.**", ".*.*.*", "a{9}", "[a]", "a+", "()", ""],
)
def test_names_of_layers_that_could_be_searched_for_ever_are_refused(layer):
    with pytest.raises(ValueError, match="a layer to perturb cannot be read: got .* such as 'mid_block"):
        Video(pag_applied_layers=[layer])


def test_names_of_layers_are_few_and_short():
    with pytest.raises(ValueError, match="layer to perturb is too long"):
        Video(pag_applied_layers=["a" * (LAYER_LENGTH + 1)])
    with pytest.raises(ValueError, match=f"has {LAYERS + 1} names, at most {LAYERS}"):
        Video(pag_applied_layers=["mid"] * (LAYERS + 1))


@settings(deadline=None, max_examples=300)
@given(st.text("a.*|()", max_size=9))
def test_what_is_taken_can_be_searched_with(layer):
    try:
        Video(pag_applied_layers=[layer])
    except ValueError:
        return
    re.search(layer, "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1")
