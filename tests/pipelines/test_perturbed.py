"""Perturbed-attention guidance does in a film what it does in the stock pipeline, whoever makes which part of it."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from films import close, make, make_on_ranks

from reattend.attn_processors import installed
from reattend.pipelines import Recipe, Video, long_video
from reattend.pipelines.noise import frame_noise

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
