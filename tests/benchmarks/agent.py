"""How much faster is agent attention? One denoising step, and the layer where the time goes.

Two things are timed, in pixels of the finished picture (8 to a latent): a whole step of the Stable Diffusion 1.5 UNet
with random weights and one row, and its first self-attention layer alone, which sees the most tokens. The arms are
stock, token merging as tomesd does it at the same ratio, and every phase of agent attention. The number that counts,
"agent, averaged", weighs the phases by the part of the steps they cover.

All arms run in every round, in alternating order, and are compared within the round: medians of 5 rounds, of 3 where a
run takes over 20 seconds. Rounds that do not fit the time limit are left out, and the result says how many there were.
Random weights are fine: no arm's work depends on the numbers.
"""

from __future__ import annotations

import importlib.util
import json as json_text
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors import AgentAttnProcessor, installed
from ..attn_processors.context import context_of
from ..pipelines.files import written_whole
from .measure import Run, measured, surroundings

__all__ = ["run", "table"]

ROUNDS, ROUNDS_IF_SLOW, SLOW_SECONDS = 5, 3, 20.0
STOCK, TOMESD, AVERAGED = "stock", "tomesd", "agent, averaged"
LATENT_FACTOR, TRAIN_STEPS = 8, 1000
TOKENS_OF_TEXT = 77
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
class Case:
    """One thing to time at one size, and the runs so far: arm -> one run per round."""

    what: str  # "layer" or "step"
    pixels: int
    runs: dict[str, list[Run]] = field(default_factory=dict)
    round_seconds: float = 0.0  # of the last round

    @property
    def rounds(self) -> int:
        return len(self.runs.get(STOCK, []))

    @property
    def wanted(self) -> int:
        slow = any(run.seconds > SLOW_SECONDS for runs in self.runs.values() for run in runs)
        return ROUNDS_IF_SLOW if slow else ROUNDS


def run(
    *,
    minutes: float = 20.0,
    quick: bool = False,
    json: bool = False,
    out: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure, print a table (or with `json` one JSON object), and return what was measured.

    Args:
        minutes: time limit; rounds that would not fit are left out.
        quick: a tiny UNet at tiny sizes: tries everything in seconds and says nothing about speed.
        json: print JSON instead of the table.
        out: JSON file to write as well.
        device: "cpu", "cuda", ...; None takes CUDA if there is one.

    Raises ValueError for a time limit that is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}. It is the time limit; give for example 20.")
    began = time.monotonic()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(random_unet(TINY if quick else SD15, where), AgentAttnProcessor(), where)
    small, large, huge = (64, 128, 256) if quick else (512, 1024, 2048)
    cases = [Case("layer", small), Case("layer", large), Case("step", small), Case("step", large), Case("layer", huge)]
    bench.warm_up(small)
    for _ in range(1 if quick else ROUNDS):
        for case in cases:
            left = minutes * 60 - (time.monotonic() - began)
            if case.rounds < case.wanted and expected_seconds(case, cases) <= left:
                bench.round(case)
    result = {
        "benchmark": "agent",
        "command": "reattend bench agent" + (" --quick" if quick else ""),
        **surroundings(where),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "settings": bench.method.settings() | {"schedule": [asdict(phase) for phase in bench.method.schedule]},
        "left_out": bench.left_out(),
        "cases": [_summary(case, bench) for case in cases],
        "minutes": round((time.monotonic() - began) / 60, 2),
    }
    if not quick:
        result["goals"] = _goals(result, bench)
    if out is not None:
        with written_whole(out) as (aside,):
            aside.write_text(json_text.dumps(result, indent=2) + "\n")
    print(json_text.dumps(result) if json else table(result))
    return result


class Bench:
    """The model, the arms, and one round of all of them."""

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

    def left_out(self) -> list[str]:
        """Arms that could not run, with the reason."""
        return [] if self.has_tomesd else ["tomesd is not installed: pip install tomesd"]

    def warm_up(self, pixels: int) -> None:
        """Load kernels and fill caches, so that the first round costs what the others do."""
        for arm in self.arms:
            with self.applied(arm):
                measured(self.work(Case("layer", pixels), arm), self.device)

    def round(self, case: Case) -> None:
        """Every arm once; every other round in reverse, so that drift of the machine hits all alike."""
        start = time.monotonic()
        for arm in self.arms if case.rounds % 2 == 0 else list(reversed(self.arms)):
            with self.applied(arm):
                run = measured(self.work(case, arm), self.device)
            case.runs.setdefault(arm, []).append(run)
        case.round_seconds = time.monotonic() - start

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


def expected_seconds(case: Case, cases: list[Case]) -> float:
    """Seconds the next round will take at most: as the last one, or by its growth from the next smaller size."""
    if case.rounds:
        return case.round_seconds
    half = next((other for other in cases if other.what == case.what and other.pixels * 2 == case.pixels), None)
    return 0.0 if half is None else half.round_seconds * GROWTH[case.what]


def _summary(case: Case, bench: Bench) -> dict[str, Any]:
    """Medians over rounds; ratios are medians of the ratios within a round."""
    seconds = {arm: [run.seconds for run in runs] for arm, runs in case.runs.items()}
    if case.rounds:
        rounds = zip(*(seconds[name] for name in bench.timesteps), strict=True)
        seconds[AVERAGED] = [sum(s * part for s, part in zip(row, bench.shares, strict=True)) for row in rounds]
    arms = {}
    for arm, times in seconds.items():
        peaks = [run.peak_mib for run in case.runs.get(arm, []) if run.peak_mib is not None]
        arms[arm] = {
            "seconds": median(times),
            "times_faster_than_stock": median(s / t for s, t in zip(seconds[STOCK], times, strict=True)),
            "peak_mib": median(peaks) if peaks else None,
            "all_seconds": times,
        }
    return {"what": case.what, "pixels": case.pixels, "rounds": case.rounds, "arms": arms}


def _goals(result: dict[str, Any], bench: Bench) -> list[dict[str, Any]]:
    """What the project wants of these numbers on a CPU at 1024 pixels; value None = not measured."""
    arms = {case["what"]: case["arms"] for case in result["cases"] if case["pixels"] == 1024}

    def faster(what: str, arm: str) -> float | None:
        return arms[what].get(arm, {}).get("times_faster_than_stock")

    ours, theirs = arms["step"].get(AVERAGED), arms["step"].get(TOMESD)
    paired = [b / a for a, b in zip(ours["all_seconds"], theirs["all_seconds"], strict=True)] if ours and theirs else []
    wanted = [
        ("step, averaged: times faster than stock", faster("step", AVERAGED), 1.35),
        ("step, averaged: times faster than tomesd", median(paired) if paired else None, 1.0),
        ("layer, first phase: times faster than stock", faster("layer", bench.phase_name(0)), 4.0),
    ]
    return [
        {"goal": goal, "value": value, "at_least": least, "met": None if value is None else value >= least}
        for goal, value, least in wanted
    ]


def table(result: dict[str, Any]) -> str:
    """The result for people, as a Markdown table."""
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, torch {result['versions']['torch']}, "
        f"diffusers {result['versions']['diffusers']}, tomesd {result['versions']['tomesd']}; "
        f"`{result['command']}`, {result['minutes']} minutes",
        "",
        "| | pixels | arm | seconds | times faster | extra memory at peak, MiB | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in result["cases"]:
        what = {"layer": "first self-attention", "step": "UNet step"}[case["what"]]
        for arm, row in case["arms"].items():
            peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            speed = f"{row['times_faster_than_stock']:.2f}"
            lines.append(
                f"| {what} | {case['pixels']} | {arm} | {row['seconds']:.3g} | {speed} | {peak} | {case['rounds']} |"
            )
        if not case["rounds"]:
            lines.append(f"| {what} | {case['pixels']} | no time left | – | – | – | 0 |")
    for goal in result.get("goals", []):
        value = "not measured" if goal["value"] is None else f"{goal['value']:.2f}"
        verdict = {True: "met", False: "MISSED", None: ""}[goal["met"]]
        lines.append(f"{goal['goal']}: {value} (goal {goal['at_least']:g}) {verdict}")
    return "\n".join([*lines, *result["left_out"]])
