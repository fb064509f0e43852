"""A film does not depend on how many make it, where it was stopped, or how much is on the device at a time."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch
from films import close, make, make_on_ranks

from reattend.attn_processors import install
from reattend.attn_processors.comm import RankLost, split_rows
from reattend.attn_processors.families import family_of
from reattend.pipelines import Recipe, Video, filming, long_video, stream, writing
from reattend.pipelines import long_video as package_long_video
from reattend.pipelines.borrowing import Schedule
from reattend.pipelines.checkpoint import Moment, latest, parts_folder
from reattend.pipelines.film import frame_count, partial
from reattend.pipelines.noise import PerFrameStep, check_scheduler, frame_noise

DUAL = {"name": "dual-scope", "window": 4, "anchors": 2}


def recipe(frames: int = 7, **more) -> Recipe:
    settings = {"steps": 3, "seed": 5, "width": 32, "height": 24, "attention": (DUAL,), "negative": "a dog"}
    if "video" not in more:
        more["video"] = Video(frames=frames, later=((3, "a blue car"),), blend=2)
    return Recipe(prompt="a red cat", **(settings | more))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The film of one process; do not change it."""
    out = tmp_path_factory.mktemp("film") / "cat.mp4"
    return make(tiny.fresh(tiny.animatediff()), recipe(), out), out


@pytest.mark.parametrize("frames", [3, 9], ids=["within the window", "beyond it"])
def test_it_is_the_stock_pipeline_with_the_same_noise(animatediff, frames, tmp_path):
    wanted = recipe(frames, video=Video(frames=frames))
    if frames > 4:
        handle = install(animatediff, "dual-scope", window=4, anchors=2)
    noise = frame_noise(5, (0, frames), (4, 12, 16))
    settings = {"prompt": "a red cat", "negative_prompt": "a dog", "num_inference_steps": 3, "height": 24, "width": 32}
    want = animatediff(**settings, num_frames=frames, latents=noise, output_type="latent").frames
    if frames > 4:
        handle.remove()
    before = animatediff.unet.attn_processors
    watch = make(animatediff, wanted, tmp_path / "cat.mp4")
    close(watch.latents[3], want)
    assert animatediff.unet.attn_processors == before and "step" not in vars(animatediff.scheduler)
    assert not animatediff.unet._forward_pre_hooks and "prepare_latents" not in vars(animatediff)


def test_it_makes_films_with_sdxl_too(tmp_path):
    pipe = tiny.fresh(tiny.animatediff_sdxl())
    noise = frame_noise(5, (0, 3), (4, 12, 16))
    settings = {"prompt": "a red cat", "negative_prompt": "a dog", "num_inference_steps": 2, "height": 24, "width": 32}
    want = pipe(**settings, num_frames=3, latents=noise, output_type="latent").frames
    watch = make(pipe, recipe(steps=2, video=Video(frames=3)), tmp_path / "cat.mp4")
    close(watch.latents[2], want)
    with pytest.raises(ValueError, match="takes one pooled text for the whole film"):
        long_video(recipe(), tmp_path / "other.mp4", pipe=pipe)


def test_the_vae_of_sdxl_is_upcast_for_a_film_in_float16(tmp_path, monkeypatch):
    pipe = copy.deepcopy(tiny.animatediff_sdxl()).to(dtype=torch.float16)  # all of it: `fresh` shares the text encoders
    pipe.vae.register_to_config(force_upcast=True)
    seen, plain = [], pipe.vae.decode

    def decode(z, **more):
        seen.append({z.dtype, *(parameter.dtype for parameter in pipe.vae.parameters())})
        return plain(z, **more)

    monkeypatch.setattr(pipe.vae, "decode", decode)
    make(pipe, recipe(steps=1, video=Video(frames=3)), tmp_path / "cat.mp4")
    assert seen == [{torch.float32}]
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}


def test_an_offloaded_vae_and_a_resumed_film_are_computed_where_the_hooks_say():
    class Vae:
        device, dtype, config = torch.device("meta"), torch.float32, SimpleNamespace(scaling_factor=1.0)
        _hf_hook = SimpleNamespace(execution_device=torch.device("cpu"))

        def decode(self, z, return_dict):
            assert z.device.type == "cpu"
            return (torch.zeros(len(z), 3, 4, 4),)

    assert writing.decoded(Vae(), torch.zeros(1, 4, 2, 2, 2), torch.float32).shape == (2, 4, 4, 3)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    away = SimpleNamespace(scheduler=scheduler, prepare_latents=None, _execution_device=torch.device("meta"))
    history = {"model_outputs": [None, torch.ones(3, 4, 2, 2)], "lower_order_nums": 1}
    schedule = Schedule(away, Moment(1, torch.zeros(1, 4, 3, 2, 2), history))
    schedule(4)
    assert schedule.latents().device.type == scheduler.model_outputs[1].device.type == "meta"
    assert scheduler.lower_order_nums == 1 and len(scheduler.timesteps) == 4


def test_the_file_plays_and_tells_how_it_was_made(alone):
    watch, out = alone
    import imageio_ffmpeg

    assert imageio_ffmpeg.count_frames_and_secs(str(out))[0] == 7
    made = Recipe.read(out)
    assert replace(made, made_with={}, attention=(), guidance=None, dtype=None, model="tiny-sd") == replace(
        recipe(), attention=()
    )
    assert made.attention[0]["window"] == 4 and made.made_with["pipeline"] == "AnimateDiffPipeline"
    assert not parts_folder(out).exists() and not partial(out).exists()
    steps = [event for event in watch.events if event.latents is not None]
    assert [event.step for event in steps] == [1, 2, 3] and all(event.steps == 3 for event in steps)
    assert steps[-1].eta == 0 and watch.events[-1].clips == 1


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_make_the_film_of_one(alone, size, tmp_path, monkeypatch):
    watch, out = alone
    latents = make_on_ranks(monkeypatch, size, recipe(), tmp_path / "cat.mp4")
    close(latents[3], watch.latents[3])
    assert (tmp_path / "cat.mp4").read_bytes()[-2000:] == out.read_bytes()[-2000:]  # the frames as bytes, so the file


def test_no_rank_runs_ahead_while_the_file_is_written(alone, tmp_path, monkeypatch):
    _, whole = alone
    at, ahead, plain = [0, 0], [], filming._Making._told_clip

    def told(self, number, chunks, *more):
        if self.control.rank == 0:
            time.sleep(0.05)  # the first rank is slow
        at[self.control.rank] = number
        ahead.append(abs(at[0] - at[1]))
        plain(self, number, chunks, *more)

    monkeypatch.setattr(filming._Making, "_told_clip", told)
    monkeypatch.setattr(writing, "DECODED", 1)
    make_on_ranks(monkeypatch, 2, recipe(), tmp_path / "cat.mp4")
    assert len(ahead) == 2 * 7 and max(ahead) <= 1
    assert (tmp_path / "cat.mp4").read_bytes()[-2000:] == whole.read_bytes()[-2000:]


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("EulerAncestralDiscreteScheduler", 2),
        ("DPMSolverMultistepScheduler", 2),
        ("LCMScheduler", 2),
        ("HeunDiscreteScheduler", 3),  # in the middle of a pair of calls
    ],
)
def test_chance_and_history_of_schedulers_do_not_depend_on_the_ranks_or_on_a_stop(name, stop, tmp_path, monkeypatch):
    def change(pipe):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)

    pipe = tiny.fresh(tiny.animatediff())
    change(pipe)
    wanted = recipe(5, steps=4, video=Video(frames=5))
    want = make(pipe, wanted, tmp_path / "whole.mp4").latents
    constants = {key: type(value) for key, value in vars(pipe.scheduler).items()}
    last = max(want)
    stopped = make_on_ranks(monkeypatch, 2, wanted, tmp_path / "cat.mp4", change, stop_after=stop)
    assert max(stopped) == stop < last and not (tmp_path / "cat.mp4").exists()
    close(make(pipe, wanted, tmp_path / "cat.mp4").latents[last], want[last])  # one process goes on
    assert {key: type(value) for key, value in vars(pipe.scheduler).items()} == constants


def test_a_stopped_film_goes_on_to_the_very_same_frames(alone, animatediff, tmp_path):
    watch, _ = alone
    out = tmp_path / "cat.mp4"
    stopped = make(animatediff, recipe(), out, stop_after=2)
    assert max(stopped.latents) == 2 and latest(parts_folder(out)).step == 2
    resumed = make(animatediff, recipe(), out)
    assert min(resumed.latents) == 3 and torch.equal(resumed.latents[3], watch.latents[3])
    assert out.exists() and not parts_folder(out).exists()


def test_a_film_that_died_while_it_was_written_is_written_anew(alone, animatediff, tmp_path, monkeypatch):
    _, whole = alone
    out = tmp_path / "cat.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(filming._Making, "_told_clip", lambda *_: (_ for _ in ()).throw(RuntimeError("died")))
        with pytest.raises(RuntimeError, match="died"):
            make(animatediff, recipe(), out)
    assert partial(out).exists() and latest(parts_folder(out)).step == 3
    again = make(animatediff, recipe(), out)
    assert not again.latents and out.read_bytes()[-2000:] == whole.read_bytes()[-2000:]


def test_one_rank_that_is_asked_stops_all_within_a_step(animatediff, tmp_path, monkeypatch):
    modules = len(family_of(animatediff.unet).motion_modules(animatediff.unet))
    calls, plain, out = [0, 0], stream._TileWise.__call__, tmp_path / "cat.mp4"

    def counted(self, *args, **more):
        rank = self.work.film.comm.rank
        calls[rank] += 1
        if rank == 1 and calls[1] == modules + 2:  # in the second step
            self.work.cancel.request()
        return plain(self, *args, **more)

    monkeypatch.setattr(stream._TileWise, "__call__", counted)
    latents = make_on_ranks(monkeypatch, 2, recipe(), out, stop_after=99)
    assert calls == [modules + 2] * 2 and list(latents) == [1]
    assert latest(parts_folder(out)).step == 1  # kept when it stopped, well before five minutes were over


def test_one_rank_that_is_asked_stops_the_writing(alone, animatediff, tmp_path, monkeypatch):
    plain, out = filming._Making._told_clip, tmp_path / "cat.mp4"

    def told(self, number, *more):
        if self.control.rank == 1 and number == 2:
            self.cancel.request()
        plain(self, number, *more)

    monkeypatch.setattr(filming._Making, "_told_clip", told)
    monkeypatch.setattr(writing, "DECODED", 1)
    make_on_ranks(monkeypatch, 2, recipe(), out, stop_after=99)
    assert frame_count(partial(out)) == 3 and not out.exists()
    make(animatediff, recipe(), out)
    assert out.read_bytes()[-2000:] == alone[1].read_bytes()[-2000:]


def test_a_damaged_checkpoint_is_passed_over(alone, animatediff, tmp_path):
    watch, _ = alone
    out = tmp_path / "cat.mp4"
    make(animatediff, recipe(), out, stop_after=2, save_every=0)
    folder = parts_folder(out)
    (shard,) = folder.glob("step-000002/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.warns(UserWarning, match=r"step-000002 is not used: .* is damaged"):
        resumed = make(animatediff, recipe(), out)
    assert min(resumed.latents) == 2 and torch.equal(resumed.latents[3], watch.latents[3])


def test_an_unfinished_film_of_another_recipe_or_model_is_not_touched(animatediff, tmp_path):
    out = tmp_path / "cat.mp4"
    make(animatediff, recipe(), out, stop_after=1)
    with pytest.raises(ValueError, match="unfinished film of another recipe or model"):
        make(animatediff, recipe(seed=6), out)
    with torch.no_grad():
        animatediff.unet.conv_out.bias += 1
    with pytest.raises(ValueError, match="unfinished film of another recipe or model"):
        make(animatediff, recipe(), out)
    manifest = json.loads(next(parts_folder(out).glob("*/manifest.json")).read_text())
    assert manifest["recipe"]["seed"] == 5 and manifest["step"] == 1


def test_a_rank_that_is_gone_is_named_with_the_step(animatediff, tmp_path, monkeypatch):
    class Gone(filming.Comm):
        def _exchange(self, messages):
            if self.place.startswith("step"):
                raise RankLost(self._lost([1], OSError("connection closed")))
            for way, _, tensor in messages:
                if way == "from":
                    tensor.copy_(next(sent for way, _, sent in messages if way == "to"))

    monkeypatch.setattr(filming.Comm, "of_group", lambda group=None: Gone(0, 2))
    monkeypatch.setattr(filming._Making, "_save", lambda *_: None)
    with pytest.raises(RankLost, match=r"waited in vain for rank 1 of 2 in step 1"):
        make(
            animatediff,
            recipe(6, video=Video(frames=6), attention=({**DUAL, "window": 1, "anchors": 0},)),
            tmp_path / "a.mp4",
        )


def test_noise_depends_on_seed_and_frame_alone():
    whole = frame_noise(3, (0, 9), (4, 2, 3))
    parts = torch.cat([frame_noise(3, part, (4, 2, 3)) for part in split_rows(9, 4)], dim=2)
    assert whole.shape == (1, 4, 9, 2, 3) and torch.equal(whole, parts)
    assert not torch.equal(whole, frame_noise(4, (0, 9), (4, 2, 3)))
    assert abs(float(frame_noise(3, (0, 400), (4, 4, 4)).std()) - 1) < 0.02


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler", "LCMScheduler",
     "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler", "HeunDiscreteScheduler"],
)  # fmt: skip
def test_usual_schedulers_treat_every_frame_on_its_own(name):
    scheduler = getattr(diffusers, name)()
    check_scheduler(scheduler, 4)
    assert "step" not in vars(scheduler)


def test_schedulers_that_mix_frames_are_refused():
    with pytest.raises(ValueError, match="looks at all frames at once"):
        check_scheduler(diffusers.DDIMScheduler(thresholding=True), 4)

    class Mixing(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **more):
            return super().step(model_output - model_output.mean(), timestep, sample, **more)

    with pytest.raises(ValueError, match="does not treat every frame on its own"):
        check_scheduler(Mixing(), 4)


def test_step_noise_differs_between_steps_and_frames():
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(4)
    step, x = PerFrameStep(scheduler, 1, (0, 2)), torch.zeros(1, 4, 2, 3, 3)
    first = step(x, scheduler.timesteps[0], x).prev_sample
    second = step(x, scheduler.timesteps[1], x).prev_sample
    assert not torch.allclose(first[:, :, 0], first[:, :, 1])
    assert not torch.allclose(first / first.std(), second / second.std())


def test_what_makes_no_film_says_so(animatediff, sd, tmp_path):
    out = tmp_path / "cat.mp4"
    with pytest.raises(ValueError, match="StableDiffusionPipeline makes no film"):
        long_video(recipe(), out, pipe=sd)
    with pytest.raises(ValueError, match="the recipe has no video"):
        long_video(recipe(video=None), out, pipe=animatediff)
    with pytest.raises(ValueError, match="asks for a linear student, which films cannot use"):
        long_video(recipe(linear="student", attention=()), out, pipe=animatediff)
    with pytest.raises(ValueError, match="ends in .mp4"):
        long_video(recipe(), tmp_path / "cat.png", pipe=animatediff)
    with pytest.raises(ValueError, match=r"the prompt from frame 3 is too long: got 100 tokens"):
        long_video(recipe(video=Video(frames=7, later=((3, "x" * 100),))), out, pipe=animatediff)
    schedule = tuple((frame, "a blue car on the sea under a red balloon " + "x" * 30) for frame in range(1, 1400))
    with pytest.raises(
        ValueError, match=r"recipe is too long to be kept in the film: got 1\d\d,\d{3} bytes, .* shorter later"
    ):
        long_video(recipe(video=Video(frames=1400, later=schedule)), out, pipe=animatediff)
    animatediff.enable_free_init()
    with pytest.raises(ValueError, match="FreeInit, which mixes all frames"):
        long_video(recipe(), out, pipe=animatediff)
    animatediff.disable_free_init()
    animatediff.enable_free_noise(context_length=4, context_stride=2)
    with pytest.raises(ValueError, match="FreeNoise, another way"):
        long_video(recipe(), out, pipe=animatediff)
    assert not out.exists() and not parts_folder(out).exists()


@pytest.mark.parametrize("how", ["wrapped", "in place", "ControlNet"])
def test_compiled_models_are_refused(how, tmp_path):
    pipe = tiny.fresh(tiny.animatediff() if how != "ControlNet" else tiny.animatediff_inputs("ControlNet", nets=2))
    if how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    elif how == "in place":
        pipe.unet.compile(backend="eager")
    else:
        pipe.controlnet.nets[1].compile(backend="eager")
    with pytest.raises(
        ValueError, match=r"has a compiled UNet or ControlNet, .* load the pipeline without torch.compile"
    ):
        long_video(recipe(), tmp_path / "cat.mp4", pipe=pipe)


def test_weights_that_are_broken_are_told_and_no_film_is_left(animatediff, tmp_path):
    animatediff.vae = copy.deepcopy(animatediff.vae)  # the fixture's is shared
    with torch.no_grad():
        animatediff.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not numbers"):
        long_video(recipe(), tmp_path / "cat.mp4", pipe=animatediff)
    assert not (tmp_path / "cat.mp4").exists()


def test_more_ranks_than_frames_and_unknown_seeds_are_refused(tmp_path, monkeypatch, animatediff):
    monkeypatch.setattr(filming.Comm, "of_group", lambda group=None: filming.Comm(0, 9))
    with pytest.raises(ValueError, match="7 frames cannot be split over 9 ranks; use at most 7"):
        long_video(recipe(), tmp_path / "cat.mp4", pipe=animatediff)
    with pytest.raises(ValueError, match="needs a seed that all of them know"):
        long_video(recipe(seed=None), tmp_path / "cat.mp4", pipe=animatediff)


def test_it_is_part_of_the_package():
    assert package_long_video is filming.long_video
