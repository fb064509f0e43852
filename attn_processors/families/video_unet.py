"""AnimateDiff: a UNet whose frames sit in the batch, and motion modules between its layers in which frames meet.

The spatial layers are those of any UNet. A motion module turns the sequence around: every place of the picture is a row,
and its tokens are the frames. It adds a table of places to the tokens before each of its two self-attentions, and normalises
over all frames at once. Nothing else in the model mixes frames. A sparse ControlNet is the first half of such a UNet.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..compat import Attention
from ..layer import LayerCall
from ..method import LayerInfo
from .unet import UNetFamily, UNetLayer, depth

if TYPE_CHECKING:
    from ..context import Context
    from ..method import AttnMethod

TEMPORAL = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.motion_modules\.\d+\.transformer_blocks\.\d+\.attn[12]")
OUTER = ("conv_in", "conv_norm_out", "conv_act", "conv_out", "time_proj", "time_embedding", "time_embed_act",
         "add_time_proj", "add_embedding", "encoder_hid_proj", "controlnet_mid_block")  # fmt: skip
BLOCK_PARTS = ("resnets", "attentions", "downsamplers", "upsamplers")


class VideoCall(LayerCall):
    """A call of a temporal layer: a row for every place of the picture, and its tokens are this rank's frames."""

    table: Tensor | None = None  # places of frames, (P, C); None: the model has none


class VideoUNetLayer(UNetLayer):
    """A spatial layer as in any UNet, or a temporal one."""

    @property
    def temporal(self) -> bool:
        return TEMPORAL.fullmatch(self.name) is not None

    def _grid(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, mask: Tensor | None
    ) -> tuple[tuple[int, int], str | None]:
        if not self.temporal:
            return super()._grid(hidden_states, encoder_hidden_states, mask)
        if encoder_hidden_states is not None or mask is not None:
            return (0, 0), "it was called with encoder_hidden_states or a mask, but it attends between frames alone"
        if hidden_states.shape[1] != self.context.frames:
            return (0, 0), f"{hidden_states.shape[1]} tokens are not the {self.context.frames} frames of this call"
        return (hidden_states.shape[1], 1), None

    def _open(
        self, attn: Any, hidden_states: Tensor, grid: tuple[int, int], mask: Tensor | None, temb: Tensor | None
    ) -> LayerCall:
        if not self.temporal:
            return super()._open(attn, hidden_states, grid, mask, temb)
        call = VideoCall(self, attn, hidden_states, grid)
        block = self.context.model.get_submodule(self.name.rpartition(".")[0])
        if block.pos_embed is not None:
            call.table = block.pos_embed.pe[0]
        return call


class Places:
    """Stands for the `forward` of a position table: adds nothing while the attentions behind it put places in."""

    def __init__(self, table: nn.Module, attention: nn.Module):
        self.table, self.attention = table, attention

    def __call__(self, x: Tensor) -> Tensor:
        return type(self.table).forward(self.table, x) if self.attention.processor.idle else x


class VideoUNetFamily(UNetFamily):
    layer = VideoUNetLayer

    def layers(self, model: nn.Module) -> list[tuple[LayerInfo, nn.Module]]:
        found = []
        for name, module in model.named_modules():
            match = TEMPORAL.fullmatch(name)
            if match and isinstance(module, Attention) and not module.is_cross_attention:
                found.append((name, module, depth(match, len(model.down_blocks))))
        temporal = [
            (LayerInfo(name=name, role="temporal", level=level, heads=module.heads, width=module.inner_dim), module)
            for name, module, level in found
        ]
        return super().layers(model) + temporal

    def read(self, context: Context, args: tuple, kwargs: dict) -> None:
        super().read(context, args, kwargs)
        if context.clip is not None:  # the latents may stay in host memory
            context.device = next(context.model.parameters()).device

    def places(self, model: nn.Module, method: AttnMethod) -> list[tuple[nn.Module, str, Any]]:
        """Patches for blocks whose attentions carry `method`, so that it puts the places in. Both must, or none."""
        patches: list[tuple[nn.Module, str, Any]] = []
        for name, block in model.named_modules():
            if ".motion_modules." not in name or not hasattr(block, "attn1"):
                continue
            attentions = [attn for attn in (block.attn1, block.attn2) if attn is not None]
            ours = [getattr(attn.processor, "method", None) is method for attn in attentions]
            if any(ours) and "FreeNoise" in type(block).__name__:
                raise ValueError(f"motion block {name!r} runs FreeNoise; call pipe.disable_free_noise() first.")
            if any(ours) and not all(ours):
                raise ValueError(
                    f"the attentions of motion block {name!r} share one table of places, and only one of them was "
                    "chosen; let layers=... take both or none."
                )
            if all(ours) and block.pos_embed is not None:
                patches.append((block.pos_embed, "forward", Places(block.pos_embed, block.attn1)))
        return patches

    def framewise(self, model: nn.Module) -> list[nn.Module]:
        """The modules between the motion modules: each picture goes through them on its own."""
        parts = [getattr(model, name, None) for name in OUTER]
        parts += list(getattr(model, "controlnet_down_blocks", ()))
        for block in (*model.down_blocks, model.mid_block, *getattr(model, "up_blocks", ())):
            for name in BLOCK_PARTS:
                parts += list(getattr(block, name, None) or ())
        return [part for part in parts if part is not None]

    def motion_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules in which frames meet, by name."""
        return {
            name: module
            for name, module in model.named_modules()
            if re.fullmatch(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.motion_modules\.\d+", name)
        }


FAMILY = VideoUNetFamily()
