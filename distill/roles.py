"""One model in two roles: the teacher is the stock model, the student its own attention layers with other insides.

The student has copies of the projections it trains (or low-rank adapters on them), and the new parameters of its attention.
They hang on the attention modules as `reattend_student` and are put in place for the length of a with block:

    roles = TwoRoles(model, ClearAttnProcessor(radius=8))
    teacher = model(...)            # outside of any block the model is stock, bit for bit
    with roles.student():
        student = model(...)        # the same weights elsewhere; the block must enclose backward()
    roles.remove()

So training needs one copy of the frozen weights instead of two. Modules are swapped, not parameters: what wraps parameters
(DDP, fully_shard) keeps seeing each where it was.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attn_processors import AttnMethod
from ..attn_processors.installer import install
from ..attn_processors.layer import EXTRA, TOLD
from ..attn_processors.planning import LayerFilter, denoisers
from .data import mixed
from .linear_folder import DOWN, UP

__all__ = ["LowRank", "TwoRoles"]

IMAGE = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
STUDENT = EXTRA + "student"


class LowRank(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices: base(x) + up(down(x)); zero at first."""

    def __init__(self, base: nn.Linear, rank: int, seed: int):
        super().__init__()
        self.base = base
        draw, device = torch.Generator().manual_seed(seed), base.weight.device
        down = torch.empty(rank, base.in_features)
        if device.type != "meta":
            down.uniform_(-1, 1, generator=draw).mul_(math.sqrt(1 / base.in_features))
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.down), self.up)


@dataclasses.dataclass(eq=False)
class _Part:
    """One projection in two roles: `parent` holds `stock` or `student` under `key`."""

    name: str  # path of the stock module in the denoiser
    parent: nn.Module
    key: str
    stock: nn.Linear
    student: nn.Module


class TwoRoles:
    """A denoiser that can run as teacher and as student; see the module docstring.

    Args:
        target: a stock pipeline with one denoiser, or the denoiser.
        method: what the student attends with.
        layers: narrows the layers, as in `install`.
        projections: "image": those of the picture's stream; "all": the text's as well.
        rank: None = full copies, in fp32; a number = low-rank adapters.
        seed: of the adapters' first values.

    Raises:
        ValueError: if no layer matches, or a projection is no plain linear layer.
    """

    def __init__(
        self,
        target: Any,
        method: AttnMethod,
        *,
        layers: LayerFilter | None = None,
        projections: Literal["image", "all"] = "image",
        rank: int | None = None,
        seed: int = 0,
    ):
        models = denoisers(target)
        if len(models) != 1:
            raise ValueError(f"{type(target).__name__} has {len(models)} denoisers; give the one to train")
        self.model = models[0]
        self._required = {id(parameter): parameter.requires_grad for parameter in self.model.parameters()}
        self._frozen = list(self.model.parameters())
        self._training = self.model.training
        self.handle = install(target, method, layers=layers)
        ((self._context, self._installation),) = self.handle.parts
        self.layers = [swap.info.name for swap in self._installation.swaps]
        self._parts: list[_Part] = []
        self._extras: list[tuple[str, nn.Module, str, nn.Parameter]] = []  # name, layer, attribute, value
        self._hooks: list[Any] = []
        self._recorded: dict[str, dict[str, Tensor]] | None = None
        self.told: dict[str, Tensor] = {}  # scalars that the layers of the last `recording` want to be small
        self._tapped: frozenset[str] = frozenset()
        try:
            self.model.eval().requires_grad_(False)
            for swap in self._installation.swaps:
                self._split(swap, projections, rank, seed)
            self._play(student=False)
        except BaseException:
            self.remove()
            raise

    # -- roles --------------------------------------------------------------------------------------------------------

    @contextmanager
    def student(self) -> Iterator[nn.Module]:
        """The model is the student inside the block, which must enclose backward() too."""
        self._play(student=True)
        try:
            yield self.model
        finally:
            self._play(student=False)

    def use(self, method: AttnMethod) -> None:
        """Attend with other settings of the same method from now on."""
        self._installation.method = method
        for swap in self._installation.swaps:
            swap.ours.method = method

    @property
    def method(self) -> AttnMethod:
        """What the student attends with now."""
        return self._installation.method

    def remove(self) -> None:
        """Leave the stock model as it was found."""
        self._play(student=False)
        for hook in self._hooks:
            hook.remove()
        for swap in self._installation.swaps:
            if STUDENT in swap.module._modules:
                del swap.module._modules[STUDENT]
        for _, layer, attribute, _ in self._extras:
            layer._parameters.pop(attribute, None)
        self._parts, self._extras, self._hooks = [], [], []
        self.handle.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(self._required[id(parameter)])
        self.model.train(self._training)

    # -- trained parameters -------------------------------------------------------------------------------------------

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by the names under which `save_linear` keeps them."""
        found: dict[str, nn.Parameter] = {}
        for part in self._parts:
            if isinstance(part.student, LowRank):
                found |= {part.name + DOWN: part.student.down, part.name + UP: part.student.up}
            else:
                found |= {f"{part.name}.{name}": value for name, value in part.student.named_parameters()}
        # Asked of the module: fully_shard puts sharded parameters in the place of those made here.
        return found | {name: layer._parameters[key] for name, layer, key, _ in self._extras}  # type: ignore[dict-item]

    def stored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Trained values as they are saved: in the type of the weights they replace, additions in fp32."""
        types = {f"{part.name}.{name}": value.dtype for part in self._parts for name, value in _own(part.stock)}
        return {name: value.detach().to(types.get(name, value.dtype)) for name, value in values.items()}

    # -- taps ---------------------------------------------------------------------------------------------------------

    def tap(self, layers: list[str]) -> None:
        """Choose the layers whose attention outputs `recording` gives."""
        self._tapped = frozenset(layers)

    @contextmanager
    def recording(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Attention outputs of the forwards in the block: layer -> {"image", "text" or "joined": (B, tokens, C)}.

        Close it before backward(): then what gradient checkpointing recomputes is not recorded again, and the tensors are
        those of the forward, through which gradients flow.
        """
        self._recorded, self.told = {}, {}
        self._context.slots[TOLD] = self.told
        try:
            yield self._recorded
        finally:
            self._recorded = None
            self._context.slots.pop(TOLD, None)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _split(self, swap: Any, projections: str, rank: int | None, seed: int) -> None:
        """Make the student's parts of one layer and hook both roles' outputs."""
        attn, layer = swap.module, swap.info.name
        students = nn.ModuleDict()
        wanted = IMAGE + (TEXT if projections == "all" else ())
        for path in wanted:
            stock = _submodule(attn, path)
            if stock is None:
                continue
            if type(stock) is not nn.Linear or not stock.weight.is_floating_point():
                raise ValueError(
                    f"{layer}.{path} is a {type(stock).__name__}, no plain linear layer; fuse or unload adapters, and load "
                    "the model without quantisation"
                )
            name = f"{layer}.{path}"
            parent = attn.get_submodule(path.rpartition(".")[0]) if "." in path else attn
            student: nn.Module = _copy(stock) if rank is None else LowRank(stock, rank, mixed(seed, *name.encode()))
            students[path.replace(".", "_")] = student
            self._parts.append(_Part(name, parent, path.rpartition(".")[2], stock, student))
            if path == "to_out.0":
                self._hook_input(stock, layer, "image")
                self._hook_input(student, layer, "image")
            elif path == "to_add_out":
                self._hook_input(student, layer, "text")
        attn.add_module(STUDENT, students)
        if (text_out := _submodule(attn, "to_add_out")) is not None:
            self._hook_input(text_out, layer, "text")
        if _submodule(attn, "to_out.0") is None:  # a single block of FLUX projects outside
            self._hooks.append(attn.register_forward_hook(lambda module, args, out: self._record(layer, "joined", out)))
        device = next(attn.parameters()).device
        for name, value in self.method.new_parameters(swap.info).items():
            parameter = nn.Parameter(value.to(device, torch.float32))
            attn.register_parameter(EXTRA + name, parameter)
            self._extras.append((f"{layer}.{EXTRA}{name}", attn, EXTRA + name, parameter))

    def _hook_input(self, module: nn.Module, layer: str, stream: str) -> None:
        self._hooks.append(module.register_forward_pre_hook(lambda _, args: self._record(layer, stream, args[0])))

    def _record(self, layer: str, stream: str, tensor: Tensor) -> None:
        if self._recorded is not None and layer in self._tapped:
            self._recorded.setdefault(layer, {})[stream] = tensor

    def _play(self, student: bool) -> None:
        for part in self._parts:
            part.parent._modules[part.key] = part.student if student else part.stock
        for swap in self._installation.swaps:
            swap.ours.neutral = swap.ours.retired or not student or swap.ours.method.neutral


def _copy(stock: nn.Linear) -> nn.Linear:
    copied = nn.Linear(stock.in_features, stock.out_features, stock.bias is not None, device="meta")
    copied.to_empty(device=stock.weight.device)
    with torch.no_grad():
        for name, value in _own(stock):
            copied.get_parameter(name).copy_(value)
    return copied.float()


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        found = module._modules.get(name) if module is not None else None
        module = found  # type: ignore[assignment]
    return module
