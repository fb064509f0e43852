"""What layers with joint attention share: image and text tokens in one softmax, with projections of their own each.

The picture's tokens lie in raster order and are followed by those of reference pictures, if there are any. Text comes
before or after them, as the model has it. Everything but the picture's own tokens is global to a local pattern.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..layer import LayerCall, LayerProcessor
from ..method import LayerInfo
from ..ops.layout import TokenLayout
from . import Family

if TYPE_CHECKING:
    from ..context import Context


class JointCall(LayerCall):
    """A call in which image and text tokens attend together; q, k and v are (B, layout.tokens, h, d) with rotary applied.

    `x` holds the image tokens (and those of reference pictures, which follow them), `text` the text tokens, or None
    where the layer takes one sequence that already holds both.
    """

    text: Tensor | None  # (B, T, C)

    def __init__(
        self,
        layer: JointLayer,
        attn: Any,
        x: Tensor,
        text: Tensor | None,
        layout: TokenLayout,
        rotary: Any = None,
        mask: Tensor | None = None,
    ):
        super().__init__(layer, attn, x, layout.shape, mask, layout)
        self.text, self.rotary, self._joint = text, rotary, layer

    @property
    def text_places(self) -> range:
        if self._joint.text_first:
            return range(self.layout.before)
        texts = 0 if self.text is None else self.text.shape[1]
        return range(self.layout.tokens - texts, self.layout.tokens)

    @property
    def heads(self) -> int:
        return self.q.shape[2]  # of the projection: under tensor parallelism fewer than attn.heads

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    @property
    def q(self) -> Tensor:
        if self._q is None:
            self._q = self._joint.rotate(self._joined("q"), self.rotary)
        return self._q

    @property
    def k(self) -> Tensor:
        if self._k is None:
            self._k = self._joint.rotate(self._joined("k"), self.rotary)
        return self._k

    @property
    def v(self) -> Tensor:
        if self._v is None:
            self._v = self._joined("v")
        return self._v

    @property
    def unrotated_q(self) -> Tensor:
        return self._joined("q")

    def rotated(self, x: Tensor, places: Tensor) -> Tensor:
        if self.rotary is None:
            return x
        return self._joint.rotate(x, self._joint.rotary_of(places, self.rotary))

    @property
    def picture(self) -> Tensor:
        start = self.layout.before if self.text is None else 0
        return self.x[:, start : start + self.layout.grid_tokens]

    def keys_at(self, x: Tensor, places: Tensor) -> Tensor:
        return self._joint.rotate(self.to_k(x), self._joint.rotary_at(places))

    def _joined(self, which: str) -> Tensor:
        """Image and text projections in the layer's order, before the rotary embedding: (B, layout.tokens, h, d)."""
        image = getattr(self._layer, f"project_{which}")(self._attn, self.x)
        if self.text is None:
            return image
        text = self._joint.project_text(self._attn, self.text, which)
        return torch.cat([text, image] if self._joint.text_first else [image, text], dim=1)


class JointLayer(LayerProcessor):
    """Base of the joint layers; a family adds `__call__` with the signature of its stock processor."""

    text_first = True  # whether text comes before the picture
    makes: type[JointCall] = JointCall

    def others(self, context: Context) -> tuple[int, int]:
        if self.text_first:
            return context.text, context.references
        return 0, context.references + context.text

    def open(
        self, attn: Any, x: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any, holds_text: bool
    ) -> JointCall | None:
        """The call, or None after a warning if its tokens do not fit and the stock layer has to run.

        holds_text: `x` is the whole sequence, text and image, already joined by the model.
        """
        context = self.context
        if not context.grids:
            self.mismatch(
                "the model's call told no grid: its image ids are no full raster, or it denoises other things than "
                "one picture of one size in each row, or it was not called"
            )
            return None
        ((tokens, (height, width)),) = context.grids.items()
        if context.strip is not None:
            first, end = context.strip.rows
            height, tokens = end - first, (end - first) * width
        image = tokens + context.references
        texts = context.text if holds_text else 0 if text is None else text.shape[1]
        if x.shape[1] != image + (texts if holds_text else 0):
            self.mismatch(
                f"{x.shape[1]} tokens are not the {height} x {width} of the picture, {context.references} of references"
                f"{f' and {texts} of text' if holds_text else ''}"
            )
            return None
        before, after = (texts, context.references) if self.text_first else (0, context.references + texts)
        layout = TokenLayout(height, width, before=before, after=after, order=context.order)
        valid, problem = key_validity(mask, x.shape[0], layout.tokens)
        if mask is not None and problem is None and not (self.method.honours_mask or self.method.honours_padding):
            problem = f"it got an attention_mask, which {type(self.method).__name__} cannot honour"
        if problem is not None:
            self.mismatch(problem)
            return None
        hidden = None if valid is None else valid[:, None, None]
        call = self.makes(self, attn, x, text, layout, rotary, hidden)
        if context.strip is not None:
            call.whole = replace(layout, height=context.strip.parts[-1][1])
        return call

    def checked(self, call: JointCall, out: Tensor) -> Tensor:
        if call.unmerge is not None or out.shape[1] != call.layout.tokens:
            raise ValueError(
                f"layer {self.name!r}: {type(self.method).__name__}.attend returned {out.shape[1]} of "
                f"{call.layout.tokens} tokens; joint layers need all of them."
            )
        return out

    def rotate(self, x: Tensor, rotary: Any) -> Tensor:
        """Queries or keys (B, N, h, d) with the rotary embedding of the call; here there is none."""
        return x

    def rotary_of(self, places: Tensor, rotary: Any) -> Any:
        """What `rotate` needs for tokens at these places (n,) in the sequence, from that of the whole sequence."""
        return tuple(table[places] for table in rotary)

    def rotary_at(self, places: Tensor) -> Any:
        """What `rotate` needs for image tokens at (row, column) of `places` (n, 2), fractions allowed."""
        return None

    def project_q(self, attn: Any, x: Tensor) -> Tensor:
        return _normed(attn.norm_q, self.split(attn, attn.to_q(x)))

    def project_k(self, attn: Any, x: Tensor) -> Tensor:
        return _normed(attn.norm_k, self.split(attn, attn.to_k(x)))

    def project_v(self, attn: Any, x: Tensor) -> Tensor:
        return self.split(attn, attn.to_v(x))

    def project_text(self, attn: Any, text: Tensor, which: str) -> Tensor:
        """Text tokens (B, T, C) as queries ("q"), keys ("k") or values ("v"), (B, T, h, d)."""
        x = self.split(attn, getattr(attn, f"add_{which}_proj")(text))
        return x if which == "v" else _normed(getattr(attn, f"norm_added_{which}", None), x)

    def split(self, attn: Any, x: Tensor) -> Tensor:
        """(B, N, h * d) -> (B, N, h, d)"""
        return x.unflatten(-1, (attn.heads, -1))


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of channels turned in the plane: x (B, N, h, d), unit complex numbers that broadcast to (B, N, h, d / 2)."""
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


def key_validity(mask: Tensor | None, batch: int, total: int) -> tuple[Tensor | None, str | None]:
    """(keys that may be seen, bool of shape (B, total); what is wrong) of an attention_mask that hides whole keys.

    Only such masks have a meaning for every method: they come from padded text.
    """
    if mask is None:
        return None, None
    if mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != total or mask.shape[0] not in (1, batch):
        return None, (
            f"it got an attention_mask of shape {tuple(mask.shape)} and {mask.dtype}; one that hides whole keys is "
            f"bool, (B, {total}) or (B, 1, 1, {total})"
        )
    return mask.expand(batch, total), None


def _normed(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class JointFamily(Family):
    """A model whose joint layers are all of one kind and carry one stock processor."""

    names: re.Pattern[str]  # of the layers
    processor: str  # class name of the stock one
    remedies: ClassVar[Mapping[str, str]] = {}  # what to do about some of the others, by class name

    def layers(self, model: nn.Module) -> list[tuple[LayerInfo, nn.Module]]:
        return [
            (LayerInfo(name=name, role="joint", level=0, heads=module.heads, width=module.inner_dim), module)
            for name, module in model.named_modules()
            if self.names.fullmatch(name) and hasattr(module, "processor")
        ]

    def why_not(self, module: nn.Module) -> str | None:
        name = type(module.processor).__name__
        if name == self.processor:
            return None
        remedy = self.remedies.get(name, "put the stock processor there first, or leave the layer out with layers=...")
        return f"it carries {name}, which we would not know how to imitate; {remedy}"
