"""Where a run is: one rule for the step, read at most once, never counted."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusionImg2ImgPipeline
from small_methods import Exact, Halves, Recording, RowMeans

from reattend.attn_processors import install, installed
from reattend.attn_processors.context import context_of


def seen(pipe: Any) -> list[tuple[float, int | None]]:
    return context_of(pipe.unet).slots["seen"]


def test_progress_is_the_place_of_the_timestep_in_the_schedule_and_starts_again(sd):
    install(sd, Recording())
    for _ in range(2):
        tiny.run(sd, num_inference_steps=4)
    assert seen(sd) == [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)] * 2


def test_repeated_timesteps_of_a_second_order_scheduler_stay_in_order(sd):
    sd.scheduler = HeunDiscreteScheduler.from_config(sd.scheduler.config)
    install(sd, Recording())
    tiny.run(sd, num_inference_steps=3)
    steps = [step for _, step in seen(sd)]
    assert steps == sorted(steps) and len(steps) == len(sd.scheduler.timesteps) == 5


def test_image_to_image_starts_in_the_middle_of_the_schedule(sd):
    pipe = tiny.quiet(StableDiffusionImg2ImgPipeline.from_pipe(sd, requires_safety_checker=False))
    install(pipe, Recording())
    picture = torch.rand(1, 3, 32, 32)
    pipe("a car", image=picture, strength=0.5, num_inference_steps=4, output_type="latent")
    assert seen(pipe) == [(0.5, 2), (0.75, 3)]


def test_a_scheduler_swapped_after_installing_is_found(sd):
    install(sd, Recording())
    sd.scheduler = type(sd.scheduler).from_config(sd.scheduler.config, num_train_timesteps=500)
    tiny.run(sd, num_inference_steps=2)
    assert seen(sd) == [(0.0, 0), (0.5, 1)]


def test_a_bare_model_goes_by_the_timestep(unet):
    install(unet, Recording())
    for t in (999, 400, 0):
        tiny.denoise(unet, t=t)
    progress = [round(value, 3) for value, _ in context_of(unet).slots["seen"]]
    assert progress == [0.001, 0.6, 1.0]
    assert all(value < 1 for value, _ in context_of(unet).slots["seen"])


def test_two_pipelines_may_share_a_denoiser(sd):
    other = tiny.quiet(StableDiffusionImg2ImgPipeline.from_pipe(sd, requires_safety_checker=False))
    other.scheduler = type(sd.scheduler).from_config(sd.scheduler.config)  # its own, with another number of steps
    handle = install(sd, Recording())
    picture = torch.rand(1, 3, 32, 32)
    other("a car", image=picture, strength=1.0, num_inference_steps=3, output_type="latent")
    tiny.run(sd, num_inference_steps=2)
    progress = [value for value, _ in seen(sd)]
    assert len(progress) == 5 and progress[:3] == sorted(progress[:3]) and progress[3:] == [0.0, 0.5]
    handle.remove()
    assert not other.unet._forward_pre_hooks


def test_rows_at_different_timesteps_are_an_error_for_phases_only(unet):
    sample, text, times = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32), torch.tensor([10, 20])
    with installed(unet, Halves()), pytest.raises(ValueError, match="different timesteps .10 to 20."):
        unet(sample, times, text)
    with installed(unet, Exact()):
        unet(sample, times, text)


class CountedReads(torch.Tensor):
    """A timestep that counts how often somebody turns it into Python."""

    reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in {"tolist", "item", "__float__", "__int__"}:
            CountedReads.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(("method", "reads"), [(Exact(), 0), (Recording(), 1)], ids=["plain", "phases"])
def test_reads_the_timestep_at_most_once_and_only_for_phases(unet, method, reads):
    install(unet, method)
    CountedReads.reads = 0
    time = torch.tensor(500.0).as_subclass(CountedReads)
    context_of(unet)(unet, (torch.randn(1, 4, 8, 8), time), {})
    assert CountedReads.reads == reads


def test_phases_change_the_picture_only_where_they_differ(sd):
    stock = tiny.run(sd, num_inference_steps=4)
    steps: dict[int, torch.Tensor] = {}

    def keep(pipe: Any, step: int, t: Any, tensors: dict) -> dict:
        steps[step] = tensors["latents"]
        return tensors

    plain: dict[int, torch.Tensor] = {}
    tiny.run(sd, num_inference_steps=4, callback_on_step_end=lambda p, i, t, k: plain.update({i: k["latents"]}) or k)
    with installed(sd, Halves()):
        out = tiny.run(sd, num_inference_steps=4, callback_on_step_end=keep)
    torch.testing.assert_close(steps[1], plain[1], atol=1e-5, rtol=0)
    assert (out - stock).abs().max() > 1e-3


@dataclass(frozen=True, kw_only=True)
class Keeping(Exact):
    name = "keeping"

    def prepare(self, context: Any) -> None:
        context.slots["rows"] = context.batch


def test_slots_are_not_copied_with_the_model(unet):
    install(unet, Keeping())
    tiny.denoise(unet, batch=3)
    assert context_of(unet).slots == {"rows": 3}
    assert context_of(copy.deepcopy(unet)).slots == {}


def test_threads_with_a_denoiser_each_do_not_disturb_each_other():
    sizes = [(8, 12), (6, 10), (12, 8)]
    models = [tiny.unet(seed) for seed in range(len(sizes))]
    for model in models:
        install(model, RowMeans())
    want = [tiny.denoise(model, size=size) for model, size in zip(models, sizes, strict=True)]
    got: dict[int, list[torch.Tensor]] = {}
    start = threading.Barrier(len(sizes))

    def work(index: int) -> None:
        start.wait()
        got[index] = [tiny.denoise(models[index], size=sizes[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, want[index]) for index in got for out in got[index]) and len(got) == len(sizes)
