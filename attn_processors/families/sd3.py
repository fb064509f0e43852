"""Stable Diffusion 3 and 3.5: joint layers (picture, then text) and, in 3.5 medium, second layers of the picture alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..compat import Attention, JointAttnProcessor2_0
from ..method import LayerInfo
from . import Change, Family, TakeArguments, Through, argument
from .joint import JointCall, JointLayer

if TYPE_CHECKING:
    from ..context import Context

LAYER = re.compile(r"transformer_blocks\.\d+\.attn(2?)")

REMEDIES = {
    "FusedJointAttnProcessor2_0": "call unfuse_qkv_projections() first",
    "SD3IPAdapterJointAttnProcessor2_0": "load the pipeline without its IP-Adapter",
}


class SD3Layer(JointLayer):
    """A layer of Stable Diffusion 3, around the method the same as diffusers' JointAttnProcessor2_0."""

    text_first = False

    def others(self, context: Context) -> tuple[int, int]:
        return (0, 0) if self.name.endswith("attn2") else super().others(context)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """Joint: (image (B, N, C), text (B, T, C)). Without text (attn2): image alone."""
        if self.method is None:
            self.refuse_blank()
        call = None
        if not self.neutral:
            call = self.open(attn, hidden_states, encoder_hidden_states, attention_mask, None, holds_text=False)
        if call is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask)
        out = self.attend(call)
        if encoder_hidden_states is None:
            return self._image_alone(attn, call, out)
        out = self.checked(call, out)
        image, text = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        for layer in attn.to_out:  # linear, dropout
            image = layer(image)
        return image, text if attn.context_pre_only else attn.to_add_out(text)

    def _image_alone(self, attn: Any, call: JointCall, out: Tensor) -> Tensor:
        """Without text and positions the layer is that of a UNet, and tokens may have been merged."""
        if call.unmerge is None:
            out = self.checked(call, out)
        for layer in attn.to_out:
            out = layer(out)
        return out if call.unmerge is None else call.unmerge(out)


class SD3Family(Family):
    layer = SD3Layer

    def layers(self, model: nn.Module) -> list[tuple[LayerInfo, nn.Module]]:
        found = []
        for name, module in model.named_modules():
            match = LAYER.fullmatch(name)
            if match and isinstance(module, Attention):
                role = "spatial" if match[1] else "joint"
                info = LayerInfo(name=name, role=role, level=0, heads=module.heads, width=module.inner_dim)
                found.append((info, module))
        return found

    def why_not(self, module: nn.Module) -> str | None:
        if type(module.processor) is JointAttnProcessor2_0:
            return None
        name = type(module.processor).__name__
        remedy = REMEDIES.get(name, "put the stock processor there first, or leave the layer out with layers=...")
        return f"it carries {name}, which we would not know how to imitate; {remedy}"

    def read(self, context: Context, args: tuple, kwargs: dict) -> None:
        hidden_states = argument(context.model, args, kwargs, "hidden_states")
        context.timestep = argument(context.model, args, kwargs, "timestep")
        context.batch, context.frames, context.device = hidden_states.shape[0], 1, hidden_states.device
        text = argument(context.model, args, kwargs, "encoder_hidden_states")
        context.text = 0 if text is None else text.shape[1]
        patch = context.model.config.patch_size
        height, width = (side // patch for side in hidden_states.shape[-2:])
        context.grids = {height * width: (height, width)}

    def rearrange(self, context: Context, take: Change, join: Change) -> list[Any]:
        """Behind the patch embedding, whose positions need the whole picture, and before patches become a picture."""
        model = context.model
        if "ControlNet" in type(model).__name__:
            return super().rearrange(context, take, join)
        residuals = TakeArguments(("block_controlnet_hidden_states",), take)
        return [
            model.register_forward_pre_hook(residuals, with_kwargs=True),
            model.pos_embed.register_forward_hook(Through(take)),
            model.proj_out.register_forward_hook(Through(join)),
        ]


FAMILY = SD3Family()
