"""What does a long film cost? Time and memory of the UNet per frame and step, from a clip to a thousand frames.

Arms: ours, streamed, and diffusers' own FreeNoise (overlapping windows, arXiv 2310.15169) as what one would use instead.
Both run two calls of an AnimateDiff UNet with guidance, made of tiny-sd and motion modules with random weights. *Working set*
is what lives on the device beside weights and full-length tensors: the most bytes that one clip or tile has at once, as
PyTorch's counter tells it on CUDA, and our own elsewhere.

Besides: the same film on one process and on two, the bytes they send against those foretold, and a prediction for
Stable Diffusion 1.5 on up to 1,024 GPUs from the very same plan; and for the model that was measured the minutes of a whole
long film on eight such devices.
"""

from __future__ import annotations

import json as json_text
import os
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..attn_processors import install, installed
from ..attn_processors.comm import Comm, rounds, split_rows
from ..attn_processors.families import family_of
from ..attn_processors.ops.scopes import Clip
from ..pipelines import Recipe, load, stream
from ..pipelines.stream import bytes_per_step, streamed
from .frame import Conditions, Found, cell, goal, grid, page, run_benchmark
from .measure import Run, measured

__all__ = ["PEER", "free_noise", "predict", "run", "table", "whole_run", "working_set"]

STEPS = 2
LENGTHS, QUICK_LENGTHS = (16, 64, 256, 1024), (17,)
OURS, PEER, PEER_LONGEST = "ours", "FreeNoise", 256  # it holds all frames at once; longer ones are left out on a CPU
CONTEXT, STRIDE = 16, 4  # frames of its windows, and from one window to the next
RANKS_FRAMES, QUICK_RANKS_FRAMES = 64, 4
GUIDED = 2  # rows of a call
RUNS = {OURS: 3, PEER: 1}  # an arm takes as long as so many timed runs: ours is run once more and weighed, slowly

# The prediction: what is known from the plan is computed, what is not is said here.
PREDICTED_RANKS = (2, 8, 16, 64, 256, 1024)
FRAME_SECONDS = 0.0176  # of one frame and step on one GPU, an assumption for Stable Diffusion 1.5 at 512 x 512 in fp16
FRAMES_PER_RANK = 24
NEIGHBOURS = 2  # ranks a rank has windows in common with
INSIDE, ACROSS, MESSAGE_SECONDS, GPUS_PER_HOST = 250e9, 45e9, 10e-6, 8  # bytes per second in a host and between hosts
WHOLE_FRAMES, WHOLE_RANKS = 2304, 8  # the film whose whole run is predicted


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, and keeps the highest sum that was alive at once.

    given: tensors whose memory was there before, and of which views are none of the operations' own.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {value.untyped_storage()._cdata for value in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextmanager
def working_set() -> Iterator[dict[str, int]]:
    """Measure the most bytes that one clip or tile makes while it goes through one module."""
    found, plain = {"bytes": 0}, stream.run_part

    def weighed(forward: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]  # on a CPU views of the whole film
        with Meter(given) as meter:
            out = plain(forward, args, kwargs)
        found["bytes"] = max(found["bytes"], sum(x.nbytes for x in given) + meter.most)
        return out

    stream.run_part = weighed
    try:
        yield found
    finally:
        stream.run_part = plain


def build(device: torch.device) -> Any:
    """An AnimateDiff pipeline of tiny-sd and motion modules with random weights."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    base = load("tiny-sd", device="cpu", dtype="float32")
    torch.manual_seed(0)
    config = base.unet.config
    adapter = MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.layers_per_block,
        motion_norm_num_groups=config.norm_num_groups,
        motion_num_attention_heads=4,
    )
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    parts = {name: base.components[name] for name in names}
    return AnimateDiffPipeline(**parts, motion_adapter=adapter).to(device)


@torch.no_grad()
def call(model: Any, frames: int, device: torch.device) -> None:
    """STEPS calls of the UNet on noise, latents in host memory if they are streamed."""
    side, draw = model.config.sample_size, torch.Generator().manual_seed(0)
    sample = torch.randn(GUIDED, model.config.in_channels, frames, side, side, generator=draw).to(device)
    text = torch.randn(GUIDED * frames, 16, model.config.cross_attention_dim, generator=draw).to(device)
    for step in range(STEPS):
        model(sample, torch.tensor(900 - step), text)


def ours(pipe: Any, frames: int, device: torch.device) -> dict[str, Any]:
    handle = install(pipe, "dual-scope")
    try:
        with streamed(pipe, frames, comm=Comm()):
            run = measured(lambda: call(pipe.unet, frames, torch.device("cpu")), device)
            weighed = run.peak_mib
            if device.type != "cuda":
                with working_set() as found:
                    call(pipe.unet, frames, torch.device("cpu"))
                weighed = found["bytes"] / 2**20
    finally:
        handle.remove()
    return _told(OURS, frames, run) | {"working_set_mib": weighed}


@contextmanager
def free_noise(pipe: Any) -> Iterator[None]:
    """diffusers' FreeNoise inside an AnimateDiff pipeline, with the windows its authors use."""
    pipe.enable_free_noise(context_length=CONTEXT, context_stride=STRIDE)
    try:
        yield
    finally:
        pipe.disable_free_noise()


def peer(pipe: Any, frames: int, device: torch.device) -> dict[str, Any]:
    with free_noise(pipe):
        run = measured(lambda: call(pipe.unet, frames, device), device)
    return _told(PEER, frames, run)


def _told(arm: str, frames: int, run: Run) -> dict[str, Any]:
    pace = run.seconds / frames / STEPS
    return {"arm": arm, "frames": frames, "seconds_per_frame_and_step": pace, "peak_mib": run.peak_mib}


def on_ranks(ranks: int, frames: int) -> dict[str, Any]:
    """The same calls in that many processes of one thread each on the CPU, whatever else was measured on; by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", __name__, str(frames)], capture_output=True, text=True, env=environment, timeout=900
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) != ranks:
        raise RuntimeError(f"{ranks} processes did not finish: {done.stderr.strip()[-300:]}")
    found = [json_text.loads(line) for line in lines]
    return {
        "ranks": ranks,
        "device": "cpu",
        "frames": frames,
        "seconds_per_frame_and_step": max(one["seconds"] for one in found) / frames / STEPS,
        "sent": sum(one["sent"] for one in found),
        "foretold": sum(one["foretold"] for one in found),
    }


def one_of_ranks(frames: int) -> None:
    """What every process of `on_ranks` does."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    pipe, device = build(torch.device("cpu")), torch.device("cpu")
    install(pipe, "dual-scope")
    with streamed(pipe, frames) as film:
        count = film.own[1] - film.own[0]
        call(pipe.unet, count, device)  # connections are made at the first message
        film.comm.sent = 0
        run = measured(lambda: call(pipe.unet, count, device), device)
        side = pipe.unet.config.sample_size
        foretold = bytes_per_step(pipe, film, (side, side), GUIDED)[film.comm.rank] * STEPS
        # One write, so that lines of several processes do not mix.
        line = json_text.dumps({"seconds": run.seconds, "sent": film.comm.sent, "foretold": foretold})
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()


def predict(ranks: int, frames_per_rank: int = FRAMES_PER_RANK) -> dict[str, Any]:
    """Time of a step of Stable Diffusion 1.5 with motion modules, 512 x 512, guidance, fp16, without overlap.

    The slowest rank counts: the one that sends most. Messages of different ranks are taken to travel at the same time.
    """
    model = _full_size()
    film = Clip(Comm(0, ranks), tuple(split_rows(ranks * frames_per_rank, ranks)))
    sent, waiting = _exchange(model, film, 64)
    computing = FRAME_SECONDS * frames_per_rank
    return {
        "ranks": ranks,
        "frames": film.frames,
        "sent_mb_by_the_busiest": sent / 1e6,
        "seconds_per_step": computing + waiting,
        "efficiency": computing / (computing + waiting),
    }


def whole_run(pipe: Any, pace: float) -> dict[str, Any]:
    """Minutes of all denoising steps of a long film on several devices like the one measured on, without overlap.

    pace: seconds per frame and step there.
    """
    film = Clip(Comm(0, WHOLE_RANKS), tuple(split_rows(WHOLE_FRAMES, WHOLE_RANKS)))
    with installed(pipe, "dual-scope"):
        _, waiting = _exchange(pipe.unet, film, pipe.unet.config.sample_size)
    step = pace * WHOLE_FRAMES / WHOLE_RANKS + waiting
    steps = Recipe(prompt="any").steps
    return {"ranks": WHOLE_RANKS, "frames": WHOLE_FRAMES, "steps": steps, "minutes": step * steps / 60}


def _exchange(model: Any, film: Clip, side: int) -> tuple[int, float]:
    """Bytes that the busiest rank sends in a step, and the seconds that this takes. side: of the latents."""
    ranks = len(film.parts)
    family: Any = family_of(model)
    sent = max(bytes_per_step(model, film, (side, side), GUIDED))
    attentions = sum(info.role == "temporal" for info, _ in family.layers(model))
    norms = len(family.motion_modules(model))
    speed = INSIDE if ranks <= GPUS_PER_HOST else ACROSS
    together = len(list(rounds(0, ranks)))  # one after another, until all ranks have what all share
    messages = attentions * (NEIGHBOURS * (ranks > 1) + together) + 2 * norms * together  # a norm, and whether to stop
    return sent, sent / speed + messages * MESSAGE_SECONDS


def _full_size() -> Any:
    from diffusers import UNetMotionModel

    with torch.device("meta"):
        model = UNetMotionModel(cross_attention_dim=768).half()
    install(model, "dual-scope")
    return model


def measure(conditions: Conditions) -> Found:
    """Films, short ones first, while there is time; then one film on one process and on two, and the prediction."""
    device, quick = conditions.device, conditions.quick
    pipe = build(device)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    lengths = QUICK_LENGTHS if quick else LENGTHS
    call(pipe.unet, lengths[0], device)  # what only the first call does, such as choosing kernels, is no film's cost
    pace = {OURS: 0.0, PEER: 0.0}  # of the longest film so far
    outgrown: set[str] = set()  # arms that ran out of memory
    for frames in lengths:
        for name, arm in ((OURS, ours), (PEER, peer)):
            film, expected = f"{name}, {frames} frames", pace[name] * frames * STEPS * RUNS[name]
            if name == PEER and device.type == "cpu" and frames > PEER_LONGEST:
                left_out[film] = "it holds all frames at once"
            elif name in outgrown:
                left_out[film] = "a shorter film did not fit into the memory of the GPU"
            elif expected < conditions.seconds_left():
                try:
                    rows.append(arm(pipe, frames, device))
                    pace[name] = rows[-1]["seconds_per_frame_and_step"]
                except torch.cuda.OutOfMemoryError:
                    left_out[film] = "it does not fit into the memory of the GPU"
                    outgrown.add(name)
            else:
                left_out[film] = "no time left"
    ranked = [on_ranks(ranks, QUICK_RANKS_FRAMES if quick else RANKS_FRAMES) for ranks in (1, 2)]
    prediction = [predict(ranks) for ranks in (PREDICTED_RANKS[:2] if quick else PREDICTED_RANKS)]
    more = {"ranks": ranked, "prediction": prediction, "whole_run": whole_run(pipe, pace[OURS]) if pace[OURS] else None}
    return Found(pipe.unet.dtype, cases=rows, goals=_goals(rows, ranked), left_out=left_out, more=more)


def _goals(rows: list[dict[str, Any]], ranked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the project wants of these numbers; bytes are exact in a quick run, too."""
    sets = {row["frames"]: row["working_set_mib"] for row in rows if row["arm"] == OURS}
    growth = sets[1024] / sets[256] - 1 if {256, 1024} <= set(sets) else None
    unforeseen = sum(abs(row["sent"] - row["foretold"]) for row in ranked)
    return [
        goal("growth of the working set from 256 to 1,024 frames", growth, "at_most", 0.05),
        goal("bytes sent beyond or short of those foretold", unforeseen, "at_most", 0),
    ]


def table(result: dict[str, Any]) -> str:
    """The result for people, as Markdown."""
    pace = "s per frame and step"
    films = [
        (row["arm"], row["frames"], f"{row['seconds_per_frame_and_step']:.4f}", cell(row["peak_mib"], ".0f"),
         f"{row['working_set_mib']:.1f}" if "working_set_mib" in row else "all frames")
        for row in result["cases"]
    ]  # fmt: skip
    ranked = [
        (row["ranks"], row["device"], row["frames"], f"{row['seconds_per_frame_and_step']:.4f}", row["sent"],
         row["foretold"])
        for row in result["ranks"]
    ]  # fmt: skip
    predicted = [
        (row["ranks"], row["frames"], f"{row['sent_mb_by_the_busiest']:.0f}", f"{row['seconds_per_step']:.2f}",
         f"{row['efficiency']:.0%}")
        for row in result["prediction"]
    ]  # fmt: skip
    assumed = (
        f"Predicted for Stable Diffusion 1.5, 512 x 512, fp16, {FRAMES_PER_RANK} frames a GPU, if a frame takes "
        f"{FRAME_SECONDS * 1000:.1f} ms a step and nothing overlaps:"
    )
    return page(
        result,
        grid(("arm", "frames", pace, "peak MiB", "working set MiB"), films),
        grid(("processes", "device", "frames", pace, "bytes sent", "foretold"), ranked),
        [assumed, "", *grid(("GPUs", "frames", "MB sent by the busiest", "s per step", "efficiency"), predicted)],
        [_whole(result["whole_run"])] if result["whole_run"] else [],
    )


def _whole(found: dict[str, Any]) -> str:
    return (
        f"Predicted for the model measured here: {found['frames']:,} frames on {found['ranks']} devices like this one take "
        f"{found['minutes']:.1f} minutes for {found['steps']} steps, at the pace of the longest film above, if nothing overlaps; "
        "decoding and writing come on top."
    )


run = partial(run_benchmark, "video", measure, table)

if __name__ == "__main__":
    one_of_ranks(int(sys.argv[1]))
