"""PixArt and the first DiT: plain self-attention on patches at one resolution; text, if any, has layers of its own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from ..compat import Attention
from ..method import LayerInfo
from . import argument
from .unet import UNetFamily

if TYPE_CHECKING:
    from ..context import Context

LAYER = re.compile(r"transformer_blocks\.\d+\.attn1")


class PixArtFamily(UNetFamily):
    """Layers are called as in a UNet; only where they are and what the grid is differs."""

    def layers(self, model: nn.Module) -> list[tuple[LayerInfo, nn.Module]]:
        return [
            (LayerInfo(name=name, role="spatial", level=0, heads=module.heads, width=module.inner_dim), module)
            for name, module in model.named_modules()
            if LAYER.fullmatch(name) and isinstance(module, Attention) and not module.is_cross_attention
        ]

    def read(self, context: Context, args: tuple, kwargs: dict) -> None:
        hidden_states = argument(context.model, args, kwargs, "hidden_states")
        context.timestep = argument(context.model, args, kwargs, "timestep")
        context.batch, context.frames, context.device = hidden_states.shape[0], 1, hidden_states.device
        patch = context.model.config.patch_size
        height, width = (side // patch for side in hidden_states.shape[-2:])
        context.grids = {height * width: (height, width)}


FAMILY = PixArtFamily()
