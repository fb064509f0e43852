"""Perturbed-attention guidance in films: where the pipeline perturbs, a token of the last part of the batch sees itself alone.

The stock processors for that cut the batch they get into equal parts. In a film a layer gets a clip, which may hold any rows of
the batch, and layers between frames carry attention of ours. So theirs are put aside, and every layer keeps what it has for
the rows that are not perturbed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors.context import Context, context_of
from ..attn_processors.dual_scope import DualScopeAttnProcessor
from ..attn_processors.families.video_unet import VideoUNetLayer
from ..attn_processors.installer import patched

__all__ = ["check_layers", "check_perturbs", "perturbed"]

STOCK = ("PAGCFGIdentitySelfAttnProcessor2_0", "PAGIdentitySelfAttnProcessor2_0")


@contextmanager
def perturbed(pipe: Any) -> Iterator[None]:
    """For the length of a with block, the pipeline perturbs films as it perturbs short ones; harmless for others."""
    if not hasattr(pipe, "_set_pag_attn_processor"):
        yield
        return
    context = context_of(pipe.unet)
    assert context is not None, "films are made with attention of ours"
    stock, ours = pipe._set_pag_attn_processor, {}

    def put(*args: Any, **kwargs: Any) -> None:
        """Stands for `pipe._set_pag_attn_processor`: looks where it puts its own, and puts ours there."""
        layers = [part for part in pipe.unet.modules() if hasattr(part, "processor")]
        before = {part: part.processor for part in layers}
        try:
            stock(*args, **kwargs)
        except BaseException:  # half-way, with some of its own in place
            for part in layers:
                part.processor = before[part]
            raise
        for part in layers:
            if part.processor is not before[part]:
                ours[part] = part.processor = Perturbed(before[part], context)

    with patched([(pipe, "_set_pag_attn_processor", put)]):
        try:
            yield
        finally:
            for part, processor in ours.items():
                if part.processor is processor:  # the pipeline does not get so far after an error
                    part.processor = processor.inner


class Perturbed:
    """Stands for the processor of a self-attention layer."""

    def __init__(self, inner: Any, context: Context):
        self.inner, self.context = inner, context

    @property
    def idle(self) -> bool:
        """Does the stock table put the places of frames in?"""
        return getattr(self.inner, "idle", True)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states: (B, N, C)"""
        kept = self._kept(len(hidden_states))
        parts = []
        if kept:
            mask = None if attention_mask is None else attention_mask[:kept]
            parts.append(self.inner(attn, hidden_states[:kept], None, mask, temb))
        if kept < len(hidden_states):
            parts.append(self._itself(attn, hidden_states[kept:]))
        return torch.cat(parts)

    def _kept(self, rows: int) -> int:
        """How many rows of these are not perturbed; they come first."""
        context = self.context
        if getattr(self.inner, "temporal", False):  # a row for every place, in all parts of the batch alike
            return rows // context.batch * (context.batch - 1)
        first = context.rows[0] if context.rows is not None else 0
        return min(max((context.batch - 1) * context.frames - first, 0), rows)

    def _itself(self, attn: nn.Module, hidden_states: Tensor) -> Tensor:
        x, inner = hidden_states, self.inner
        if isinstance(inner, VideoUNetLayer) and isinstance(inner.method, DualScopeAttnProcessor) and not self.idle:
            x = inner.method.placed(inner._open(attn, x, (x.shape[1], 1), None, None))
        out = attn.to_v(x)
        for layer in attn.to_out:  # linear, dropout
            out = layer(out)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def check_perturbs(pipe: Any) -> None:
    """Raise ValueError if the pipeline was given processors of somebody else's for the layers it perturbs."""
    found = [type(part).__name__ for part in getattr(pipe, "_pag_attn_processors", None) or ()]
    if other := [name for name in found if name not in STOCK]:
        raise ValueError(
            f"{type(pipe).__name__} perturbs attention with {other[0]}, which a film would not know how to split; call "
            "pipe.set_pag_applied_layers(pipe.pag_applied_layers) for the usual ones"
        )


def check_layers(pipe: Any, patterns: Sequence[str]) -> None:
    """Raise ValueError if a pattern is part of no name of a self-attention layer, as the stock pipeline does later."""
    found = [name for name, part in pipe.unet.named_modules() if getattr(part, "is_cross_attention", None) is False]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in found):
            raise ValueError(
                f"{type(pipe).__name__} has no self-attention that pag_applied_layers {pattern!r} is part of the name of; "
                f"give part of a name such as {found[0]!r}"
            )
