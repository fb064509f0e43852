"""How much faster is local attention? The operator against dense attention, a full-width block of FLUX, all of tiny-flux.

Arms: dense fused attention, our `halo` backend, and torch's block-sparse kernel twice: on blocks of tokens in row-major
order, as the program published with CLEAR orders them, and on our tiles. Every case is measured in rounds in which all
arms run one after the other, every other round in reverse; ratios are taken within a round and the median is told.
Compiling a block-sparse kernel takes much longer than running it, so on a CPU those arms run at two sizes only.

Besides the times: operations per token over picture sizes, which tell whether the cost is linear on any machine. Results
that are kept are in `results`; `show` makes the table of the README from one.
"""

from __future__ import annotations

import json as json_text
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors import install
from ..attn_processors.ops.cost import attention_flops
from ..attn_processors.ops.layout import TokenLayout
from ..attn_processors.ops.local import local_attention, sdpa
from ..attn_processors.ops.patterns import Disc
from ..attn_processors.ops.pool import Pool
from ..pipelines.files import written_whole
from ..pipelines.load import bundled, load
from .clear_table import short_table, table
from .measure import Run, measured, surroundings

__all__ = ["run", "short_table", "show", "table"]

ROUNDS, ROUNDS_IF_SLOW, SLOW_SECONDS = 5, 3, 10.0
DENSE, HALO, ROWS, TILES = "dense", "halo", "flex, row-major", "flex, tiles"
TEXT = 512  # global tokens in every case
WHOLE = "tiny-flux"  # the bundled model: text to picture, STEPS steps
STEPS = 4
BLOCK = 128  # queries and keys of one block of the block-sparse kernel
FLOORS = {(16_384, 4, 64, 8): 8.0, (16_384, 4, 64, 16): 4.0, (65_536, 1, 128, 16): 15.0}  # times faster than dense, CPU


@dataclass(frozen=True)
class Arm:
    """One way to compute; `radius` is None for dense attention, which all others of a case are compared with."""

    kind: str
    radius: int | None = None

    def __str__(self) -> str:
        return self.kind if self.radius is None else f"{self.kind}, r={self.radius}"


@dataclass
class Case:
    """One thing to time, and the runs so far: arm -> one run per round."""

    what: str  # "operator", "FLUX block" or WHOLE
    side: int  # of the square token grid
    heads: int
    width: int  # of a head
    arms: tuple[Arm, ...]
    runs: dict[Arm, list[Run]] = field(default_factory=dict)
    dropped: dict[Arm, str] = field(default_factory=dict)  # why it did not run

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def wanted(self) -> int:
        slow = any(run.seconds > SLOW_SECONDS for runs in self.runs.values() for run in runs)
        return ROUNDS_IF_SLOW if slow else ROUNDS


def cases_for(device: torch.device, quick: bool) -> list[Case]:
    """What is measured on this device, small cases first."""
    cuda = device.type == "cuda"

    def arms(blocks: tuple[int, ...] = (), radii: tuple[int, ...] = (8, 16, 32)) -> tuple[Arm, ...]:
        sparse = [Arm(kind, radius) for kind in (ROWS, TILES) for radius in (radii if cuda else blocks)]
        return (Arm(DENSE), *(Arm(HALO, radius) for radius in radii), *sparse)

    if quick:
        return [Case("operator", 16, 2, 16, arms(radii=(4,))), Case("FLUX block", 8, 2, 16, arms(radii=(4,)))]
    cases = [
        Case("operator", 64, 4, 64, arms()),
        Case("operator", 64, 24, 128, arms()),
        Case("operator", 128, 4, 64, arms(blocks=(8, 16))),
        Case("operator", 256, 24 if cuda else 1, 128, arms()),
        Case("FLUX block", 64, 24, 128, arms(radii=(16,))),
    ]
    if cuda:
        cases += [Case("operator", side, 24, 128, arms()) for side in (128, 512)]
        cases += [Case("FLUX block", 128, 24, 128, arms(radii=(16,)))]
    return cases + _whole_cases()


def _whole_cases() -> list[Case]:
    """The bundled model at its own size and at four times the side; none where it is not bundled."""
    if WHOLE not in bundled():
        return []
    config = json_text.loads((bundled()[WHOLE] / "transformer" / "config.json").read_text())
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    arms = (Arm(DENSE), Arm(HALO, 8), Arm(HALO, 16))
    return [Case(WHOLE, side, heads, width, arms) for side in (16, 64)]


def _left_out(quick: bool) -> dict[str, str]:
    """What `cases_for` would hold elsewhere, and why not here."""
    if WHOLE not in bundled():
        return {WHOLE: "this install does not bundle it"}
    return {WHOLE: "a quick run has no time for it"} if quick else {}


def run(
    *,
    minutes: float = 15.0,
    quick: bool = False,
    json: bool = False,
    out: Path | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure, print a table (or with `json` one JSON object), and return what was measured.

    Args:
        minutes: time limit; rounds that would not fit are left out.
        quick: tiny sizes: tries everything in seconds and says nothing about speed.
        json: print JSON instead of the table.
        out: JSON file to write as well.
        device: "cpu", "cuda", ...; None takes CUDA if there is one.

    Raises ValueError for a time limit that is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be positive, got {minutes}. It is the time limit; give for example 15.")
    began = time.monotonic()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    cases = cases_for(where, quick)
    costs: dict[int, float] = {}
    for turn in range(1 if quick else ROUNDS):
        for index, case in enumerate(cases):
            left = minutes * 60 - (time.monotonic() - began)
            if turn < case.wanted and costs.get(index, 0.0) <= left:
                start = time.monotonic()
                measure_round(case, where, dtype, turn)
                costs[index] = time.monotonic() - start
    result = {
        "benchmark": "clear",
        "command": "reattend bench clear" + (" --quick" if quick else ""),
        **surroundings(where),
        "dtype": str(dtype).removeprefix("torch."),
        "cases": [_summary(case) for case in cases],
        "left_out": _left_out(quick),
        "flops_per_token": flops_per_token(),
        "minutes": round((time.monotonic() - began) / 60, 2),
    }
    if not quick and where.type == "cpu":
        result["goals"] = _goals(cases)
    if out is not None:
        with written_whole(out) as (aside,):
            aside.write_text(json_text.dumps(result, indent=2) + "\n")
    print(json_text.dumps(result) if json else table(result))
    return result


def show(file: Path) -> str:
    """The table of the README from a result that `run` wrote.

    Raises ValueError for a file that holds no such result.
    """
    try:
        result = json_text.loads(file.read_text(encoding="utf-8"))
        if result["benchmark"] != "clear":
            raise ValueError(f"it is of the benchmark {result['benchmark']!r}")
        return short_table(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"cannot show {file}: it is no result of the benchmark of CLEAR ({reason}); give a file that "
            "reattend bench clear --out wrote"
        ) from None


def measure_round(case: Case, device: torch.device, dtype: torch.dtype, turn: int) -> None:
    """Every arm once; the first round also warms up, and every other one goes in reverse."""
    for arm in case.arms if turn % 2 == 0 else reversed(case.arms):
        if arm in case.dropped:
            continue
        try:
            make = {"FLUX block": block_work, WHOLE: whole_work}.get(case.what, op_work)
            work = make(case, arm, device, dtype)
            if turn == 0 and arm.kind != DENSE:
                measured(work, device)  # compiles, fills caches
            case.runs.setdefault(arm, []).append(measured(work, device))
        except torch.cuda.OutOfMemoryError:
            case.dropped[arm] = "out of memory"
        except Exception as problem:
            if arm.kind not in (ROWS, TILES):
                raise
            case.dropped[arm] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:120]}"


def op_work(case: Case, arm: Arm, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """One call of the operator on seeded noise: grid tokens after TEXT global ones."""
    text = TEXT if case.side > 16 else 7
    layout = TokenLayout(case.side, case.side, before=text)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, layout.tokens, case.heads, case.width, generator=generator).to(device, dtype) for _ in range(3)
    )
    if arm.radius is None:
        return lambda: sdpa(q, k, v, scale=case.width**-0.5)
    pattern = Disc(arm.radius)
    if arm.kind == ROWS:
        return row_major(q, k, v, layout, pattern)
    backend = {HALO: "halo", TILES: "flex"}[arm.kind]
    return lambda: local_attention(q, k, v, layout, pattern, backend=backend)


def row_major(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: Disc) -> Callable[[], Tensor]:
    """The block-sparse kernel on tokens as the model has them: blocks are strips of BLOCK tokens of a row."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    near, count = near_rows(layout, pattern), layout.tokens
    mask = create_block_mask(near, None, None, count, count, device=str(q.device), BLOCK_SIZE=BLOCK)
    kernel = torch.compile(flex_attention, dynamic=False)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: kernel(*heads_first, block_mask=mask)


def near_rows(layout: TokenLayout, pattern: Disc) -> Callable[..., Tensor]:
    """Which keys a query sees, by their places in the sequence: the mask function of `row_major`."""
    width, text, limit = layout.width, layout.before, pattern.limit

    def near(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
        a, b = i - text, j - text
        far = (a // width - b // width) ** 2 + (a % width - b % width) ** 2 > limit
        return (a < 0) | (b < 0) | ~far

    return near


def block_work(case: Case, arm: Arm, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """One double block of FLUX inside a model that has no other, dense or with CLEAR."""
    model = _flux(case.heads, case.width).to(device, dtype).eval()
    text, side = TEXT if case.side > 16 else 7, case.side
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(side).float(), torch.arange(side).float())
    call = {
        "hidden_states": noise(1, side**2, 64),
        "encoder_hidden_states": noise(1, text, 64),
        "pooled_projections": noise(1, 64),
        "timestep": torch.full((1,), 0.5, device=device),
        "img_ids": grid.to(device),
        "txt_ids": torch.zeros(text, 3, device=device),
    }
    if arm.radius is not None:
        install(model, "clear", radius=arm.radius, backend={HALO: "halo", TILES: "flex"}[arm.kind])
    return lambda: model(**call)


def whole_work(case: Case, arm: Arm, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """A picture of the bundled model from text to pixels, dense or with CLEAR; its 512 text tokens are the default."""
    pipe = load(WHOLE, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    if arm.radius is not None:
        install(pipe, "clear", radius=arm.radius, backend="auto")
    pixels = case.side * 2 * pipe.vae_scale_factor
    size = {"height": pixels, "width": pixels, "num_inference_steps": STEPS}
    return lambda: pipe("a blue car on sand", generator=torch.Generator().manual_seed(0), **size)


def _flux(heads: int, width: int) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    part = width // 8
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=0,
        num_attention_heads=heads,
        attention_head_dim=width,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(width - 6 * part, 3 * part, 3 * part),
    )


def flops_per_token() -> list[dict[str, Any]]:
    """Operations of one FLUX layer per image token, as computed by the halo backend, over picture sizes."""
    rows = []
    for name, pool in (("radius 16", None), ("radius 16, 256 pooled keys", Pool(4, budget=256))):
        each = {}
        for pixels in (1024, 2048, 4096, 8192):
            layout = TokenLayout(pixels // 16, pixels // 16, before=TEXT)
            each[str(pixels)] = attention_flops(layout, Disc(16), "halo", 3072, pool=pool) / layout.grid_tokens
        rows.append({"pattern": name, "flops_per_token": each})
    return rows


def _summary(case: Case) -> dict[str, Any]:
    dense = [run.seconds for run in case.runs.get(Arm(DENSE), [])]
    arms = {}
    for arm, runs in case.runs.items():
        times, peaks = [run.seconds for run in runs], [run.peak_mib for run in runs if run.peak_mib is not None]
        ratios = [a / b for a, b in zip(dense, times, strict=False)]
        arms[str(arm)] = {
            "seconds": median(times),
            "times_faster_than_dense": median(ratios) if ratios else None,
            "peak_mib": median(peaks) if peaks else None,
            "all_seconds": times,
        }
    sizes = {"tokens": case.tokens, "heads": case.heads, "head_width": case.width}
    left_out = {str(arm): why for arm, why in case.dropped.items()}
    return {"what": case.what, **sizes, "rounds": len(dense), "arms": arms, "left_out": left_out}


def _goals(cases: list[Case]) -> list[dict[str, Any]]:
    """The floors on a CPU; value None = not measured."""
    goals = []
    for (tokens, heads, width, radius), floor in FLOORS.items():
        case = next(case for case in cases if (case.tokens, case.heads, case.width) == (tokens, heads, width))
        value = _summary(case)["arms"].get(str(Arm(HALO, radius)), {}).get("times_faster_than_dense")
        goals.append(
            {
                "goal": f"{tokens} tokens, {heads} x {width}, radius {radius}: halo times faster than dense",
                "value": value,
                "at_least": floor,
                "met": None if value is None else value >= floor,
            }
        )
    return goals
