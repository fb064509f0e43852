"""Qwen-Image: double blocks only, text first; padded text is hidden by a mask of the model's own.

The grid is in `img_shapes`: frames, rows and columns of each picture of a row, the one to denoise first; further ones are
references (Qwen-Image-Edit). Several pictures to denoise at once (Qwen-Image-Layered) have no one grid.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import Change, TakeArguments, Through, UnsupportedModel, argument
from .joint import JointFamily, JointLayer, rotated

if TYPE_CHECKING:
    from ..context import Context

LAYER = re.compile(r"transformer_blocks\.\d+\.attn")


class QwenImageLayer(JointLayer):
    """A layer of Qwen-Image, around the method the same as diffusers' QwenDoubleStreamAttnProcessor2_0."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """(image (B, N, C), text (B, T, C)). Masks are bool, (B, T); `attention_mask` is an error of the stock layer."""
        if self.method is None:
            self.refuse_blank()
        call = None
        if not self.neutral and attention_mask is None and encoder_hidden_states is not None:
            mask = encoder_hidden_states_mask
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(hidden_states.shape[:2])], dim=1)
            call = self.open(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb, holds_text=False)
        if call is None:
            return self.stock(
                attn,
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                attention_mask,
                image_rotary_emb,
            )
        out = self.checked(call, self.attend(call))
        text, image = out.split_with_sizes([call.layout.before, hidden_states.shape[1]], dim=1)
        for layer in attn.to_out:  # linear, dropout
            image = layer(image)
        return image, attn.to_add_out(text)

    def rotate(self, x: Tensor, rotary: Any) -> Tensor:
        if rotary is None:
            return x
        image, text = rotary  # (N, d / 2), (T, d / 2)
        return rotated(x, torch.cat([text, image]).unsqueeze(1))

    def rotary_of(self, places: Tensor, rotary: Any) -> Any:
        image, text = rotary
        turns = torch.cat([text, image])[places]
        return turns, turns[:0]

    def rotary_at(self, places: Tensor) -> Any:
        ((height, width),) = self.context.grids.values()
        embed = self.context.model.pos_embed
        rows, columns = places.cpu().float().unbind(dim=1)
        if embed.scale_rope:  # counted from the middle of the picture
            rows, columns = rows - (height - height // 2), columns - (width - width // 2)
        axes = zip((torch.zeros_like(rows), rows, columns), embed.axes_dim, strict=True)
        turns = torch.cat([embed.rope_params(axis, dim, embed.theta) for axis, dim in axes], dim=-1)
        turns = turns.to(self.context.device)
        return turns, turns[:0]

    def split(self, attn: Any, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attn.inner_dim // attn.heads))  # tensor parallelism leaves fewer heads


class QwenImageFamily(JointFamily):
    layer = QwenImageLayer
    names = LAYER
    processor = "QwenDoubleStreamAttnProcessor2_0"

    def read(self, context: Context, args: tuple, kwargs: dict) -> None:
        hidden_states = argument(context.model, args, kwargs, "hidden_states")
        context.timestep, context.timestep_unit = argument(context.model, args, kwargs, "timestep"), 1000
        context.batch, context.frames, context.device = hidden_states.shape[0], 1, hidden_states.device
        context.text = argument(context.model, args, kwargs, "encoder_hidden_states").shape[1]
        shapes = argument(context.model, args, kwargs, "img_shapes")
        row = shapes[0] if isinstance(shapes, list) else shapes  # the model takes the first for all
        pictures = row if isinstance(row, list) else [row]
        frames, height, width = pictures[0]
        one = frames == 1 and not getattr(context.model.config, "use_layer3d_rope", False)
        context.grids = {height * width: (height, width)} if one else {}
        context.references = sum(math.prod(picture) for picture in pictures[1:])

    def rearrange(self, context: Context, take: Change, join: Change) -> list[Any]:
        """Behind the first projection; the positions, which the model makes for the whole picture, likewise."""
        model = context.model
        if getattr(model.config, "zero_cond_t", False):
            raise UnsupportedModel(f"{type(model).__name__} with zero_cond_t cannot be split over ranks yet.")
        residuals = TakeArguments(("controlnet_block_samples",), take)
        return [
            model.register_forward_pre_hook(residuals, with_kwargs=True),
            model.img_in.register_forward_hook(Through(take)),
            model.pos_embed.register_forward_hook(_TakePositions(take)),
            model.proj_out.register_forward_hook(Through(join)),
        ]


@dataclass(eq=False)
class _TakePositions:
    """Hook for the positions of picture and text."""

    take: Change

    def __call__(self, module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.take(output[0][None])[0], output[1]


FAMILY = QwenImageFamily()
