"""A sparse ControlNet, in which frames meet, does in a film what it does in the stock pipeline."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import tiny
import torch
from films import close, make, make_on_ranks
from PIL import Image

from reattend.attn_processors import install
from reattend.attn_processors.context import context_of
from reattend.pipelines import Recipe, Video, long_video, sparse_control
from reattend.pipelines.noise import frame_noise, generator
from reattend.pipelines.sparse_control import SparseConditions

DUAL = {"name": "dual-scope", "window": 4, "anchors": 2}
SIZE = {"width": 32, "height": 24}


def recipe(frames: int, indices: tuple[int, ...], **more) -> Recipe:
    settings = {"negative": "a dog", "seed": 5, "steps": 2, "attention": (DUAL,), **SIZE}
    video = Video(frames=frames, controlnet_frame_indices=indices, controlnet_conditioning_scale=0.8)
    return Recipe(prompt="a red cat", video=video, **settings | more)


def pictures(number: int, seed: int = 0) -> list[Image.Image]:
    drawn = np.random.default_rng(seed).integers(0, 256, (number, 20, 30, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in drawn]


def stock(pipe, frames: int, indices: tuple[int, ...], monkeypatch, guidance: float = 7.5) -> torch.Tensor:
    """What the stock pipeline makes of the same noise."""

    def drawn_by_the_vae(shape, **_):
        return torch.stack([torch.randn(shape[1:], generator=generator(5, "condition", i)) for i in indices])

    settings = {"prompt": "a red cat", "negative_prompt": "a dog", "num_inference_steps": 2, "output_type": "latent"}
    settings |= {"num_frames": frames, "latents": frame_noise(5, (0, frames), (4, 12, 16)), "guidance_scale": guidance}
    settings |= {"controlnet_frame_indices": list(indices), "controlnet_conditioning_scale": 0.8}
    with monkeypatch.context() as patch:
        patch.setattr("diffusers.models.autoencoders.vae.randn_tensor", drawn_by_the_vae)
        return pipe(**settings, **SIZE, conditioning_frames=pictures(len(indices))).frames


@pytest.mark.parametrize(
    ("frames", "indices", "simplified", "guidance"),
    [
        (3, (0, 2), True, 7.5),
        (3, (2, 0), False, 7.5),
        (3, (1,), True, 1.0),
        (7, (1, 5), True, 7.5),
        (7, (5, 0, 6), False, 7.5),
    ],
)
def test_it_is_the_stock_pipeline_with_the_same_noise(frames, indices, simplified, guidance, tmp_path, monkeypatch):
    pipe = tiny.fresh(tiny.animatediff_sparse(simplified))
    handles = [install(part, "dual-scope", window=4, anchors=2) for part in (pipe, pipe.controlnet) if frames > 4]
    if handles:  # a net alone does not know how far the film is
        context_of(pipe.controlnet).pipeline = context_of(pipe.unet).pipeline
    want = stock(pipe, frames, indices, monkeypatch, guidance)
    for handle in handles:
        handle.remove()
    given = pictures(len(indices))
    film = make(pipe, recipe(frames, indices, guidance=guidance), tmp_path / "cat.mp4", conditioning_frames=given)
    close(film.latents[2], want)
    assert context_of(pipe.controlnet) is None and "prepare_image" not in vars(pipe)
    assert not [name for name, part in pipe.controlnet.named_modules() if "forward" in vars(part)]
    assert Recipe.read(tmp_path / "cat.mp4").video.controlnet_frame_indices == indices


def test_ranks_begin_the_film_of_one_and_one_process_ends_it(tmp_path, monkeypatch):
    wanted, given = recipe(7, (1, 2)), {"conditioning_frames": pictures(2)}  # the second rank has no picture
    pipe = tiny.fresh(tiny.animatediff_sparse())
    want = make(pipe, wanted, tmp_path / "whole.mp4", **given).latents
    out = tmp_path / "cat.mp4"
    begun = make_on_ranks(monkeypatch, 2, wanted, out, stop_after=1, build=tiny.animatediff_sparse, **given)
    close(begun[1], want[1])
    close(make(pipe, wanted, out, **given).latents[2], want[2])
    other = make(pipe, wanted, tmp_path / "other.mp4", conditioning_frames=pictures(2, 9)).latents[2]
    moved = make(pipe, recipe(7, (1, 6)), tmp_path / "moved.mp4", **given).latents[2]
    for film in (other, moved):
        assert (film - want[2]).abs().max() > 1e-2


def test_what_does_not_fit_is_told_in_one_sentence(animatediff, tmp_path):
    out, pipe = tmp_path / "cat.mp4", tiny.fresh(tiny.animatediff_sparse())
    with pytest.raises(
        ValueError, match="has 3 pictures, but controlnet_frame_indices names 2 frames; give one for each"
    ):
        long_video(recipe(7, (1, 5)), out, pipe=pipe, conditioning_frames=pictures(3))
    with pytest.raises(ValueError, match="needs conditioning_frames"):
        long_video(recipe(7, (1, 5)), out, pipe=pipe)
    with pytest.raises(ValueError, match="AnimateDiffPipeline takes no controlnet_"):
        long_video(recipe(7, (1, 5)), out, pipe=animatediff)
    assert not list(tmp_path.iterdir())


def test_pictures_are_read_one_after_another_and_none_is_kept(monkeypatch):
    read_so_far, alive = [], []

    def read(name, given):
        for _ in range(5):
            picture = Image.new("RGB", (400, 300))
            read_so_far.append(weakref.ref(picture))
            alive.append(sum(ref() is not None for ref in read_so_far))
            yield picture

    monkeypatch.setattr(sparse_control, "pictures_of", read)
    conditions = SparseConditions(tiny.animatediff_sparse(), recipe(7, (0, 1, 2, 3, 6)), None, (0, 7))
    assert conditions.arguments()["controlnet_frame_indices"] == [0, 1, 2, 3, 6]
    assert len(alive) == 5 and max(alive) <= 2 and conditions.conditions.shape == (1, 4, 5, 12, 16)
