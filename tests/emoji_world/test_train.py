"""The trainings of the bundled models: what is stored comes back bit for bit, and the run ends where it would have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reattend.emoji_world import captions, train_sd, train_vae, world

# Kernels sum in an order that depends on threads and on where memory lies. AdamW then moves a parameter whose gradient is
# such rounding noise by a whole step either way: twice the learning rate of a warm-up step, 2 * 4e-5.
ONE_STEP = 1e-4


class PulledPlugError(Exception):
    pass


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    train_vae.build_vae().save_pretrained(folder)
    return folder


def test_tiny_sd_training_resumes_across_both_stages(
    vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_sd.SdConfig(
        vae=vae_folder, out=tmp_path / "whole", steps=4, close_up_steps=2, pool=8, batch=2, save_every=1
    )
    whole = train_sd.Trainer(config)
    whole.train()

    config = replace(config, out=tmp_path / "parts")
    keep = train_sd.Trainer.save

    def save_then_stop(trainer: train_sd.Trainer, step: int) -> None:
        keep(trainer, step)
        if step == 3:
            raise PulledPlugError

    monkeypatch.setattr(train_sd.Trainer, "save", save_then_stop)
    stopped = train_sd.Trainer(config)
    with pytest.raises(PulledPlugError):
        stopped.train()
    monkeypatch.setattr(train_sd.Trainer, "save", keep)
    again = train_sd.Trainer(config)
    assert again.done == 3
    assert all(torch.equal(a, b) for a, b in zip(state_of(stopped), state_of(again), strict=True))

    again.train()
    for a, b in zip(whole.parameters, again.parameters, strict=True):
        torch.testing.assert_close(a, b, atol=ONE_STEP, rtol=0)


def state_of(trainer: train_sd.Trainer) -> list[torch.Tensor]:
    moments = [value for state in trainer.optimizer.state_dict()["state"].values() for value in state.values()]
    return [*trainer.parameters, *trainer.ema.shadow_params, *moments]


def test_vae_training_resumes_and_decoder_training_keeps_the_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_vae, "psnr", lambda vae: 0.0)  # only for the log, and most of the time here
    config = train_vae.VaeConfig(out=tmp_path / "whole", steps=2, batch=2, save_every=1)
    whole = train_vae.train(config)
    stopped = replace(config, out=tmp_path / "parts")
    drawn = train_vae.crops
    calls: list[int] = []

    def crops_once(*given: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise PulledPlugError
        return drawn(*given)

    monkeypatch.setattr(train_vae, "crops", crops_once)
    with pytest.raises(PulledPlugError):
        train_vae.train(stopped)
    monkeypatch.setattr(train_vae, "crops", drawn)
    again = train_vae.train(stopped)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=ONE_STEP, rtol=0)

    whole.save_pretrained(tmp_path / "vae")
    decoder = train_vae.train(replace(config, out=tmp_path / "decoder", decoder_of=tmp_path / "vae"))
    same = [torch.equal(a, b) for a, b in zip(whole.encoder.parameters(), decoder.encoder.parameters(), strict=True)]
    other = [torch.equal(a, b) for a, b in zip(whole.decoder.parameters(), decoder.decoder.parameters(), strict=True)]
    assert all(same)
    assert not all(other)


def test_training_never_sees_a_held_out_caption_and_every_word_is_one_token() -> None:
    rng = np.random.default_rng(0)
    scenes = [scene for scene in (world.sample_scene(rng) for _ in range(300)) if train_sd.learnable(scene)]
    assert not any(world.is_held_out(train_sd.caption_of(scene, rng)) for scene in scenes)
    tokenizer = captions.build_tokenizer()
    words = [*world.KINDS, *world.TINTS, *world.BACKGROUNDS, "a", "an", "and", "on"]
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)


def test_a_pool_of_another_size_is_refused_before_captions_meet_the_wrong_pictures(
    vae_folder: Path, tmp_path: Path
) -> None:
    config = train_sd.SdConfig(vae=vae_folder, out=tmp_path, pool=3)
    train_sd.Trainer(config).pool("close-ups")
    with pytest.raises(ValueError, match="holds 3 pictures, the run wants 5"):
        train_sd.Trainer(replace(config, pool=5)).pool("close-ups")
