"""Agent attention for UNets: training-free, faster where an image has many tokens.

Inside a self-attention layer the tokens are matched once (`ops.merge`). The ranking gives fewer *features*, which the
queries, keys and values are made of, and still fewer *agents*, through which the attention runs (`ops.agent`). Layers
where agents would not save work use ordinary attention between the merged features.

What happens depends on how far the denoising is: early steps lay out the picture and take few agents well, late steps
draw detail and only merge. A schedule is a tuple of `Phase`. The preset "paper" is the published one (Agent Attention,
arXiv 2312.08874, Stable Diffusion): 16-token cells with agents for the first 40 % of the steps, 4-token cells without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, get_type_hints

import torch
from torch import Tensor

from .method import AttnMethod, LayerInfo, coerce
from .ops.agent import agent_attention, agents_pay_off
from .ops.merge import cell_grid, match, split_tokens

if TYPE_CHECKING:
    from .context import Context
    from .layer import LayerCall

__all__ = ["PRESETS", "AgentAttnProcessor", "Phase"]

# Progress is a quotient of step numbers: 20 / 50 must not fall short of 0.4 by a rounding error.
ROUNDING = 1e-6


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name} must be in [0, 1), got {value}. It is the share of image tokens merged away; 0.4 merges 40 %."
        )


def check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(
            f"{name} must be a finite number >= 0, got {value}. The published values are p = 0.3 and c = 0.075."
        )


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What agent attention does during one stretch of the denoising steps.

    Raises ValueError for a value outside its range.
    """

    until: float = 1.0  # end of the stretch, as a fraction of all steps in (0, 1]
    sy: int = 2  # cell height in tokens; one token per cell stays put, so larger cells allow fewer agents
    sx: int = 2  # cell width in tokens
    ratio: float = 0.4  # share of the tokens merged away, in [0, 1); more = faster, coarser; 0 = none
    agent_ratio: float = 0.0  # share merged away to make the agents, in [0, 1); more = fewer agents; 0 = no agents
    p: float = 0.3  # exponent of the softmax scale from queries to agents, >= 0; smaller = sharper choice of agent
    c: float = 0.075  # how much of its own value a token keeps beside the agents' answer, >= 0; more = more detail

    def __post_init__(self) -> None:
        hints = get_type_hints(Phase)
        for field in fields(self):
            object.__setattr__(self, field.name, coerce(getattr(self, field.name), hints[field.name], field.name))
        _check_share("ratio", self.ratio)
        _check_share("agent_ratio", self.agent_ratio)
        for name in ("p", "c"):
            check_not_negative(name, getattr(self, name))
        for name in ("sy", "sx"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}. It is the side of a cell in tokens; 2 and "
                    "4 are usual."
                )
        if not 0 < self.until <= 1:
            raise ValueError(
                f"until must be in (0, 1], got {self.until}. It is a fraction of the steps: give 0.4 for step 20 of 50."
            )

    @property
    def neutral(self) -> bool:
        """True if this phase is stock attention."""
        return self.ratio == 0 and self.agent_ratio == 0


PRESETS: dict[str, tuple[Phase, ...]] = {
    "paper": (
        Phase(until=0.4, sy=4, sx=4, ratio=0.4, agent_ratio=0.95),
        Phase(until=1.0, sy=2, sx=2, ratio=0.4, agent_ratio=0.0),
    ),
}


@dataclass(frozen=True, kw_only=True)
class AgentAttnProcessor(AttnMethod):
    """Agent attention in the self-attention layers of a UNet.

    The schedule is `phases` if given, else that of the preset. A flat setting (`ratio`, `agent_ratio`, `p`, `c`) that
    is not None then replaces that number in every phase, so `ratio=0.4` is a whole configuration.

    Raises ValueError for a number outside its range, TypeError for a value of the wrong type.
    """

    preset: Literal["paper"] = "paper"  # schedule to start from
    phases: tuple[Phase, ...] | None = None  # a schedule of your own, instead of the preset's
    ratio: float | None = None  # share of tokens merged away, in [0, 1); more = faster, coarser
    agent_ratio: float | None = None  # share merged away to make the agents, in [0, 1); 0 = merging only
    p: float | None = None  # exponent of the second softmax scale; smaller = sharper choice of agent
    c: float | None = None  # how much of its own value a token keeps; more = more detail
    levels: int = 1  # how many of the UNet's resolutions, from the highest; more = a little faster, coarser
    destinations: Literal["fixed", "random"] = "fixed"  # the token of a cell that stays put: its centre, or any
    seed: int = 0  # of the random destinations; the global random state is never touched
    fp32_logits: bool = False  # softmax in fp32; for models whose fp16 logits overflow (black pictures), as SD 2.1

    name: ClassVar[str] = "agent"
    roles: ClassVar[tuple[str, ...]] = ("spatial",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 1:
            raise ValueError(
                f"levels must be at least 1, got {self.levels}. It counts resolutions from the highest; 1 is usual."
            )
        for name in ("ratio", "agent_ratio"):
            if getattr(self, name) is not None:
                _check_share(name, getattr(self, name))
        for name in ("p", "c"):
            if getattr(self, name) is not None:
                check_not_negative(name, getattr(self, name))
        if self.phases is not None:
            _check_schedule(self.phases)
        flat = {name: getattr(self, name) for name in ("ratio", "agent_ratio", "p", "c")}
        flat = {name: value for name, value in flat.items() if value is not None}
        schedule = tuple(replace(phase, **flat) for phase in self.phases or PRESETS[self.preset])
        object.__setattr__(self, "_schedule", schedule)  # built once: layers read it inside compiled regions

    @property
    def schedule(self) -> tuple[Phase, ...]:
        """The phases that run: preset or `phases`, with the flat settings in place."""
        return self._schedule  # type: ignore[attr-defined]

    def wants(self, layer: LayerInfo) -> bool:
        """The layers of the `levels` highest resolutions."""
        return layer.level < self.levels

    @property
    def neutral(self) -> bool:
        """True if no phase merges or makes agents."""
        return all(phase.neutral for phase in self.schedule)

    @property
    def phased(self) -> bool:
        """True if the schedule has more than one phase, so that the timestep matters."""
        return len(self.schedule) > 1

    def phase(self, progress: float) -> int:
        """Index of the phase at `progress`; a phase ends just before the step at its `until`."""
        ends = [phase.until for phase in self.schedule]
        return next((i for i, end in enumerate(ends) if progress < end - ROUNDING), len(ends) - 1)

    def prepare(self, context: Context) -> None:
        """Draw the random destinations of every layer from (seed, step, layer), and from nothing else.

        The same for all rows of a call, so that guidance compares like with like at any batch size. Runs in the hook: a
        generator cannot be compiled, so random destinations work with regional compilation, not with a compiled model.
        """
        if self.destinations == "fixed":
            return
        step = context.step()
        moment = f"step {step}" if step is not None else f"progress {context.progress():.6f}"
        cells = max(height * width for height, width in context.grids.values())  # enough for any level and cell
        for installation in context.installations:
            if installation.method is self:
                for swap in installation.swaps:
                    key = f"{self.seed}, {moment}, {swap.info.name}"
                    context.slots[_slot(swap.info.name)] = draw(key, cells)

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        """Attention of one layer between merged tokens: (B, M, heads * head_dim); sets `call.unmerge` if M < N."""
        now = self._schedule[phase]  # type: ignore[attr-defined]
        softmax = _in_fp32(call.softmax) if self.fp32_logits else call.softmax
        merged, agents = count_tokens(now, call.grid)
        if not (merged or agents):
            return softmax(call.q, call.k, call.v).flatten(2)

        tokens = call.x
        source, destination = split_tokens(call.grid, (now.sy, now.sx), self._picks(call, now), device=tokens.device)
        matching = match(tokens, source, destination)
        if merged:
            features = matching.groups(merged)
            call.unmerge = features.unmerge
            tokens = features.merge(tokens)
        q, k, v = call.to_q(tokens), call.to_k(tokens), call.to_v(tokens)
        if not agents:
            return softmax(q, k, v).flatten(2)
        a = call.to_q(matching.groups(call.x.shape[1] - agents).merge(call.x))
        return agent_attention(q, k, v, a, p=now.p, c=now.c, scale=call.scale, softmax=softmax).flatten(2)

    def _picks(self, call: LayerCall, now: Phase) -> Tensor | None:
        """Which token of each cell is the destination, for `split_tokens`."""
        if self.destinations == "fixed":
            return None
        sy, sx, rows, columns = cell_grid(call.grid, (now.sy, now.sx))
        drawn = call.context.slots[_slot(call.name)][: rows * columns]
        return (drawn % (sy * sx)).to(call.x.device)


def count_tokens(phase: Phase, grid: tuple[int, int]) -> tuple[int, int]:
    """(tokens merged away, agents) of `phase` on a grid of (H, W) tokens.

    0 agents means ordinary attention: the phase has none, or they would cost more than it.
    """
    tokens = grid[0] * grid[1]
    _, _, rows, columns = cell_grid(grid, (phase.sy, phase.sx))
    sources = tokens - rows * columns
    merged = min(sources, int(phase.ratio * tokens + ROUNDING))
    if phase.agent_ratio == 0:
        return merged, 0
    agents = tokens - min(sources, int(phase.agent_ratio * tokens + ROUNDING))
    return merged, agents if agents_pay_off(agents, tokens - merged) else 0


def draw(key: str, count: int) -> Tensor:
    """`count` random int64 on the CPU that depend on `key` alone, the same on every device and platform."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
    return torch.randint(2**31, (count,), generator=generator)


def _check_schedule(phases: tuple[Phase, ...]) -> None:
    ends = [phase.until for phase in phases]
    if not ends or ends[-1] != 1 or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(
            f"phases must have growing ends, the last at 1.0, got until = {ends}. Give for example "
            "Phase(until=0.4, ...), Phase(until=1.0, ...)."
        )


def _slot(layer: str) -> tuple[str, str]:
    return "agent destinations", layer


def _in_fp32(softmax: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same attention on fp32 copies, with the result in the type of the values."""

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return softmax(q.float(), k.float(), v.float(), scale=scale).to(v.dtype)

    return attention
