"""Z-Image: single blocks on one sequence of picture, filling and text; two refining blocks before see the picture alone.

The model is called with a list of pictures and one of captions. It fills each picture and each caption up to a multiple of
32 with tokens that take part like all others, and hides from attention what it adds to make the rows of a batch equal.
So the filling counts as tokens that follow the picture, as those of references do elsewhere. Rows with pictures of
different sizes, several pictures in a row (Z-Image-Omni) and several frames have no one grid.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import UnsupportedModel, argument
from .joint import JointFamily, JointLayer, rotated

if TYPE_CHECKING:
    from ..context import Context

LAYER = re.compile(r"(?:layers|noise_refiner)\.\d+\.attention")  # context_refiner sees text alone
FILLED_TO = 32  # tokens of a picture, and of a caption, are a multiple of it


class ZImageLayer(JointLayer):
    """A layer of Z-Image, around the method the same as diffusers' ZSingleStreamAttnProcessor."""

    text_first = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.holds_text = not self.name.startswith("noise_refiner")

    def others(self, context: Context) -> tuple[int, int]:
        return super().others(context) if self.holds_text else (0, context.references)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """The sequence (B, N, C); the mask hides keys, bool, (B, N). Returns the same shape."""
        if self.method is None:
            self.refuse_blank()
        call = None
        if not self.neutral:
            call = self.open(attn, hidden_states, None, attention_mask, freqs_cis, holds_text=self.holds_text)
        if call is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis)
        out = self.checked(call, self.attend(call))
        for layer in attn.to_out:  # linear, dropout
            out = layer(out)
        return out

    def rotate(self, x: Tensor, rotary: Any) -> Tensor:
        return x if rotary is None else rotated(x, rotary.unsqueeze(2))

    def rotary_of(self, places: Tensor, rotary: Any) -> Any:
        return rotary[:, places]

    def rotary_at(self, places: Tensor) -> Any:
        raise UnsupportedModel(
            "Z-Image places a picture behind its caption, elsewhere in each row, so keys of other pictures cannot be placed "
            "in it yet; use FLUX, FLUX.2, Qwen-Image or Stable Diffusion 3."
        )


class ZImageFamily(JointFamily):
    layer = ZImageLayer
    names = LAYER
    processor = "ZSingleStreamAttnProcessor"

    def read(self, context: Context, args: tuple, kwargs: dict) -> None:
        pictures = argument(context.model, args, kwargs, "x")
        captions = argument(context.model, args, kwargs, "cap_feats")
        # The model counts time from noise to picture; everybody else the other way.
        context.timestep, context.timestep_unit = 1 - argument(context.model, args, kwargs, "t"), 1000
        context.batch, context.frames = len(pictures), 1
        context.grids, context.references, context.text = {}, 0, 0
        if isinstance(pictures[0], list):
            context.device = pictures[0][-1].device
            return
        context.device = pictures[0].device
        patch = argument(context.model, args, kwargs, "patch_size") or 2  # not given: the model's default
        deep = argument(context.model, args, kwargs, "f_patch_size") or 1
        _, frames, height, width = pictures[0].shape
        if frames != deep or any(picture.shape != pictures[0].shape for picture in pictures):
            return
        height, width = height // patch, width // patch
        context.grids = {height * width: (height, width)}
        context.references = -(height * width) % FILLED_TO
        context.text = max(len(caption) + -len(caption) % FILLED_TO for caption in captions)


FAMILY = ZImageFamily()
