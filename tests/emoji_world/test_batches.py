"""What the training steps learn from: the same batches whoever makes them, and never a held-out caption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from reattend.emoji_world import batches, captions, train_flux, training, world

CARD = torch.device("cuda")  # only its name is asked for


def test_other_processes_make_the_same_batches(vae_folder: Path, tmp_path: Path) -> None:
    trainer = train_flux.FluxTrainer(train_flux.FluxConfig(vae=vae_folder, out=tmp_path, pool=8, batch=4))
    pool = trainer.pool("scenes")

    def make(step: int) -> batches.Batch:
        return trainer.batch(step, pool)

    steps = range(trainer.config.close_up_steps, trainer.config.close_up_steps + 5)
    for mine, theirs in zip(
        batches.made_ahead(make, steps, torch.device("cpu")), batches.made_ahead(make, steps, CARD), strict=True
    ):
        assert (mine.words, mine.step, mine.share) == (theirs.words, theirs.step, theirs.share)
        assert mine.clean.dtype == torch.float16 and mine.to(torch.device("cpu")).clean.dtype == torch.float32
        for name in ("clean", "noise", "times"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
        assert mine.labels.keys() == theirs.labels.keys() == {"clauses", "layout"}
        for one, other in zip([mine.ids, *mine.labels.values()], [theirs.ids, *theirs.labels.values()], strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_mistake_in_another_process_is_told() -> None:
    with pytest.raises(ZeroDivisionError):
        list(batches.made_ahead(lambda one: 1 // one, [1, 0], CARD))


def test_a_process_without_a_card_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert training.own_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 2 has no card, there are 1"):
        training.own_device()


def test_a_batch_moves_as_a_whole() -> None:
    some = torch.ones(1)
    batch = batches.Batch(some, some, some, ["a"], 3, 0.5, {"text": some}, {"layout": {"kind": some}}).to(
        torch.device("meta")
    )
    assert (batch.words, batch.step, batch.share) == (["a"], 3, 0.5)
    tensors = [batch.clean, batch.noise, batch.times, batch.ids["text"], batch.labels["layout"]["kind"]]
    assert all(tensor.is_meta for tensor in tensors)


def test_scenes_are_encoded_in_order_and_scaled(vae_folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.register_to_config(scaling_factor=3.0)
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng) for _ in range(53)]  # more than are encoded at once
    latents = batches.encode(vae, scenes, 64)
    assert latents.dtype == torch.float16
    for i in (0, 52):
        alone = batches.encode(vae, [scenes[i]], 64)
        torch.testing.assert_close(latents[i], alone[0], atol=2e-3, rtol=2e-3)  # fp16
    picture = torch.from_numpy(np.asarray(world.draw(scenes[0], 64, 64), np.float32).transpose(2, 0, 1)) / 127.5 - 1
    with torch.no_grad():
        wanted = 3 * vae.encode(picture[None]).latent_dist.mean
    torch.testing.assert_close(latents[0].float(), wanted[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("count", [2, 32, 48])
@pytest.mark.parametrize(("lean", "least", "most"), [(0.5, 0.55, 0.68), (1.0, 0.68, 0.78)])
def test_times_cover_the_schedule_and_lean_to_the_noisy_side(
    lean: float, least: float, most: float, count: int
) -> None:
    draws = [batches.sample_times(count, torch.Generator().manual_seed(seed), lean) for seed in range(50 * 48 // count)]
    times = torch.cat(draws)
    assert times.min() >= 0 and times.max() < 1
    assert least < (times > 0.5).double().mean() < most
    assert ((times < 0.1).double().mean() - 1 / 30).abs() < 0.02  # a third of them uniform


def test_training_never_sees_a_held_out_caption_and_every_word_is_one_token() -> None:
    rng = np.random.default_rng(0)
    scenes = [scene for scene in (world.sample_scene(rng) for _ in range(300)) if batches.learnable(scene)]
    assert not any(world.is_held_out(batches.caption_of(scene, rng)) for scene in scenes)
    tokenizer = captions.build_tokenizer()
    words = [*world.KINDS, *world.TINTS, *world.BACKGROUNDS, "a", "an", "and", "on"]
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
