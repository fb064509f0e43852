"""Linear forms of attention that a student can be trained into: kernel-linear, InLine, Flow; and neighborhood attention.

In a joint layer the picture's tokens attend among themselves in the linear form and to the text (and whatever else is global) by
softmax, blended per head; text tokens see everything by softmax, as before::

    out = g linear + (1 - g) softmax over text       g = sigmoid(a_h + b_h . q), a and b trained, zero at first

A softmax model put into these forms makes noise until it is trained (`reattend.distill`). The mathematics is in `ops.linear`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from .clear import ClearAttnProcessor
from .method import AttnMethod, LayerInfo
from .ops.linear import depthwise, flow_attention, inline_attention, kernel_attention

if TYPE_CHECKING:
    from .layer import LayerCall

__all__ = ["FlowAttnProcessor", "InLineAttnProcessor", "KernelLinearAttnProcessor", "NeighborhoodAttnProcessor"]

GATE, GATE_WEIGHT = "gate", "gate_weight"  # (h,) and (h, d)
LOCAL_IN, LOCAL_OUT = "local_in", "local_out"  # (h, d, d) and (h, d, 9 d)


@dataclass(frozen=True, kw_only=True)
class NeighborhoodAttnProcessor(ClearAttnProcessor):
    """Neighborhood attention: local attention in squares of 2 radius - 1 tokens (Hassani et al., arXiv 2204.07143)."""

    radius: float = 8.0
    pattern: Literal["disc", "square", "tile"] = "square"

    name: ClassVar[str] = "neighborhood"


@dataclass(frozen=True, kw_only=True)
class LinearForm(AttnMethod):
    """Base of the linear forms: a subclass says how grid tokens mix."""

    roles: ClassVar[tuple[str, ...]] = ("spatial", "joint")
    honours_padding: ClassVar[bool] = True

    def mix(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention among the N grid tokens, (B, N, h, d) each -> (B, N, h, d)."""
        raise NotImplementedError

    def new_parameters(self, layer: LayerInfo) -> dict[str, Tensor]:
        """The gate between picture and text, where both attend together."""
        if layer.role != "joint":
            return {}
        return {GATE: torch.zeros(layer.heads), GATE_WEIGHT: torch.zeros(layer.heads, layer.width // layer.heads)}

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        """Attention of one layer, (B, N, heads * head_dim)."""
        layout, q, k, v = call.layout, call.q, call.k, call.v
        grid_q, grid_k, grid_v = (x[:, layout.grid] for x in (q, k, v))
        grid = self.mix(call, grid_q, grid_k, grid_v)
        if not layout.global_tokens:
            return grid.flatten(2)
        hidden = None if call.mask is None else layout.globals_of(call.mask[:, 0, 0])[:, None, None]
        seen = call.softmax(grid_q, layout.globals_of(k), layout.globals_of(v), mask=hidden)
        share = self._share(call, grid_q)
        grid = seen + share * (grid - seen)
        others = call.softmax(layout.globals_of(q), k, v, mask=call.mask)
        return layout.assemble(grid, others).flatten(2)

    def _share(self, call: LayerCall, q: Tensor) -> Tensor | float:
        """How much of the picture there is in the blend, (B, N, h, 1)."""
        bias, weight = call.extra(GATE), call.extra(GATE_WEIGHT)
        if bias is None or weight is None:
            return 0.5
        return (bias.to(q.dtype) + (q * weight.to(q.dtype)).sum(-1)).sigmoid().unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class KernelLinearAttnProcessor(LinearForm):
    """Kernel-linear attention with elu + 1 as feature map (Katharopoulos et al., arXiv 2006.16236)."""

    name: ClassVar[str] = "linear"

    def mix(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel_attention(q, k, v)


@dataclass(frozen=True, kw_only=True)
class FlowAttnProcessor(LinearForm):
    """Flow attention: tokens compete for what flows between them (Wu et al., arXiv 2202.06258)."""

    name: ClassVar[str] = "flow"

    def mix(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flow_attention(q, k, v)


@dataclass(frozen=True, kw_only=True)
class InLineAttnProcessor(LinearForm):
    """InLine attention (Han et al., arXiv 2412.06590): an injective linear form, and a local term.

    The local term is a 3 x 3 convolution of the values whose kernels a small network predicts for each head from the mean of
    its values; it is zero until trained.
    """

    name: ClassVar[str] = "inline"

    def mix(self, call: LayerCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = inline_attention(q, k, v, call.scale)
        first, last = call.extra(LOCAL_IN), call.extra(LOCAL_OUT)
        if first is None or last is None:
            return out
        mean = v.mean(1)  # (B, h, d)
        inner = torch.nn.functional.gelu(torch.einsum("bhd,hde->bhe", mean, first.to(v.dtype)))
        kernels = torch.einsum("bhe,hef->bhf", inner, last.to(v.dtype)).unflatten(-1, (-1, 3, 3))
        return out + depthwise(v, call.grid, kernels)

    def new_parameters(self, layer: LayerInfo) -> dict[str, Tensor]:
        """The gate, and the network of the local term, whose last layer is zero."""
        width = layer.width // layer.heads
        draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(layer.name.encode()).digest()[:7], "big"))
        first = torch.rand(layer.heads, width, width, generator=draw).mul_(2).sub_(1) * width**-0.5
        local = {LOCAL_IN: first, LOCAL_OUT: torch.zeros(layer.heads, width, 9 * width)}
        return super().new_parameters(layer) | local
