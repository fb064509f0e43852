"""One picture over several ranks: each computes some rows of the token grid, and all get the same picture.

    torchrun --nproc-per-node 4 script.py

    install(pipe, "clear", radius=16)
    with patches(pipe):
        image = pipe(prompt, generator=torch.Generator().manual_seed(7)).images[0]  # the same on every rank

Every rank runs the stock pipeline with the same arguments. Inside the denoiser a rank holds its own rows and a copy of the
text; all operators but attention are local, and attention asks `comm` for the rows around its own. The denoiser's answer
is put together again, so scheduler and VAE see whole latents. Which ranks there are changes who computes, never what.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors.comm import Comm, split_rows
from ..attn_processors.context import Context, context_of
from ..attn_processors.ops.layout import TokenLayout
from ..attn_processors.ops.strips import Strip
from ..attn_processors.planning import supported

__all__ = ["patches"]


@contextmanager
def patches(target: Any, group: Any = None) -> Iterator[Comm]:
    """Split the rows of every picture over the ranks of a process group for the length of a with block.

    Args:
        target: a pipeline, or its denoiser, whose attention layers all carry an attention of ours that can be split
            ("clear").
        group: a torch process group; None = all ranks, or just this one where torch.distributed was not started.

    Yields:
        this rank's `Comm`, which counts the bytes it sent.

    Raises:
        ValueError: a layer with other attention, a picture with fewer rows than ranks, ranks that were called with
            different arguments.
        UnsupportedModel: a model that cannot be split.
        RankLost: in the block, if another rank is gone; it is named.
    """
    comm = Comm.of_group(group)
    handles: list[Any] = []
    models: list[Context] = []
    try:
        for model in supported(target):
            context = _ready(model)
            models.append(context)
            if comm.size > 1:
                context.strip = Strip(comm, ())  # its rows come with each call
                # Before the family's own hooks, which need the strip, and after the context, which knows the grid.
                handles.append(model.register_forward_pre_hook(_Splitter(context, comm)))
                handles += context.family.rearrange(context, _Take(context), _Join(context))
        yield comm
    finally:
        for handle in handles:
            handle.remove()
        for context in models:
            context.strip = None


class _Splitter:
    """Root pre-hook: finds this call's strip."""

    def __init__(self, context: Context, comm: Comm):
        self.context, self.comm = context, comm

    def __call__(self, model: nn.Module, args: tuple) -> None:
        context, comm = self.context, self.comm
        if context.references or len(context.grids) != 1:
            raise ValueError("reference pictures cannot be split over ranks yet; generate without them.")
        ((height, width),) = context.grids.values()
        layout = TokenLayout(height, width, before=context.text)
        together = 1
        for item in context.installations:
            rows = item.method.strip_rows(layout)
            if rows is None:
                raise ValueError(f"attention {item.method.name!r} cannot be split over ranks; use 'clear'.")
            together = math.lcm(together, rows)
        mine = torch.tensor([height, width, context.text, context.batch, together], device=context.device)
        for rank, theirs in enumerate(comm.everyones(mine)):
            if not torch.equal(theirs, mine):
                raise ValueError(
                    f"rank {rank} was called with (rows, columns, text tokens, batch, rows together) = "
                    f"{tuple(theirs.tolist())}, rank {comm.rank} with {tuple(mine.tolist())}; call all ranks alike."
                )
        context.strip = Strip(comm, tuple(split_rows(height, comm.size, together)))


class _Take:
    """Image tokens of the whole picture -> of this rank's rows."""

    def __init__(self, context: Context):
        self.context = context

    def __call__(self, x: Tensor) -> Tensor:
        strip, width = self.context.strip, _width(self.context)
        first, end = strip.rows  # type: ignore[union-attr]
        return x[:, first * width : end * width]


class _Join:
    """This rank's image tokens -> those of the whole picture, on every rank."""

    def __init__(self, context: Context):
        self.context = context

    def __call__(self, x: Tensor) -> Tensor:
        strip, width = self.context.strip, _width(self.context)
        parts = [(first * width, end * width) for first, end in strip.parts]  # type: ignore[union-attr]
        return strip.comm.collect(x, parts, [(0, parts[-1][1])] * strip.comm.size)  # type: ignore[union-attr]


def _width(context: Context) -> int:
    ((_, width),) = context.grids.values()
    return width


def _ready(model: nn.Module) -> Context:
    """The context of a model all of whose attention layers are ours."""
    context = context_of(model)
    ours = {swap.info.name for item in context.installations for swap in item.swaps} if context else set()
    if context is None or not ours:
        raise ValueError(f"{type(model).__name__} has no attention of ours; install 'clear' first.")
    others = [info.name for info, _ in context.family.layers(model) if info.name not in ours]
    if others:
        raise ValueError(
            f"{len(others)} attention layers are stock, for example {others[0]!r}, and would see one rank's rows only; "
            "install 'clear' on all of them (radius may be as large as you like)."
        )
    return context
