"""FLUX: double blocks, where text and image have projections of their own, and single blocks on one joined sequence.

Order of tokens: text, picture, reference pictures (Kontext). The grid is in `img_ids`: column 0 tells the pictures of a
call apart, columns 1 and 2 are row and column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..compat import apply_rotary_emb
from . import Change, TakeArguments, argument, replaced
from .joint import JointFamily, JointLayer

if TYPE_CHECKING:
    from ..context import Context

LAYER = re.compile(r"(?:single_)?transformer_blocks\.\d+\.attn")


class FluxJoint(JointLayer):
    """Rotary embedding and heads as FLUX has them."""

    def rotate(self, x: Tensor, rotary: Any) -> Tensor:
        return x if rotary is None else apply_rotary_emb(x, rotary, sequence_dim=1)

    def rotary_at(self, places: Tensor) -> Any:
        ids = self.context.slots["flux img_ids"]
        first = (ids[0] if ids.ndim == 3 else ids)[:1].to(places)  # grids need not begin at 0
        beyond = places.shape[1] + 1  # FLUX.2 has a fourth column
        columns = [first[:, :1].expand(len(places), 1), first[:, 1:beyond] + places]
        columns.append(first[:, beyond:].expand(len(places), -1))
        return self.context.model.pos_embed(torch.cat(columns, dim=1).to(ids.device))

    def split(self, attn: Any, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, attn.head_dim))  # tensor parallelism leaves fewer heads than attn.heads


class FluxLayer(FluxJoint):
    """A layer of FLUX, around the method the same as diffusers' FluxAttnProcessor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Double block: (image (B, N, C), text (B, T, C)). Single block: the joined sequence, before its projection."""
        if self.method is None:
            self.refuse_blank()
        single = encoder_hidden_states is None
        call = None
        if not self.neutral:
            call = self.open(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, holds_text=single
            )
        if call is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        out = self.checked(call, self.attend(call))
        if single:
            return out
        text, image = out.split_with_sizes([call.layout.before, out.shape[1] - call.layout.before], dim=1)
        for layer in attn.to_out:  # linear, dropout
            image = layer(image)
        return image, attn.to_add_out(text)


class FluxFamily(JointFamily):
    layer = FluxLayer
    residuals: tuple[str, ...] = ("controlnet_block_samples", "controlnet_single_block_samples")
    names = LAYER
    processor = "FluxAttnProcessor"
    remedies: ClassVar[Mapping[str, str]] = {"FluxIPAdapterAttnProcessor": "call unload_ip_adapter() first"}

    def read(self, context: Context, args: tuple, kwargs: dict) -> None:
        hidden_states = argument(context.model, args, kwargs, "hidden_states")
        context.timestep, context.timestep_unit = argument(context.model, args, kwargs, "timestep"), 1000
        context.batch, context.frames, context.device = hidden_states.shape[0], 1, hidden_states.device
        context.text = argument(context.model, args, kwargs, "encoder_hidden_states").shape[1]
        ids = argument(context.model, args, kwargs, "img_ids")
        if context.slots.get("flux img_ids") is ids:  # the same object at every step: read it once
            return
        context.slots["flux img_ids"] = ids
        grid = raster(ids[0] if ids.ndim == 3 else ids)
        context.grids = {} if grid is None else {grid[0] * grid[1]: grid}
        context.references = 0 if grid is None else ids.shape[-2] - grid[0] * grid[1]

    def rearrange(self, context: Context, take: Change, join: Change) -> list[Any]:
        model = context.model
        if "ControlNet" in type(model).__name__:
            return super().rearrange(context, take, join)
        return [
            model.register_forward_pre_hook(TakeArguments(("hidden_states", *self.residuals), take), with_kwargs=True),
            model.register_forward_pre_hook(_TakeIds(take), with_kwargs=True),
            model.register_forward_hook(_JoinOutput(join)),
        ]


@dataclass(eq=False)
class _TakeIds:
    """Root pre-hook for image ids, (N, 3) or (B, N, 3)."""

    take: Change

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = argument(model, args, kwargs, "img_ids")
        taken = self.take(ids if ids.ndim == 3 else ids[None])
        return replaced(model, args, kwargs, img_ids=taken if ids.ndim == 3 else taken[0])


@dataclass(eq=False)
class _JoinOutput:
    """Root hook for what the model gives, a tuple or an object with a sample."""

    join: Change

    def __call__(self, model: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.join(output[0]), *output[1:])
        output.sample = self.join(output.sample)
        return output


def raster(ids: Tensor) -> tuple[int, int] | None:
    """(H, W) of the first picture in image ids; None if its tokens are not a full raster in order.

    ids: which picture, row, column of each token, shape (N, 3); FLUX.2 has a fourth column, the same for all of a picture.
    """
    rows = ids.detach().to("cpu", torch.float64)
    others = (rows[:, 0] != rows[0, 0]).nonzero()
    first = rows[: int(others[0]) if len(others) else len(rows), 1:]
    first = first - first.amin(0)
    height, width = (int(side) + 1 for side in first[:, :2].amax(0))
    if height * width != len(first) or first[:, 2:].any():
        return None
    wanted = torch.cartesian_prod(torch.arange(height).double(), torch.arange(width).double())
    return (height, width) if torch.equal(first[:, :2], wanted) else None


FAMILY = FluxFamily()
