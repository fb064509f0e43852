"""What only a CUDA card can show: the kernels it compiles, its number formats, its memory, and models that lie on it.

Most tests compare with the CPU, whose numbers the rest of the suite judges. Without a card all are skipped.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from attention_oracle import oracle, qkv, some_valid
from films import Watch
from lockstep import lockstep
from safetensors.torch import load_file
from torch import Tensor

from reattend.attn_processors import install, installed
from reattend.attn_processors.comm import Comm
from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.local import local_attention
from reattend.attn_processors.ops.patterns import Disc, Square, TileWindow
from reattend.attn_processors.ops.pool import Pool
from reattend.distill import DistillConfig, distill, make_dataset
from reattend.distill.checkpoint import newest
from reattend.distill.ranks import Ranks
from reattend.emoji_world import train_flux
from reattend.pipelines import Recipe, Video, filming, load, long_video, patches, splitting, story
from reattend.pipelines.events import CancelToken
from reattend.pipelines.load import TINY
from reattend.pipelines.script import Panel, Script, Subject
from reattend.pipelines.stream import streamed
from reattend.pipelines.writing import decoded

CARD, CPU = torch.device("cuda"), torch.device("cpu")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]

FLEX = 2e-6  # fp32 values of the block-sparse kernel, here of size 1; with TF32 they would err by 1e-3
EXACT = 5e-6  # fp32 values; torch's fused attention makes each fp32 product of three TF32 ones, a bit less exact
GRADIENT = 2e-5  # fp32; sums of some hundred terms, in the order in which threads arrive
ROUNDED = 1e-2  # bf16, relative norm: numbers have 8 bits (2e-3 on average), and weights and products are rounded, too
SAME = 1e-4  # fp32, relative to the largest value: other kernels of one card, through a model and two steps
CLOSE = 1e-3  # the same between card and CPU, whose convolutions and exponentials differ as well; TF32 makes it 1e-2
LEVELS = 2  # of 255: what CLOSE can make of a picture where two levels meet

# A single tile; pooled keys that weigh more than one (a score function); several samples that hide other text; tokens that
# lie as the block-sparse kernel wants them.
CASES = [
    (TokenLayout(13, 9), Disc(3.5), TileWindow((4, 4), 2), None),
    (TokenLayout(20, 20, before=7), Square(7), TileWindow((8, 8), 4), Pool(2, budget=6)),
    (TokenLayout(20, 20, before=77), Disc(5), TileWindow((4, 8), 3), None),
    (TokenLayout(16, 32, before=128, order="tile"), Disc(4), TileWindow((8, 16), 5), None),
]


@pytest.fixture(autouse=True)
def fp32_is_fp32() -> Iterator[None]:
    """No TF32, which convolutions would use by default. The block-sparse kernel follows the setting of products."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@cache
def model(name: str, place: torch.device) -> Any:
    """A bundled model; leave it as it was."""
    return tiny.quiet(load(name, device=place, dtype="float32"))


def near(got: Tensor, want: Tensor, tolerance: float = CLOSE) -> None:
    torch.testing.assert_close(got.cpu(), want.cpu(), atol=tolerance * float(want.abs().max()), rtol=0)


def alike(got: Any, want: Any) -> None:
    assert np.abs(np.asarray(got).astype(int) - np.asarray(want).astype(int)).max() <= LEVELS


def differentiated(attend: Any, q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v, in fp64 on the CPU."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    return [x.detach().double().cpu() for x in (out, *torch.autograd.grad((out * weight).sum(), inputs))]


def local_and_oracle(number: int, backend: str, dtype: torch.dtype) -> tuple[TokenLayout, list[Tensor], list[Tensor]]:
    """Values and gradients of a backend on the card, and what they should be."""
    layout, pattern, window, pool = CASES[number]
    seen = window if backend == "tile" else pattern
    valid = some_valid(layout, 2) if layout.before == 77 else None
    inputs = [*qkv(layout, 2, width=32, dtype=dtype), qkv(layout, 2, width=32, dtype=dtype, seed=1)[0]]
    more = {"pool": pool, "key_valid": None if valid is None else valid.to(CARD), "backend": backend}
    got = differentiated(lambda *x: local_attention(*x, layout, seen, **more), *(x.to(CARD) for x in inputs))
    want = differentiated(lambda *x: oracle(*x, layout, seen, pool, valid=valid), *(x.double() for x in inputs))
    return layout, got, want


@pytest.mark.parametrize("backend", ["halo", "tile", "flex"])
@pytest.mark.parametrize("number", range(len(CASES)))
def test_local_attention_on_the_card_has_the_values_and_gradients_of_the_oracle(number, backend):
    layout, got, want = local_and_oracle(number, backend, torch.float32)
    errors = [float((a - b).abs().max()) for a, b in zip(got, want, strict=True)]
    assert errors[0] <= EXACT and max(errors[1:]) <= GRADIENT, errors
    if backend == "flex":  # text queries are not its own
        assert float((got[0] - want[0])[:, layout.grid].abs().max()) <= FLEX


@pytest.mark.parametrize("backend", ["halo", "tile", "flex"])
def test_local_attention_in_bfloat16_errs_by_rounding_only(backend):
    _, got, want = local_and_oracle(1, backend, torch.bfloat16)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= ROUNDED, errors


def test_clear_over_the_whole_grid_is_stock_on_the_card_and_leaves_no_trace():
    pipe = model("tiny-flux", CARD)
    want = tiny.run(pipe, height=128, width=192)
    with installed(pipe, "clear", radius=1000.0):
        near(tiny.run(pipe, height=128, width=192), want, SAME)
    assert torch.equal(tiny.run(pipe, height=128, width=192), want)


@pytest.mark.parametrize("backend", ["halo", "flex"])
def test_clear_on_the_card_draws_what_it_draws_on_the_cpu(backend):
    made = []
    for pipe, means in ((model("tiny-flux", CPU), "reference"), (model("tiny-flux", CARD), backend)):
        with installed(pipe, "clear", radius=3.0, backend=means):
            made.append(tiny.run(pipe, height=192, width=256))
    near(made[1], made[0])


def test_agent_attention_on_the_card_draws_what_it_draws_on_the_cpu():
    made = []
    for pipe in (model("tiny-sd", CPU), model("tiny-sd", CARD)):
        stock = tiny.run(pipe, height=128, width=128)
        with installed(pipe, "agent"):
            made.append(tiny.run(pipe, height=128, width=128))
        assert (made[-1] - stock).abs().max() > 10 * CLOSE * stock.abs().max()
    # Which tokens merge is a choice by likeness: where two are nearly as like, a few tokens may be merged otherwise.
    assert (made[1].cpu() - made[0]).abs().median() <= CLOSE * made[0].abs().max()


@pytest.mark.parametrize("bank", [None, 2**26], ids=["rows", "bank"])
def test_a_story_of_two_on_the_card_has_the_pictures_of_the_cpu(bank):
    script = Script(
        subjects=(
            Subject(name="Tom", phrase="cat", looks="blue cat", prompt="a blue cat", place=[0, 0, 1, 1]),
            Subject(name="Rex", phrase="car", looks="red car", prompt="a red car", place=[0, 0, 1, 1]),
        ),
        panels=(Panel(prompt="a cat and a car on sand", places={"Tom": [0, 0, 0.5, 1], "Rex": [0.5, 0, 1, 1]}),),
        steps=2, seed=1, bank=bank,
    )  # fmt: skip
    want, got = (story(script, pipe=model("tiny-sd", place)) for place in (CPU, CARD))
    assert list(got.references) == ["Tom", "Rex"]
    for name, picture in (got.panels | got.references).items():
        alike(picture, (want.panels | want.references)[name])


def test_a_film_streamed_through_the_card_has_the_frames_of_the_cpu(tmp_path, monkeypatch):
    pictures: list[Tensor] = []
    keep = lambda pipe, *args: pictures.append(decoded(pipe.vae, args[2], torch.float32))  # noqa: E731
    monkeypatch.setattr(filming, "write_film", keep)
    monkeypatch.setattr(filming, "require_ffmpeg", lambda: None)  # not on every machine with a card
    video, scopes = Video(frames=24, later=((12, "a blue car"),)), {"name": "dual-scope", "window": 8, "anchors": 4}
    recipe = Recipe(prompt="a red cat", steps=2, seed=5, width=64, height=64, video=video, attention=(scopes,))
    want, got = Watch(), Watch()
    for watch, place in ((want, CPU), (got, CARD)):
        long_video(recipe, tmp_path / f"{len(pictures)}.mp4", pipe=model("tiny-video", place), on_step=watch, clip=8)
    assert got.latents[2].device == CPU  # where the film is kept
    near(got.latents[2], want.latents[2])
    alike(pictures[1], pictures[0])


def peak(work: Any) -> int:
    """Bytes on the card at the peak, above those before."""
    torch.cuda.reset_peak_memory_stats(CARD)
    before = torch.cuda.memory_allocated(CARD)
    work()
    return torch.cuda.max_memory_allocated(CARD) - before


@torch.no_grad()
def test_a_film_twice_as_long_takes_no_more_of_the_card():
    pipe, unet, most = model("tiny-video", CARD), model("tiny-video", CARD).unet, {}
    with installed(pipe, "dual-scope", window=8, anchors=4):
        for frames in (64, 64, 128):  # the first run takes the workspaces of the card's libraries, which stay
            side, text = unet.config.sample_size, torch.zeros(frames, 16, unet.config.cross_attention_dim)
            sample = torch.zeros(1, unet.config.in_channels, frames, side, side)
            with streamed(pipe, frames, comm=Comm()):
                most[frames] = peak(lambda sample=sample, text=text: unet(sample, torch.tensor(900), text))
    assert 0 < most[128] <= 1.05 * most[64], most


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_training_in_half_precision_on_the_card_goes_on_where_it_stopped(precision, tmp_path):
    asked = {"prompts": ["a cat"], "samples": 8, "steps": 1, "sizes": [(32, 32)], "text_length": 16}
    samples = make_dataset(tiny.fresh(tiny.flux_pipeline()), tmp_path / "samples", **asked)
    pipe = copy.deepcopy(tiny.flux_pipeline()).to(CARD, getattr(torch, precision))

    def train(name: str, stop: int = 4) -> Tensor:
        config = DistillConfig(
            model="tiny-random-flux", data=samples, out=tmp_path / name, steps=4, batch=4, micro_batch=2, lr=1e-3,
            attention={"name": "clear", "radius": 2, "backend": "halo"}, precision=precision, log_every=1,
        )  # fmt: skip
        token = CancelToken()
        distill(config, pipe=pipe, cancel=token, on_step=lambda event: token.request() if event.step == stop else None)
        about, file = newest(config.out / "checkpoints")
        assert about["step"] == stop and bool(about["scaler"]) == (precision == "float16")
        return torch.cat([x.view(-1) for name, x in sorted(load_file(file).items()) if name.startswith("trained.")])

    whole, half, parts = train("whole"), train("parts", 2), train("parts")
    logged = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert len(logged) == 4 and all(np.isfinite(line["loss"]) for line in logged)
    # Threads arrive in any order, and AdamW's steps do not shrink with the gradient; without its averages it is 0.5.
    assert (parts - half).norm() > 0 and (parts - whole).norm() <= 0.1 * (half - whole).norm()


def test_two_ranks_on_the_card_draw_the_picture_of_one(monkeypatch):
    pipe, comms = model("tiny-flux", CARD), {}
    with installed(pipe, "clear", radius=3.0, pool=2):
        want = tiny.run(pipe, height=192, width=128)
    copies = [copy.deepcopy(pipe) for _ in range(2)]
    monkeypatch.setattr(splitting.Comm, "of_group", lambda group=None: comms[threading.get_ident()])

    def work(comm: Comm) -> Tensor:
        comms[threading.get_ident()] = comm
        install(copies[comm.rank], "clear", radius=3.0, pool=2)
        with patches(copies[comm.rank]):
            return tiny.run(copies[comm.rank], height=192, width=128)

    for got in lockstep(2, work):
        near(got, want, SAME)


def test_a_group_with_nccl_works_for_tensors_of_card_and_cpu(tmp_path):
    backend = "cpu:gloo,cuda:nccl"  # as the command line does
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for place in (CARD, CPU):  # it takes itself for one of two, else it would not ask the group
            ranks = Ranks(SimpleNamespace(device=place, process_index=0, num_processes=2))
            assert ranks.any(True) and not ranks.any(False)
            assert torch.equal(ranks.mean(torch.ones(3, device=place)), torch.full((3,), 0.5, device=place))
    finally:
        dist.destroy_process_group()


def test_tiny_flux_trains_on_the_card_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(train_flux.FluxTrainer, "large", 0.0)
    config = train_flux.FluxConfig(
        vae=TINY / "tiny-sd" / "vae", out=tmp_path / "whole", steps=4, close_up_steps=1, guided_steps=2, text_steps=2, pool=6,
        batch=4, save_every=1,
    )  # fmt: skip
    whole = train_flux.FluxTrainer(config)
    whole.train()
    assert all(torch.isfinite(p).all() and p.device.type == CARD.type for p in whole.parameters)

    train_flux.FluxTrainer(replace(config, out=tmp_path / "parts", steps=2, guided_steps=0)).train()
    parts = train_flux.FluxTrainer(replace(config, out=tmp_path / "parts"))
    assert parts.done == 2
    parts.train()
    for a, b in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)  # a step of the warm-up either way
    assert load(config.out / "pipeline", device="cpu").transformer.dtype == torch.float32
