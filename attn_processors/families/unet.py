"""UNets: Stable Diffusion 1.x, 2.x and XL, ControlNets, the spatial layers of AnimateDiff and text-to-video.

Every spatial self-attention sees the latents at one of the model's resolutions, and each level halves both sides,
rounding up. So the grid of a layer follows from its number of tokens; frames, if there are any, sit in the batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..compat import Attention, AttnProcessor, AttnProcessor2_0
from ..layer import LayerCall, LayerProcessor
from ..method import LayerInfo
from . import Family

if TYPE_CHECKING:
    from ..context import Context

# attn1 of a spatial transformer, or a bare attention block; never motion_modules, temp_attentions or transformer_in
SPATIAL = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.\d+(?:\.transformer_blocks\.\d+\.attn1)?")

CROSS = re.compile(r"(?:.*\.)?transformer_blocks\.\d+\.attn2")

REMEDIES = {  # processors diffusers itself puts there
    "SlicedAttnProcessor": "call disable_attention_slicing() first",
    "XFormersAttnProcessor": "call disable_xformers_memory_efficient_attention() first, and choose xformers with "
    "set_attention_backend('xformers') instead",
    "FusedAttnProcessor2_0": "call unfuse_qkv_projections() first",
}


class UNetLayer(LayerProcessor):
    """A self-attention layer of a UNet, around the method the same as diffusers' AttnProcessor2_0."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (B, N, C) or (B, C, H, W); returns the same shape."""
        if self.method is None:
            self.refuse_blank()
        if self.neutral or self.idle:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        grid, problem = self._grid(hidden_states, encoder_hidden_states, attention_mask)
        if problem is not None:
            self.mismatch(problem)
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        call = self._open(attn, hidden_states, grid, attention_mask, temb)
        return self._close(attn, call, self.attend(call), hidden_states)

    def _grid(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, mask: Tensor | None
    ) -> tuple[tuple[int, int], str | None]:
        """The layer's (H, W), or what does not fit."""
        if encoder_hidden_states is not None:
            return (0, 0), "it was called with encoder_hidden_states, but it is a self-attention layer"
        if mask is not None and not self.method.honours_mask:
            return (0, 0), f"it got an attention_mask, which {type(self.method).__name__} cannot honour"
        if hidden_states.ndim == 4:
            return (hidden_states.shape[2], hidden_states.shape[3]), None
        tokens = hidden_states.shape[1]
        grid = self.context.grids.get(tokens)
        if grid is None:
            sizes = ", ".join(f"{h} x {w}" for h, w in self.context.grids.values()) or "none: the model was not called"
            return (0, 0), f"{tokens} tokens fit no level of the model (height x width: {sizes})"
        return grid, None

    def _open(
        self, attn: Any, hidden_states: Tensor, grid: tuple[int, int], mask: Tensor | None, temb: Tensor | None
    ) -> LayerCall:
        x = hidden_states
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        batch, tokens, _ = x.shape
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, tokens, batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        return LayerCall(self, attn, x, grid, mask)

    def _close(self, attn: Any, call: LayerCall, out: Tensor, hidden_states: Tensor) -> Tensor:
        for layer in attn.to_out:  # linear, dropout
            out = layer(out)
        if call.unmerge is not None:
            out = call.unmerge(out)
        if out.shape[1] != call.x.shape[1]:
            raise ValueError(
                f"layer {self.name!r}: {type(self.method).__name__}.attend returned {out.shape[1]} of "
                f"{call.x.shape[1]} tokens; a method that drops tokens sets call.unmerge."
            )
        if hidden_states.ndim == 4:
            out = out.transpose(-1, -2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def project_q(self, attn: Any, x: Tensor) -> Tensor:
        q = attn.to_q(x).unflatten(-1, (attn.heads, -1))
        return q if attn.norm_q is None else attn.norm_q(q)

    def project_k(self, attn: Any, x: Tensor) -> Tensor:
        k = attn.to_k(x).unflatten(-1, (attn.heads, -1))
        return k if attn.norm_k is None else attn.norm_k(k)

    def project_v(self, attn: Any, x: Tensor) -> Tensor:
        return attn.to_v(x).unflatten(-1, (attn.heads, -1))


class UNetFamily(Family):
    layer = UNetLayer

    def layers(self, model: nn.Module) -> list[tuple[LayerInfo, nn.Module]]:
        found = []
        for name, module in model.named_modules():
            match = SPATIAL.fullmatch(name)
            if match and isinstance(module, Attention) and not module.is_cross_attention:
                found.append((name, module, depth(match, len(model.down_blocks))))
        top = min((depth for *_, depth in found), default=0)
        return [
            (
                LayerInfo(name=name, role="spatial", level=depth - top, heads=module.heads, width=module.inner_dim),
                module,
            )
            for name, module, depth in found
        ]

    def listen(self, context: Context, ear: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> list[Any]:
        return [
            module.register_forward_hook(Tap(ear), with_kwargs=True)
            for name, module in context.model.named_modules()
            if CROSS.fullmatch(name) and isinstance(module, Attention)
        ]

    def why_not(self, module: nn.Module) -> str | None:
        processor = module.processor
        if type(processor) in (AttnProcessor, AttnProcessor2_0):
            return None
        name = type(processor).__name__
        remedy = REMEDIES.get(name, "put a stock processor there first, or leave the layer out with layers=...")
        return f"it carries {name}, which we would not know how to imitate; {remedy}"

    def read(self, context: Context, args: tuple, kwargs: dict) -> None:
        sample = args[0] if args else kwargs["sample"]
        context.timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        context.batch, context.frames = sample.shape[0], sample.shape[2] if sample.ndim == 5 else 1
        context.device = sample.device
        height, width = sample.shape[-2:]
        grids: dict[int, tuple[int, int]] = {}
        for _ in context.model.down_blocks:
            grids.setdefault(height * width, (height, width))
            height, width = (height + 1) // 2, (width + 1) // 2
        context.grids = grids


@dataclass(frozen=True, eq=False)
class Tap:
    """Hook of a text cross-attention layer that passes on what the layer was called with and what it returned."""

    ear: Callable[[Any, Tensor, Tensor, Tensor], Tensor]

    def __call__(self, attn: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        x = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        if not isinstance(text, Tensor) or x.ndim != 3:  # an IP-Adapter's text comes with pictures
            return output
        return self.ear(attn, x, text, output)


def depth(match: re.Match, levels: int) -> int:
    """How many times the latents were halved where this layer is."""
    side, index = match.groups()
    if side is None:
        return levels - 1
    return int(index) if side == "down" else levels - 1 - int(index)


FAMILY = UNetFamily()
