"""How much faster is local attention? The operator against dense attention, a full-width block of FLUX, all of tiny-flux.

Arms: dense fused attention, our `halo` backend, and torch's block-sparse kernel twice: on blocks of tokens in row-major
order, as the program published with CLEAR orders them, and on our tiles. Compiling a block-sparse kernel takes much
longer than running it, so on a CPU those arms run at two sizes only.

Besides the times: operations per token over picture sizes, which tell whether the cost is linear on any machine. Results
that are kept are in `results`; `show` makes the table of the README from one.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors import install
from ..attn_processors.ops.cost import attention_flops
from ..attn_processors.ops.flex import compiled_kernel
from ..attn_processors.ops.layout import TokenLayout
from ..attn_processors.ops.local import local_attention, sdpa
from ..attn_processors.ops.patterns import Disc
from ..attn_processors.ops.pool import Pool
from ..pipelines.load import bundled, load
from .clear_table import short_table, table
from .frame import Conditions, Found, goal, run_benchmark
from .measure import Run, timed
from .rounds import Timed, one_run, repeat, untimed

__all__ = ["run", "short_table", "show", "table"]

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
class Case(Timed):
    """One thing to time; its arms are of `Arm`, the first is dense."""

    what: str  # "operator", "FLUX block" or WHOLE
    side: int  # of the square token grid
    heads: int
    width: int  # of a head
    dropped: dict[Arm, str] = field(default_factory=dict)  # why it did not run
    SLOW_SECONDS = 10.0

    def __str__(self) -> str:
        return f"{self.what}, {self.tokens} tokens, {self.heads} x {self.width}"

    @property
    def tokens(self) -> int:
        return self.side**2


def cases_for(device: torch.device, quick: bool) -> list[Case]:
    """What is measured on this device, small cases first."""
    cuda = device.type == "cuda"

    def arms(*radii: int, blocks: Sequence[int] | None = None, kinds: Sequence[str] = (ROWS, TILES)) -> tuple[Arm, ...]:
        if blocks is None:
            blocks = radii if cuda else ()
        sparse = [Arm(kind, radius) for kind in kinds for radius in blocks]
        return (Arm(DENSE), *(Arm(HALO, radius) for radius in radii), *sparse)

    of_operator, of_block = arms(8, 16, 32), arms(16, kinds=[TILES])  # a FLUX block knows no row-major arm
    if quick:
        return [Case("operator", 16, 2, 16, arms=arms(4)), Case("FLUX block", 8, 2, 16, arms=arms(4, kinds=[TILES]))]
    if cuda:
        cases = [Case("operator", side, 24, 128, arms=of_operator) for side in (64, 128, 256, 512)]
        return cases + [Case("FLUX block", side, 24, 128, arms=of_block) for side in (64, 128)] + _whole_cases()
    return [
        Case("operator", 64, 4, 64, arms=of_operator),
        Case("operator", 64, 24, 128, arms=of_operator),
        Case("operator", 128, 4, 64, arms=arms(8, 16, 32, blocks=(8, 16))),
        Case("operator", 256, 1, 128, arms=of_operator),
        Case("FLUX block", 64, 24, 128, arms=of_block),
        *_whole_cases(),
    ]


def _whole_cases() -> list[Case]:
    """The bundled model at its own size and at four times the side; none where it is not bundled."""
    if WHOLE not in bundled():
        return []
    config = json_text.loads((bundled()[WHOLE] / "transformer" / "config.json").read_text())
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    arms = (Arm(DENSE), Arm(HALO, 8), Arm(HALO, 16))
    return [Case(WHOLE, side, heads, width, arms=arms) for side in (16, 64)]


def _left_out(quick: bool) -> dict[str, str]:
    """What `cases_for` would hold elsewhere, and why not here."""
    if WHOLE not in bundled():
        return {WHOLE: "this install does not bundle it"}
    return {WHOLE: "a quick run has no time for it"} if quick else {}


def measure(conditions: Conditions) -> Found:
    """All cases of this device; there are goals for a CPU only."""
    device, quick = conditions.device, conditions.quick
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases = cases_for(device, quick)
    # A card runs kernels compiled for one case, and few are kept: there each case has all its rounds at once.
    for together in [[case] for case in cases] if device.type == "cuda" else [cases]:
        repeat(together, partial(time_arm, device=device, dtype=dtype), conditions)
    return Found(
        dtype,
        cases=[_told(case) for case in cases],
        goals=[] if quick or device.type != "cpu" else _goals(cases),
        left_out=_left_out(quick) | untimed([case for case in cases if not case.dropped]),
        more={"flops_per_token": flops_per_token()},
    )


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


def time_arm(case: Case, arm: Arm, device: torch.device, dtype: torch.dtype) -> Run | None:
    """One run of an arm, which is weighed the first time, in a run before; None, and why in `case.dropped`, if it cannot."""
    if arm in case.dropped:
        return None
    try:
        make = {"FLUX block": block_work, WHOLE: whole_work}.get(case.what, op_work)
        work = make(case, arm, device, dtype)
        if device.type == "cuda" or (arm not in case.runs and arm.kind != DENSE):
            timed(work, device)  # compiles, fills caches; on a card other cases have driven kernels out
        return one_run(case, arm, work, device)
    except torch.cuda.OutOfMemoryError:
        case.dropped[arm] = "out of memory"
    except Exception as problem:
        if arm.kind not in (ROWS, TILES):
            raise
        case.dropped[arm] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:120]}"
    return None


def op_work(case: Case, arm: Arm, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """One call of the operator on seeded noise: grid tokens after TEXT global ones."""
    text = TEXT if case.side > 16 else 7
    layout = TokenLayout(case.side, case.side, before=text)
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, layout.tokens, case.heads, case.width)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    if arm.radius is None:
        return lambda: sdpa(q, k, v, scale=case.width**-0.5)
    pattern = Disc(arm.radius)
    if arm.kind == ROWS:
        return row_major(q, k, v, layout, pattern)
    backend = {HALO: "halo", TILES: "flex"}[arm.kind]
    return lambda: local_attention(q, k, v, layout, pattern, backend=backend)


def row_major(q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, pattern: Disc) -> Callable[[], Tensor]:
    """The block-sparse kernel on tokens as the model has them: blocks are strips of BLOCK tokens of a row."""
    mask, kernel = row_major_kernel(layout, pattern, str(q.device))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: kernel(*heads_first, mask, None, None)


@lru_cache(maxsize=32)
def row_major_kernel(layout: TokenLayout, pattern: Disc, device: str) -> tuple[Any, Callable[..., Tensor]]:
    """Block mask and kernel. On a card the mask is compiled, too: from 65,536 tokens on it is too large to be written out."""
    from torch.nn.attention.flex_attention import create_block_mask

    near, count = near_rows(layout, pattern), layout.tokens
    compiled = device.startswith("cuda")
    mask = create_block_mask(near, None, None, count, count, device=device, BLOCK_SIZE=BLOCK, _compile=compiled)
    return mask, compiled_kernel()


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


def _told(case: Case) -> dict[str, Any]:
    about = {"what": case.what, "tokens": case.tokens, "heads": case.heads, "head_width": case.width}
    told = case.told(about, lambda arm: {"times_faster_than_dense": case.ratio(Arm(DENSE), arm)})
    return told | {"left_out": {str(arm): why for arm, why in case.dropped.items()}}


def _goals(cases: list[Case]) -> list[dict[str, Any]]:
    """The floors on a CPU."""
    goals = []
    for (tokens, heads, width, radius), floor in FLOORS.items():
        case = next(case for case in cases if (case.tokens, case.heads, case.width) == (tokens, heads, width))
        what = f"{tokens} tokens, {heads} x {width}, radius {radius}: halo times faster than dense"
        goals.append(goal(what, case.ratio(Arm(DENSE), Arm(HALO, radius)), "at_least", floor))
    return goals


run = partial(run_benchmark, "clear", measure, table)
