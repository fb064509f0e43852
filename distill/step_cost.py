"""What a denoising step costs: its operations, counted while it runs, and its time.

Counted are matrix products, convolutions and fused attention, two operations for a multiplication and its addition, by
torch's FlopCounterMode: what is really computed, keys that a mask hides afterwards among it. Exponentials, norms and sums
are not. *Attention* is what the layers of a student do between their projections; the teacher's is that of the same layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["Flops", "counted", "timed"]


@dataclass(frozen=True)
class Flops:
    """Operations of a step of one picture: of the attention in some layers, and of the whole denoiser."""

    attention: float
    model: float


def counted(model: nn.Module, layers: Sequence[str], work: Callable[[], Any], steps: int) -> Flops:
    """Run `work`, which makes one picture in `steps` steps, and count what `model` computes in it, per step.

    Args:
        layers: names of the attention layers whose attention is told.
    """
    with FlopCounterMode(display=False, custom_mapping=_fused()) as counter:
        work()
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    root, attention = type(model).__name__, 0
    for layer in layers:
        attention += counts.get(f"{root}.{layer}", 0)
        for name, part in model.get_submodule(layer).named_modules():
            if name and next(part.children(), None) is None:  # a projection
                attention -= counts.get(f"{root}.{layer}.{name}", 0)
    return Flops(attention / steps, counts.get(root, 0) / steps)


@contextmanager
def timed(model: nn.Module) -> Iterator[list[float]]:
    """Seconds of each forward of `model` in a with block, its hooks among them."""
    seconds: list[float] = []
    began = 0.0

    def start(*given: Any) -> None:
        nonlocal began
        _finish(model)
        began = time.perf_counter()

    def end(*given: Any) -> None:
        _finish(model)
        seconds.append(time.perf_counter() - began)

    hooks = [model.register_forward_pre_hook(start, prepend=True), model.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _fused() -> dict[Any, Callable[..., int]]:
    """The fused attention of CPUs, which the counter does not know."""

    def attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}


def _finish(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
