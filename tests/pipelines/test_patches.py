"""A picture split over ranks is the picture of one rank; what cannot be split says so; a dead rank is named."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny
import tiny_dits
import torch
from forked import forked
from lockstep import lockstep
from tiny import denoise_flux, image_ids

from reattend.attn_processors import UnsupportedModel, install
from reattend.pipelines import patches as package_patches
from reattend.pipelines import splitting
from reattend.pipelines.splitting import patches

EXACT = 1e-5  # fp32; partial softmaxes are added in another order


def as_ranks(monkeypatch: pytest.MonkeyPatch, size: int, work) -> list:
    """`work` on ranks that are threads, each of which must use a model of its own."""
    comms: dict[int, object] = {}

    def run(comm):
        comms[threading.get_ident()] = comm
        return work(comm.rank)

    monkeypatch.setattr(splitting.Comm, "of_group", lambda group=None: comms[threading.get_ident()])
    return lockstep(size, run)


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("settings", [{"radius": 3}, {"radius": 2, "pool": 2}, {"radius": 3, "start": 0.4}], ids=str)
def test_pipelines_give_the_same_latents_on_every_rank(name, ranks, settings, request, monkeypatch):
    pipe = request.getfixturevalue(name)
    builder = {"flux": tiny.flux_pipeline, "sd3": tiny.sd3_pipeline}[name]
    install(pipe, "clear", **settings)
    want = tiny.run(pipe, height=64, width=48)
    pipes = [copy.deepcopy(builder()) for _ in range(ranks)]  # tokenizers are not made for threads

    def work(rank: int) -> torch.Tensor:
        handle = install(pipes[rank], "clear", **settings)
        with patches(pipes[rank]):
            got = tiny.run(pipes[rank], height=64, width=48)
        alone = tiny.run(pipes[rank], height=64, width=48)
        handle.remove()
        assert not pipes[rank].transformer._forward_hooks and not pipes[rank].transformer._forward_pre_hooks
        return torch.stack([got, alone])

    for got, alone in as_ranks(monkeypatch, ranks, work):
        torch.testing.assert_close(got, want, atol=EXACT * float(want.abs().max()), rtol=0)
        assert torch.equal(alone, want)


@pytest.mark.parametrize("name", ["flux2", "qwenimage"])
@pytest.mark.parametrize("settings", [{"radius": 3}, {"radius": 2, "pool": 2}], ids=str)
def test_other_transformers_give_the_same_latents_on_every_rank(name, settings, monkeypatch):
    denoise = getattr(tiny_dits, f"denoise_{name}")
    models = [copy.deepcopy(getattr(tiny_dits, name)()) for _ in range(3)]
    for model in models:
        install(model, "clear", **settings)
    mask = {"encoder_hidden_states_mask": torch.arange(7).expand(2, 7) < torch.tensor([[5], [7]])}
    more = mask if name == "qwenimage" else {}
    want = denoise(models[0], (11, 6), batch=2, **more)

    def work(rank: int) -> torch.Tensor:
        with patches(models[rank]):
            return denoise(models[rank], (11, 6), batch=2, **more)

    for got in as_ranks(monkeypatch, 3, work):
        torch.testing.assert_close(got, want, atol=EXACT * float(want.abs().max()), rtol=0)
    assert torch.equal(denoise(models[0], (11, 6), batch=2, **more), want)


def test_residuals_of_a_controlnet_go_to_their_rows(monkeypatch):
    draw = torch.Generator().manual_seed(5)
    more = {
        name: [torch.randn(1, 11 * 6, 32, generator=draw)]
        for name in ("controlnet_block_samples", "controlnet_single_block_samples")
    }
    models = [tiny.fresh(tiny.flux_pipeline()).transformer for _ in range(2)]
    for model in models:
        install(model, "clear", radius=3)
    want = denoise_flux(models[0], image_ids(11, 6), **more)
    assert (want - denoise_flux(models[0], image_ids(11, 6))).abs().max() > 100 * EXACT

    def work(rank: int) -> torch.Tensor:
        with patches(models[rank]):
            return denoise_flux(models[rank], image_ids(11, 6), **more)

    for got in as_ranks(monkeypatch, 2, work):
        torch.testing.assert_close(got, want, atol=EXACT * float(want.abs().max()), rtol=0)


def test_one_rank_sends_nothing_and_changes_nothing(flux):
    install(flux, "clear", radius=3)
    want = tiny.run(flux)
    with patches(flux) as comm:
        assert torch.equal(tiny.run(flux), want)
    assert comm.sent == 0


def test_ranks_called_differently_are_named(monkeypatch):
    models = [tiny.fresh(tiny.flux_pipeline()).transformer for _ in range(2)]

    def work(rank: int) -> None:
        install(models[rank], "clear", radius=3)
        with patches(models[rank]):
            denoise_flux(models[rank], image_ids(8, 6 + rank))

    with pytest.raises(ValueError, match="rank . was called with"):
        as_ranks(monkeypatch, 2, work)


def test_what_cannot_be_split_says_so(flux, sd, monkeypatch):
    with pytest.raises(ValueError, match="install 'clear' first"), patches(flux):
        pass
    handle = install(flux, "clear", layers="^single")
    stock = "1 attention layers are stock, for example 'transformer_blocks.0.attn'"
    with pytest.raises(ValueError, match=stock), patches(flux):
        pass
    handle.remove()
    install(sd, "clear")
    monkeypatch.setattr(splitting.Comm, "of_group", lambda group=None: splitting.Comm(0, 2))
    with pytest.raises(UnsupportedModel, match="cannot be split"), patches(sd):
        pass
    assert not sd.unet._forward_hooks


JOB = """
import datetime, os, signal
import torch, torch.distributed as dist
import tiny
from reattend.attn_processors import install
from reattend.pipelines import patches

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
pipe = tiny.fresh(tiny.flux_pipeline())
install(pipe, "clear", radius=3)

def die(pipe, index, timestep, tensors):
    if {die} and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return tensors

with patches(pipe) as comm:
    latents = tiny.run(pipe, height=64, width=48, callback_on_step_end=die)
torch.save((latents, comm.sent), {out!r} + f"/rank-{{dist.get_rank()}}.pt")
"""
MODULES = ["tiny", "torch.distributed", "reattend.pipelines.splitting", "diffusers.pipelines.flux.pipeline_flux"]


def test_processes_give_the_picture_of_one(flux, tmp_path):
    install(flux, "clear", radius=3)
    want = tiny.run(flux, height=64, width=48)
    done = forked(2, JOB.format(out=str(tmp_path), die=False), MODULES)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        got, sent = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        torch.testing.assert_close(got, want, atol=EXACT * float(want.abs().max()), rtol=0)
        assert sent > 0


def test_a_rank_that_dies_is_named_and_nobody_hangs(tmp_path):
    done = forked(2, JOB.format(out=str(tmp_path), die=True), MODULES)
    assert done.returncode != 0
    assert "rank 0 waited in vain for rank 1 of 2" in done.stderr
    assert not list(tmp_path.glob("rank-*.pt"))


def test_it_is_part_of_the_package():
    assert package_patches is patches
