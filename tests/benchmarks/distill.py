"""What does one model in two roles save, and what does it cost? A training step against that of a plain two-model recipe.

Arms: `one model` is the trainer's own (`distill.roles`); `two models` holds the teacher beside a whole student, with the
same attention, losses and AdamW. Both take the same steps on the architecture of tiny-flux with random weights. State is
counted: weights, gradients, moments.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors import ClearAttnProcessor, install
from ..distill.losses import matched_layers, student_losses
from ..distill.roles import TwoRoles
from .frame import Conditions, Found, arms_grid, goal, page, run_benchmark
from .measure import Run, measured
from .rounds import Timed, repeat, untimed

__all__ = ["run", "table"]

ONE, TWO = "one model", "two models"
TEXT, BATCH, SIDE = 64, 4, 16  # text tokens, samples, tokens along a side
SPEED, STATE = 0.97, 0.7  # goals: at least, at most (the latter at FLUX size)
RADIUS = 4.0
IMAGE = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.0.")


class OneModel:
    """The trainer's way."""

    def __init__(self, model: nn.Module, match: str):
        self.roles = TwoRoles(model, ClearAttnProcessor(radius=RADIUS))
        self.roles.tap(matched_layers(self.roles.layers, match))
        self.trained = list(self.roles.trained().values())
        self.models = [model]

    def step(self, inputs: dict[str, Any], target: Tensor) -> Tensor:
        roles = self.roles
        with torch.no_grad(), roles.recording() as theirs:
            teacher = roles.model(**inputs, return_dict=False)[0]
        with roles.student():
            with roles.recording() as ours:
                student = roles.model(**inputs, return_dict=False)[0]
            taps = [
                {name: [kept[key] for key in sorted(kept)] for name, kept in some.items()} for some in (ours, theirs)
            ]
            loss = student_losses(student, teacher, target, *taps).total
            loss.backward()
        return loss.detach()


class TwoModels:
    """A whole student beside the teacher."""

    def __init__(self, model: nn.Module, match: str):
        self.teacher, self.pupil = model.eval().requires_grad_(False), copy.deepcopy(model).eval()
        install(self.pupil, ClearAttnProcessor(radius=RADIUS))
        for name, parameter in self.pupil.named_parameters():
            parameter.requires_grad_(any(part in name for part in IMAGE))
        self.trained = [parameter for parameter in self.pupil.parameters() if parameter.requires_grad]
        self.models = [self.teacher, self.pupil]
        names = [name for name, module in model.named_modules() if name.endswith(".attn")]
        self.layers = matched_layers(names, match)

    def step(self, inputs: dict[str, Any], target: Tensor) -> Tensor:
        with torch.no_grad(), self.tapped(self.teacher) as theirs:
            teacher = self.teacher(**inputs, return_dict=False)[0]
        with self.tapped(self.pupil) as ours:
            student = self.pupil(**inputs, return_dict=False)[0]
        loss = student_losses(student, teacher, target, ours, theirs).total
        loss.backward()
        return loss.detach()

    @contextmanager
    def tapped(self, model: nn.Module) -> Any:
        """Attention outputs of the forward in the block, as `TwoRoles.recording` gives them."""
        kept: dict[str, list[Tensor]] = {}
        hooks = []
        for name in self.layers:
            attn, some = model.get_submodule(name), kept.setdefault(name, [])
            if getattr(attn, "to_out", None) is None:
                hooks.append(attn.register_forward_hook(lambda _, args, out, some=some: some.append(out)))
                continue
            for projection in (attn.to_out[0], attn.to_add_out):  # called in this order: image, text
                hooks.append(projection.register_forward_pre_hook(lambda _, args, some=some: some.append(args[0])))
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class Case(Timed):
    """A training step of a model."""

    model: str
    ROUNDS = 15  # of one step of each arm, so that a slow moment hits one pair only

    def __str__(self) -> str:
        return f"training step of {self.model}"


def measure(conditions: Conditions) -> Found:
    """Both arms from the same weights on the same inputs."""
    place, quick = conditions.device, conditions.quick
    model = _model(quick).to(place)
    made = {ONE: OneModel, TWO: TwoModels}
    arms: dict[str, Any] = {name: kind(copy.deepcopy(model), "every:4") for name, kind in made.items()}
    optimizers = {name: torch.optim.AdamW(arm.trained, lr=1e-4) for name, arm in arms.items()}
    inputs, target = _inputs(model, place, quick)
    losses: dict[str, list[float]] = {name: [] for name in arms}

    def step(name: str) -> None:
        with torch.enable_grad():
            losses[name].append(float(arms[name].step(inputs, target)))
            optimizers[name].step()
            optimizers[name].zero_grad()

    def time(_: Case, name: str) -> Run:
        return measured(lambda: step(name), place)

    for name in arms:
        step(name)  # warm up
    trained = f"{_millions(model.parameters())} M parameters, {_millions(arms[ONE].trained)} M trained"
    case = Case(trained, arms=list(arms))
    repeat([case], time, conditions)
    return Found(
        torch.float32,
        cases=[case.told({"model": trained}, lambda name: _told(case, name, arms[name]))],
        goals=[] if quick else _goals(case),
        left_out=untimed([case]),
        more={"same_losses": max(abs(a - b) for a, b in zip(*losses.values(), strict=True))},
    )


def table(result: dict[str, Any]) -> str:
    """The result for people, as a Markdown table."""
    numbers = {
        "speed against two models": ("speed", ".3f"),
        "weights, gradients, moments, MiB": ("state_mib", ".1f"),
        "of two models": ("state_ratio", ".2f"),
    }
    return page(result, arms_grid(result["cases"], {"model": itemgetter("model")}, numbers))


def _millions(parameters: Iterable[nn.Parameter]) -> str:
    return f"{sum(parameter.numel() for parameter in parameters) / 1e6:.1f}"


def _model(quick: bool) -> nn.Module:
    from ..emoji_world.train_flux import build_transformer

    torch.manual_seed(0)
    if not quick:
        return build_transformer(4).eval()
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def _inputs(model: nn.Module, device: torch.device, quick: bool) -> tuple[dict[str, Any], Tensor]:
    draw = torch.Generator().manual_seed(1)
    side, batch, text = (8, 1, 7) if quick else (SIDE, BATCH, TEXT)
    config = model.config
    latents, target = torch.randn(2, batch, side * side, config.in_channels, generator=draw).to(device).unbind(0)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(side).float(), torch.arange(side).float())
    return {
        "hidden_states": latents,
        "encoder_hidden_states": torch.randn(batch, text, config.joint_attention_dim, generator=draw).to(device),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim, generator=draw).to(device),
        "timestep": torch.rand(batch, generator=draw).to(device),
        "img_ids": ids.to(device),
        "txt_ids": torch.zeros(text, 3, device=device),
    }, target


def state_bytes(models: list[nn.Module], trained: list[nn.Parameter]) -> int:
    """Weights of all models, and for each trained number a gradient and two moments."""
    weights = {id(p): p.nbytes for model in models for p in model.parameters()} | {id(p): p.nbytes for p in trained}
    return sum(weights.values()) + 3 * sum(p.nbytes for p in trained)


def _told(case: Case, name: str, arm: Any) -> dict[str, Any]:
    state, plain = state_bytes(arm.models, arm.trained), _plain_state(arm)
    return {"speed": case.ratio(TWO, name), "state_mib": state / 2**20, "state_ratio": state / plain}


def _plain_state(arm: Any) -> int:
    """Of two whole models."""
    frozen = {id(p): p.nbytes for p in arm.models[0].parameters()} if isinstance(arm, TwoModels) else {
        id(p): p.nbytes for p in arm.models[0].parameters() if not any(p is own for own in arm.trained)
    }  # fmt: skip
    return 2 * sum(frozen.values()) + 3 * sum(p.nbytes for p in arm.trained)


def _goals(case: Case) -> list[dict[str, Any]]:
    """What the project wants: about the same speed, and much less state at FLUX size."""
    from ..distill.config import DistillConfig
    from ..distill.plan import memory_plan

    flux = DistillConfig(model="black-forest-labs/FLUX.1-dev", data=Path("-"), precision="bfloat16", checkpointing=True)
    return [
        goal(f"speed of {ONE} against {TWO}", case.ratio(TWO, ONE), "at_least", SPEED),
        goal(f"state at FLUX size against {TWO}", memory_plan(flux).ratio, "at_most", STATE),
    ]


run = partial(run_benchmark, "distill", measure, table)
