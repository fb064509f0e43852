"""The trainings of the bundled models: what is stored comes back bit for bit, and the run ends where it would have."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from forked import forked

from reattend.emoji_world import batches, captions, guiding, muon, train_flux, train_sd, train_vae, train_video, world
from reattend.pipelines import Recipe, Video, long_video
from reattend.pipelines.upscaling import ROPE_THETA_SCALE

# Kernels sum in an order that depends on threads and on where memory lies. AdamW then moves a parameter whose gradient is
# such rounding noise by a whole step either way: twice the learning rate of a warm-up step, 2 * 4e-5.
ONE_STEP = 1e-4


class PulledPlugError(Exception):
    pass


def test_tiny_sd_training_resumes_across_both_stages(
    vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_sd.SdConfig(
        vae=vae_folder, out=tmp_path / "whole", steps=4, close_up_steps=2, pool=8, batch=2, save_every=1
    )
    whole = train_sd.SdTrainer(config)
    whole.train()

    config = replace(config, out=tmp_path / "parts")
    keep = train_sd.SdTrainer.save

    def save_then_stop(trainer: train_sd.SdTrainer, step: int) -> None:
        keep(trainer, step)
        if step == 3:
            raise PulledPlugError

    monkeypatch.setattr(train_sd.SdTrainer, "save", save_then_stop)
    stopped = train_sd.SdTrainer(config)
    with pytest.raises(PulledPlugError):
        stopped.train()
    monkeypatch.setattr(train_sd.SdTrainer, "save", keep)
    again = train_sd.SdTrainer(config)
    assert again.done == 3
    assert all(torch.equal(a, b) for a, b in zip(state_of(stopped), state_of(again), strict=True))

    again.train()
    for a, b in zip(whole.parameters, again.parameters, strict=True):
        torch.testing.assert_close(a, b, atol=ONE_STEP, rtol=0)


def state_of(trainer: train_sd.SdTrainer) -> list[torch.Tensor]:
    states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers.values()]
    moments = [value for state in states for row in state.values() for value in row.values()]
    return [*trainer.parameters, *trainer.ema.shadow_params, *moments]


def test_two_processes_train_as_one(vae_folder: Path, tmp_path: Path) -> None:
    config = train_sd.SdConfig(vae=vae_folder, out=tmp_path / "one", steps=2, close_up_steps=1, pool=8, batch=3)
    one = train_sd.SdTrainer(config)
    one.train()
    flags = ["--vae", vae_folder, "--steps", "2", "--close-up-steps", "1", "--pool", "8", "--batch", "3"]
    argv = ["train_sd", "--out", str(tmp_path / "two"), *map(str, flags)]
    script = "reattend.emoji_world.train_sd"
    work = f"import runpy, sys; sys.argv = {argv}; runpy.run_module({script!r}, run_name='__main__', alter_sys=True)"
    done = forked(2, work, [script, "torch.distributed"])
    assert done.returncode == 0, done.stderr[-2000:]
    two = train_sd.SdTrainer(replace(config, out=tmp_path / "two"))
    assert two.done == 2
    for a, b in zip(one.parameters, two.parameters, strict=True):
        torch.testing.assert_close(a, b, atol=ONE_STEP, rtol=0)


@pytest.mark.parametrize("shape", [(5, 24), (24, 5), (8, 8)], ids=str)
def test_muon_orthogonalizes_about_as_well_as_the_whole_iteration(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b, c = muon.COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):  # the iteration as published, on the matrix itself
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    torch.testing.assert_close(muon.orthogonalized(matrices), x, atol=1e-5, rtol=0)
    assert (torch.linalg.svdvals(x) - 1).abs().max() < 0.35  # the quintic is tuned for speed: 0.7 to 1.2


def test_muon_moves_kernels_by_the_size_of_an_adamw_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 4, 3, 3))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    muon.Muon([weight], lr=0.1).step()
    step = float(weight.detach().square().mean().sqrt())
    assert 0.7 < step / (0.2 * 0.1) < 1.2  # the singular values reach 0.7 to 1.2


def test_tiny_flux_training_learns_the_guided_velocity_last_and_resumes_there(
    vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_flux.FluxTrainer, "large", 0.0)
    config = train_flux.FluxConfig(
        vae=vae_folder, out=tmp_path / "whole", steps=3, close_up_steps=1, guided_steps=1, text_steps=2, pool=6, batch=2,
        save_every=1,
    )  # fmt: skip
    whole = train_flux.FluxTrainer(config)
    whole.train()
    assert (config.out / "teacher.pt").exists()

    shorter = replace(config, out=tmp_path / "parts", steps=2, guided_steps=0)
    train_flux.FluxTrainer(shorter).train()
    again = train_flux.FluxTrainer(replace(config, out=shorter.out))
    assert again.done == 2
    again.train()
    for a, b in zip(whole.parameters, again.parameters, strict=True):
        torch.testing.assert_close(a, b, atol=ONE_STEP, rtol=0)

    pipe = FluxPipeline.from_pretrained(config.out / "pipeline", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a blue car on sand", height=64, width=96, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 96, 3) and np.isfinite(image).all()


def test_guided_steps_learn_the_times_that_the_sampler_visits(
    vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_flux.FluxConfig(
        vae=vae_folder, out=tmp_path, steps=10, close_up_steps=0, guided_steps=4, text_steps=0
    )
    trainer = train_flux.FluxTrainer(config)
    draw = torch.Generator().manual_seed(0)
    assert not trainer.is_guided(5)
    monkeypatch.setattr(train_flux.FluxTrainer, "large", 1.0)
    large = torch.cat([trainer.times(6, 20, draw) for _ in range(50)])
    assert not trainer.is_guided(6) and large.min() >= 0 and large.max() <= train_flux.MOST_NOISE
    monkeypatch.setattr(train_flux.FluxTrainer, "large", 0.0)
    assert trainer.is_guided(6)
    times = torch.cat([trainer.times(6, 20, draw) for _ in range(50)])
    visited = FlowMatchEulerDiscreteScheduler(shift=guiding.SHIFT)
    visited.set_timesteps(1000)
    wanted = visited.sigmas[:-1].sort().values
    torch.testing.assert_close(times.sort().values, wanted, atol=0.03, rtol=0)  # 1,000 draws
    before = torch.cat([trainer.times(5, 20, draw) for _ in range(50)])
    assert (before.sort().values - wanted).abs().max() > 0.05


def test_scenes_are_drawn_as_often_as_they_have_sprites(vae_folder: Path, tmp_path: Path) -> None:
    trainer = train_flux.FluxTrainer(train_flux.FluxConfig(vae=vae_folder, out=tmp_path))
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng) for _ in range(200)]
    chosen = trainer.choose(scenes, 20_000, np.random.default_rng(1))
    sprites = np.array([len(scene.sprites) for scene in scenes])
    got = np.bincount(chosen, minlength=200) / 20_000
    share = sprites / sprites.sum()
    assert (np.abs(got - share) < 5 * np.sqrt(share / 20_000)).all()  # five standard deviations


def test_a_share_of_the_steps_sees_scenes_of_twice_the_side(
    vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = train_flux.FluxConfig(
        vae=vae_folder, out=tmp_path, steps=2, close_up_steps=0, guided_steps=0, text_steps=0, pool=8, batch=4
    )
    trainer = train_flux.FluxTrainer(config)
    stages = [trainer.stage(step) for step in range(1000)]
    assert 150 < stages.count("large") < 250 and stages.count("scenes") == 1000 - stages.count("large")
    scenes, latents = trainer.pool("large")
    assert len(scenes) == len(latents) <= 2 and latents.shape[-2:] == (64, 64)

    monkeypatch.setattr(train_flux.FluxTrainer, "large", 1.0)
    before = [p.clone() for p in trainer.parameters]
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.parameters)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert not (tmp_path / "scenes.pt").exists()


def test_half_of_the_large_scenes_are_seen_with_the_rotary_base_of_upscaling(vae_folder: Path, tmp_path: Path) -> None:
    trainer = train_flux.FluxTrainer(train_flux.FluxConfig(vae=vae_folder, out=tmp_path))

    def scale(side: int, step: int) -> float:
        clean = torch.zeros(1, 4, side // 8, side // 8)
        return trainer.theta_scale(batches.Batch(clean, clean, torch.zeros(1), [""], step))

    assert {scale(trainer.side, step) for step in range(100)} == {1.0}
    large = [scale(2 * trainer.side, step) for step in range(1000)]
    assert 430 < large.count(1.0) < 570 and large.count(ROPE_THETA_SCALE) == 1000 - large.count(1.0)

    rotary, seen = trainer.parts["transformer"].pos_embed, []
    before = rotary.theta
    rotary.register_forward_hook(lambda module, *_: seen.append(module.theta))
    mixed = torch.randn(1, trainer.vae.config.latent_channels, 32, 32)
    answers = [
        trainer.velocity(trainer.parts, mixed, trainer.ids(["a"]), torch.ones(1), 24, factor) for factor in (1.0, 10.0)
    ]
    assert seen == [before, 10 * before] and rotary.theta == before
    assert not torch.equal(*answers)


def test_too_small_batches_for_all_processes_are_refused(vae_folder: Path, tmp_path: Path) -> None:
    flags = {"--vae": vae_folder, "--out": tmp_path, "--steps": 1, "--close-up-steps": 0, "--pool": 4, "--batch": 1}
    argv = ["train_sd", *(str(word) for flag in flags.items() for word in flag)]
    script = "reattend.emoji_world.train_sd"
    work = f"import runpy, sys; sys.argv = {argv}; runpy.run_module({script!r}, run_name='__main__', alter_sys=True)"
    done = forked(2, work, [script, "torch.distributed"])
    assert done.returncode != 0
    assert "2 processes need a larger --batch: scenes come 1 at a time" in done.stderr


def test_tiny_video_learns_motion_alone_and_resumes(tmp_path: Path) -> None:
    config = train_video.VideoConfig(out=tmp_path / "whole", steps=3, pool=3, batch=1, frames=3, save_every=3)
    whole = train_video.VideoTrainer(config)
    base = {name: p.clone() for name, p in whole.parts["unet"].named_parameters() if ".motion_modules." not in name}
    moves = {name: p.clone() for name, p in whole.parts["unet"].named_parameters() if name not in base}
    whole.train()
    now = dict(whole.parts["unet"].named_parameters())
    assert all(torch.equal(now[name], p) for name, p in base.items())
    assert all(not torch.equal(now[name], p) for name, p in moves.items() if name.endswith("proj_out.weight"))

    shorter = replace(config, out=tmp_path / "parts", steps=2)
    train_video.VideoTrainer(shorter).train()
    again = train_video.VideoTrainer(replace(config, out=shorter.out))
    assert again.done == 2
    again.train()
    for a, b in zip(whole.parameters, again.parameters, strict=True):
        torch.testing.assert_close(a, b, atol=ONE_STEP, rtol=0)

    recipe = Recipe(prompt="a blue car on sand", seed=1, steps=2, model=str(config.out / "pipeline"), width=64, height=64,
                    video=Video(frames=4), attention=({"name": "dual-scope", "train_frames": 3},))  # fmt: skip
    long_video(recipe, tmp_path / "car.mp4")
    assert (tmp_path / "car.mp4").exists()


def test_an_adapter_is_all_that_tiny_video_brings_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train_video.VideoTrainer(train_video.VideoConfig(out=tmp_path / "run"))
    load_file = importlib.import_module("reattend.pipelines.load")
    trainer.ema.shadow_params = [p.detach() + 0.01 for p in trainer.ema.shadow_params]
    whole = trainer.pipeline()
    train_video.write_adapter(whole, tmp_path / "bundle" / "tiny-video")
    assert {path.name for path in (tmp_path / "bundle" / "tiny-video").iterdir()} == {
        "model_index.json", "motion_adapter", "scheduler",
    }  # fmt: skip
    (tmp_path / "bundle" / "tiny-sd").symlink_to(load_file.TINY / "tiny-sd")
    monkeypatch.setattr(load_file, "TINY", tmp_path / "bundle")
    pipe = load_file.load("tiny-video", dtype="float16")
    assert type(pipe) is AnimateDiffPipeline
    theirs, ours = whole.unet.state_dict(), pipe.unet.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    schedules = [
        {name: value for name, value in one.scheduler.config.items() if name[0] != "_"} for one in (pipe, whole)
    ]
    assert schedules[0] == schedules[1] and type(pipe.scheduler) is type(whole.scheduler)


def test_moving_sprites_keep_apart_stay_inside_and_move() -> None:
    rng, moved = np.random.default_rng(0), 0
    for _ in range(40):
        scene = world.sample_scene(rng)
        clip = train_video.moving(scene, 16, rng)
        assert len(clip) == 16 and clip[0] == scene and all(one.caption == scene.caption for one in clip)
        for one in clip:
            for sprite in one.sprites:
                for centre in (sprite.x, sprite.y):
                    assert sprite.side / 2 - 1e-9 <= centre <= 1 - sprite.side / 2 + 1e-9
                    corner = (centre - sprite.side / 2) * world.LATTICE
                    assert abs(corner - round(corner)) < 1e-6
        sprites = [one.sprites for one in clip]
        pairs = [pair for now, then in pairwise(sprites) for pair in zip(now, then, strict=True)]
        steps = [max(abs(a.x - b.x), abs(a.y - b.y)) for a, b in pairs]
        assert max(steps) <= 1 / world.LATTICE + 1e-9
        moved += max(steps) > 0
    assert moved >= 37  # three sprites may leave each other no way


def test_tiny_flux_packs_latents_as_the_stock_pipeline_does() -> None:
    latents = torch.randn(2, 16, 8, 12)
    packed = train_flux.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 8, 12))
    assert torch.equal(train_flux.unpack(packed, 4, 6), latents)


def test_every_process_numbers_the_words_alike() -> None:
    """Merges of the tokenizers library depend on a hash seed; a training on two processes then mixes up words."""
    code = "from reattend.emoji_world.captions import build_tokenizer as b; print(sorted(b().get_vocab().items()))"
    seeds = ("1", "2")
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in seeds
    ]
    assert runs[0].stdout == runs[1].stdout
    assert str(sorted(captions.build_tokenizer().get_vocab().items())) == runs[0].stdout.strip()


def test_t5_takes_every_word_as_one_piece_and_spells_the_rest() -> None:
    tokenizer = captions.build_t5_tokenizer()
    assert tokenizer.tokenize("a blue car and an apple on sand") == [
        "▁a",
        "▁blue",
        "▁car",
        "▁and",
        "▁an",
        "▁apple",
        "▁on",
        "▁sand",
    ]
    assert "<unk>" not in tokenizer.tokenize("Hello, world!")


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
    decoder = train_vae.train(replace(config, out=tmp_path / "decoder", start_from=tmp_path / "vae", decoder_only=True))
    same = [torch.equal(a, b) for a, b in zip(whole.encoder.parameters(), decoder.encoder.parameters(), strict=True)]
    other = [torch.equal(a, b) for a, b in zip(whole.decoder.parameters(), decoder.decoder.parameters(), strict=True)]
    assert all(same)
    assert not all(other)


def test_a_pool_of_another_size_is_refused_before_captions_meet_the_wrong_pictures(
    vae_folder: Path, tmp_path: Path
) -> None:
    config = train_sd.SdConfig(vae=vae_folder, out=tmp_path, pool=3)
    train_sd.SdTrainer(config).pool("close-ups")
    with pytest.raises(ValueError, match="holds 3 pictures, the run wants 5"):
        train_sd.SdTrainer(replace(config, pool=5)).pool("close-ups")
