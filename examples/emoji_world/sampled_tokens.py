"""A baseline to compare with: pictures of a story that see a random share of each other's tokens, with no masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attn_processors import AttnMethod, LayerCall, LayerInfo
from ..attn_processors.context import Context

__all__ = ["SampledTokens"]


@dataclass(frozen=True, kw_only=True)
class SampledTokens(AttnMethod):
    """Consistent self-attention by sampled tokens (StoryDiffusion, arXiv 2405.01434, section 3.1), written from the paper.

    Every picture of a story also sees a random share of the tokens of the others; nobody is told apart.
    """

    rate: float = 0.5
    seed: int = 0

    name: ClassVar[str] = "sampled-tokens"
    roles: ClassVar[tuple[str, ...]] = ("spatial",)

    def wants(self, layer: LayerInfo) -> bool:
        return layer.name.startswith("up_blocks")

    def prepare(self, context: Context) -> None:
        """One draw a step for each grid: which tokens of a picture the others see."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + round(context.progress() * 1_000))
        for tokens in context.grids:
            count = max(1, round(self.rate * tokens))
            context.slots[self.name, tokens] = torch.randperm(tokens, generator=draw)[:count]

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        tokens = call.x.shape[1]
        picked = call.context.slots[self.name, tokens].to(call.x.device)
        rows = call.x.shape[0] // 2  # of a guidance branch
        out = torch.empty_like(call.q)
        for row in range(call.x.shape[0]):
            first = row // rows * rows
            others = [other for other in range(first, first + rows) if other != row]
            k, v = (torch.cat([x[row], x[others][:, picked].flatten(0, 1)])[None] for x in (call.k, call.v))
            out[row] = call.softmax(call.q[[row]], k, v)[0]
        return out.flatten(2)
