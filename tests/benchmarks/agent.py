"""How much faster is agent attention? One denoising step, and the layer where the time goes.

Two things are timed, in pixels of the finished picture (8 to a latent): a whole step of the Stable Diffusion 1.5 UNet
with random weights and one row, and its first self-attention layer alone, which sees the most tokens. The arms are
stock, token merging as tomesd does it at the same ratio, and every phase of agent attention. The number that counts,
"agent, averaged", weighs the phases by the part of the steps they cover.

Medians are of 5 rounds, of 3 where a run takes over 20 seconds. Random weights are fine: no arm's work depends on the numbers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors import AgentAttnProcessor, installed
from ..attn_processors.context import context_of
from .frame import Conditions, Found, arms_grid, goal, page, run_benchmark
from .measure import Run
from .rounds import Timed, one_run, repeat, untimed

__all__ = ["run", "table"]

STOCK, TOMESD, AVERAGED = "stock", "tomesd", "agent, averaged"
LATENT_FACTOR, TRAIN_STEPS = 8, 1000
TOKENS_OF_TEXT = 77
NAMES = {"layer": "first self-attention", "step": "UNet step"}
GROWTH = {"layer": 16, "step": 8}  # at most, of the time when the sides of the picture double
SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # and the defaults of UNet2DConditionModel
TINY = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@dataclass
class Case(Timed):
    """One thing to time at one size; the next smaller size has half the pixels along a side."""

    what: str  # "layer" or "step"
    pixels: int
    SLOW_SECONDS = 20.0

    def __str__(self) -> str:
        return f"{NAMES[self.what]}, {self.pixels} pixels"

    def guess(self, cases: Sequence[Case]) -> float:
        half = next((case for case in cases if case.what == self.what and case.pixels * 2 == self.pixels), None)
        return 0.0 if half is None else half.round_seconds * GROWTH[self.what]


def measure(conditions: Conditions) -> Found:
    """The UNet and its first layer at growing sizes; a tiny UNet at tiny ones in a quick run."""
    quick, place = conditions.quick, conditions.device
    bench = Bench(random_unet(TINY if quick else SD15, place), AgentAttnProcessor(), place)
    small, large, huge = (64, 128, 256) if quick else (512, 1024, 2048)
    sizes = [("layer", small), ("layer", large), ("step", small), ("step", large), ("layer", huge)]
    cases = [Case(*size, arms=bench.arms) for size in sizes]
    bench.warm_up(small)
    repeat(cases, bench.time, conditions)
    for case in cases:
        bench.average(case)
    return Found(
        bench.dtype,
        cases=[_told(case) for case in cases],
        goals=[] if quick else _goals({case.what: case for case in cases if case.pixels == 1024}, bench.phase_name(0)),
        left_out=untimed(cases) | ({} if bench.has_tomesd else {TOMESD: "it is not installed: pip install tomesd"}),
        more={"settings": bench.method.settings() | {"schedule": [asdict(phase) for phase in bench.method.schedule]}},
    )


class Bench:
    """The model and the arms."""

    def __init__(self, unet: nn.Module, method: AgentAttnProcessor, device: torch.device):
        self.unet, self.method, self.device = unet, method, device
        self.dtype = next(unet.parameters()).dtype
        self.ratio = method.schedule[0].ratio
        ends = [0.0, *(phase.until for phase in method.schedule)]
        self.shares = [end - start for start, end in pairwise(ends)]
        middles = [(start + end) / 2 for start, end in pairwise(ends)]
        self.timesteps = {self.phase_name(i): TRAIN_STEPS * (1 - middle) for i, middle in enumerate(middles)}
        self.has_tomesd = importlib.util.find_spec("tomesd") is not None
        self.arms = [STOCK, *([TOMESD] if self.has_tomesd else []), *self.timesteps]

    def phase_name(self, index: int) -> str:
        """What the table calls a phase."""
        return f"agent, phase {index + 1} ({'agents' if self.method.schedule[index].agent_ratio else 'merging only'})"

    def warm_up(self, pixels: int) -> None:
        """Load kernels and fill caches, so that the first round costs what the others do."""
        for arm in self.arms:
            self.time(Case("layer", pixels), arm)

    def time(self, case: Case, arm: str) -> Run:
        """One run of an arm."""
        with self.applied(arm):
            return one_run(case, arm, self.work(case, arm), self.device)

    def average(self, case: Case) -> None:
        """Add the arm that weighs the phases of each round by the part of the steps they cover."""
        rounds = zip(*(case.runs.get(name, []) for name in self.timesteps), strict=True)
        averages = [sum(run.seconds * part for run, part in zip(row, self.shares, strict=True)) for row in rounds]
        if averages:
            case.runs[AVERAGED] = [Run(seconds, None) for seconds in averages]

    @contextmanager
    def applied(self, arm: str) -> Iterator[None]:
        """The UNet as this arm has it."""
        if arm == STOCK:
            yield
        elif arm == TOMESD:
            import tomesd

            tomesd.apply_patch(self.unet, ratio=self.ratio)
            try:
                yield
            finally:
                tomesd.remove_patch(self.unet)
        else:
            with installed(self.unet, self.method):
                yield

    def work(self, case: Case, arm: str) -> Callable[[], Any]:
        """What is timed: a call of the UNet, or of its first self-attention."""
        side = case.pixels // LATENT_FACTOR
        generator = torch.Generator().manual_seed(case.pixels)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        latents, t = noise(1, self.unet.config.in_channels, side, side), self.timesteps.get(arm, TRAIN_STEPS / 2)
        if case.what == "step":
            text = noise(1, TOKENS_OF_TEXT, self.unet.config.cross_attention_dim)
            return lambda: self.unet(latents, t, text)
        layer = self.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
        x = noise(1, side * side, self.unet.config.block_out_channels[0])
        if arm == TOMESD:
            return lambda: _tomesd_layer(layer, x, side, self.ratio)
        if (context := context_of(self.unet)) is not None:
            context(self.unet, (latents, t), {})  # what a call of the UNet would do first: grid and phase
        return lambda: layer(x)


def _tomesd_layer(layer: nn.Module, x: Tensor, side: int, ratio: float) -> Tensor:
    """The layer inside tomesd's merge and unmerge, as its patched block does it for one row."""
    from tomesd.merge import bipartite_soft_matching_random2d

    merge, unmerge = bipartite_soft_matching_random2d(x, side, side, 2, 2, int(x.shape[1] * ratio), no_rand=True)
    return unmerge(layer(merge(x)))


def random_unet(config: dict[str, Any], device: torch.device) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).eval().to(device)
    return unet.half() if device.type == "cuda" else unet


def _told(case: Case) -> dict[str, Any]:
    about = {"what": case.what, "pixels": case.pixels}
    return case.told(about, lambda arm: {"times_faster_than_stock": case.ratio(STOCK, arm)})


def _goals(cases: dict[str, Case], first_phase: str) -> list[dict[str, Any]]:
    """What the project wants on a CPU at 1024 pixels; `cases` are those, by what they time."""
    step, layer = cases["step"], cases["layer"]
    return [
        goal("step, averaged: times faster than stock", step.ratio(STOCK, AVERAGED), "at_least", 1.35),
        goal("step, averaged: times faster than tomesd", step.ratio(TOMESD, AVERAGED), "at_least", 1.0),
        goal("layer, first phase: times faster than stock", layer.ratio(STOCK, first_phase), "at_least", 4.0),
    ]


def table(result: dict[str, Any]) -> str:
    """The result for people, as a Markdown table."""
    about: dict[str, Any] = {"": lambda case: NAMES[case["what"]], "pixels": itemgetter("pixels")}
    return page(result, arms_grid(result["cases"], about, {"times faster": ("times_faster_than_stock", ".2f")}))


run = partial(run_benchmark, "agent", measure, table)
