"""The smallest methods that exercise the interface."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reattend.attn_processors import AttnMethod, DualScopeAttnProcessor, LayerCall, LayerInfo
from reattend.attn_processors.ops.scopes import Scopes


@dataclass(frozen=True, kw_only=True)
class Exact(AttnMethod):
    """Stock attention by our path."""

    name: ClassVar[str] = "exact"
    honours_mask: ClassVar[bool] = True

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        return call.softmax(call.q, call.k, call.v, mask=call.mask).flatten(2)


@dataclass(frozen=True, kw_only=True)
class Sharper(AttnMethod):
    """Softmax with another temperature, visibly not stock; neutral at 1."""

    name: ClassVar[str] = "sharper"
    factor: float = 4.0
    levels: int = 2

    def wants(self, layer: LayerInfo) -> bool:
        return layer.level < self.levels

    @property
    def neutral(self) -> bool:
        return self.factor == 1

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        return call.softmax(call.q, call.k, call.v, scale=self.factor * call.scale).flatten(2)


@dataclass(frozen=True, kw_only=True)
class Halves(AttnMethod):
    """Exact in the first half of the steps, sharper in the second."""

    name: ClassVar[str] = "halves"

    def phase(self, progress: float) -> int:
        return int(progress >= 0.5)

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        scale = call.scale * 4 if phase == 1 else call.scale
        return call.softmax(call.q, call.k, call.v, scale=scale).flatten(2)


@dataclass(frozen=True, kw_only=True)
class RowMeans(AttnMethod):
    """Mean of every row of the grid: depends on height and width, and goes through `unmerge`."""

    name: ClassVar[str] = "row-means"

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        height, width = call.grid
        rows = call.x.unflatten(1, (height, width)).mean(2)
        call.unmerge = lambda out: out.repeat_interleave(width, dim=1)
        return call.to_v(rows).flatten(2)


@dataclass(frozen=True, kw_only=True)
class Recording(Halves):
    """`Halves` that keeps what it saw in the context."""

    name: ClassVar[str] = "recording"

    def prepare(self, context: Any) -> None:
        context.slots.setdefault("seen", []).append((context.progress(), context.step()))


@dataclass(frozen=True, kw_only=True)
class Patching(Exact):
    """Also doubles the output of the model's last convolution, on this instance."""

    name: ClassVar[str] = "patching"

    def patches(self, model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
        conv = model.conv_out
        return [
            (conv, "forward", Doubled(type(conv).forward, conv)),
            (conv, "bias", nn.Parameter(torch.zeros_like(conv.bias))),
        ]


class Doubled:
    def __init__(self, forward: Any, module: nn.Module):
        self.plain, self.module = forward, module

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * self.plain(self.module, x)


@dataclass(frozen=True, kw_only=True)
class DenseScopes(DualScopeAttnProcessor):
    """Dual-scope attention as a judge: every query encodes the frames it sees anew and sees them under a full mask."""

    name: ClassVar[str] = "dense-scopes"

    @staticmethod
    def slot(scopes: Scopes, i: int, j: int) -> int:
        """As if the anchors before the window were taken for the frames before the query, and those behind for the rest."""
        first, end = scopes.window(i)
        early, late = [[a for a in scopes.anchors if a < first], [a for a in scopes.anchors if a >= end]]
        if j < first:
            return math.floor((i - first) * early.index(j) / len(early))
        if j >= end:
            return min(i - first + 1 + math.floor((end - 1 - i) * late.index(j) / len(late)), end - first - 1)
        return j - first

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        x, table, now = call.x, call.table, self.schedule[phase]
        frames = x.shape[1]
        scopes, rows = self.scopes(frames), []
        for i in range(frames):
            first, end = scopes.window(i)
            window, anchors = set(range(first, end)), set(scopes.anchors)
            favour_anchors = now.anchors > now.window
            biases = [now.anchors if j in anchors and (favour_anchors or j not in window) else now.window
                      for j in range(frames)]  # fmt: skip
            slots = [self.slot(scopes, i, j) if j in window | anchors else 0 for j in range(frames)]
            placed = x if table is None else x + table[slots].to(x.dtype)
            hidden = torch.tensor([j not in window | anchors for j in range(frames)])
            bias = torch.tensor(biases) - max(now.anchors, now.window) if anchors else torch.zeros(frames)
            mask = bias.masked_fill(hidden, float("-inf")).to(x.dtype)
            scale = call.scale * scopes.sharpness(i, self.train_frames, self.token_scale)
            q = call.to_q(placed[:, i : i + 1])
            rows.append(call.softmax(q, call.to_k(placed), call.to_v(placed), scale=scale, mask=mask.view(1, 1, 1, -1)))
        return torch.cat(rows, dim=1).flatten(2)
