"""Tile order for a whole model: its tokens are put in order once a call, not in every layer.

Attention is the only part of a transformer that mixes tokens, so the model computes the same in any order, if positions
and residuals go along. The block-sparse kernel wants tile order (`ops.layout`). With the model in it and whole tiles, layers
gather no queries and results, and no keys and values either where text fills whole blocks of 128, as FLUX's 512 tokens do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ops.layout import inverse, tile_order

if TYPE_CHECKING:
    from .context import Context

__all__ = ["TileOrder"]


class TileOrder:
    """Image tokens (B, N, ...) of a call from raster to tile order and back; as they are where the context says raster.

    Tokens of reference pictures follow those of the picture, and stay where they are.
    """

    def __init__(self, context: Context):
        self.context = context
        self._key: tuple = ()
        self._there = self._back = torch.empty(0, dtype=torch.int64)

    def take(self, x: Tensor) -> Tensor:
        """From raster to tile order."""
        if self.context.order == "raster":
            return x
        self._refresh(x)
        return x[:, self._there]

    def join(self, x: Tensor) -> Tensor:
        """From tile to raster order."""
        if self.context.order == "raster":
            return x
        self._refresh(x)
        return x[:, self._back]

    def _refresh(self, x: Tensor) -> None:
        ((height, width),) = self.context.grids.values()
        key = height, width, x.shape[1], x.device
        if key != self._key:
            with torch.inference_mode(False):
                others = torch.arange(height * width, x.shape[1], device=x.device)
                self._there = torch.cat([tile_order(height, width, device=x.device), others])
                self._back = inverse(self._there)
            self._key = key
