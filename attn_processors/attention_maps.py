"""Masks read from attention while a picture comes about: listen, spread, assign, and hold on to what is good.

Nothing is known at the first step, so masks begin after `warmup`. From half of it on every step adds to a running
average of the maps; masks are made anew every few steps, taken if they agree with the last ones or are surer, and frozen
once the picture has its layout (with few steps, the first masks come later). Only rows with the prompt are listened to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ops.maps import assign, clean, pool_tokens, resized, spread_powers, unit

if TYPE_CHECKING:
    from .context import Context
    from .isolation_reposition import IsolationRepositionAttnProcessor
    from .layer import LayerCall
    from .places import Place
    from .subjects import Cast

__all__ = ["Maps"]

MOST_TOKENS = 1024  # of a grid that maps are made on; larger ones are pooled
EVERY = 5  # steps between two masks
FREEZE = 0.6  # share of the steps after which masks stay
KEEP = 0.7  # share of the old maps in the running average
AGREE = 0.6  # overlap (intersection over union) at which a new mask replaces the last one anyway
ROUNDING = 1e-6
LOST = "its words have no place of their own in the attention"

Row = tuple[str, int]  # kind, number
Grid = tuple[int, int]
Level = tuple[Grid, bool]  # the grid after pooling; whether it was the latents' own before


class Heard:
    """Sums of one row in one call: per level of text maps P (N, K) and of self-attention A (N, N), with their counts."""

    def __init__(self, latents: Grid) -> None:
        self.latents = latents  # the finest grid of the model
        self.text: dict[Level, tuple[Tensor, int]] = {}
        self.own: dict[Level, tuple[Tensor, int]] = {}

    def add(self, what: dict[Level, tuple[Tensor, int]], grid: Grid, small: Grid, value: Tensor) -> None:
        """Add what a layer on `grid` said, pooled to `small`."""
        level = (small, grid == self.latents)
        total, count = what.get(level, (0.0, 0))
        what[level] = (total + value, count + 1)

    def spread(self) -> tuple[Tensor, Grid] | None:
        """Maps on the finest grid that has both, (N, K), each spread over what belongs together; None if nothing came.

        The latents' own grid is left out where there are coarser ones: words act there too diffusely.
        """
        both = [level for level in self.text if level in self.own]
        both = [level for level in both if not level[1]] or both
        if not both:
            return None
        finest = max((small for small, _ in both), key=lambda grid: grid[0] * grid[1])
        maps = []
        for level in both:
            (p, n), (a, m) = self.text[level], self.own[level]
            a = a / m
            maps.append(resized(spread_powers(a / a.sum(1, keepdim=True), p / n), level[0], finest))
        return torch.stack(maps).mean(0), finest


class Maps:
    """The attention maps of one installed method; `begin` is called for every call of the denoiser."""

    def __init__(self, method: IsolationRepositionAttnProcessor):
        self.method = method
        self.listening: dict[Row, int] = {}  # row of the call whose attention is kept
        self._heard: dict[Row, Heard] = {}
        self._average: dict[Row, tuple[Tensor, Grid]] = {}
        self._sure: dict[tuple[str, int, str], float] = {}
        self._last: int | None = None  # step of the last masks
        self._progress = -1.0
        self._latents: Grid = (0, 0)

    def begin(self, context: Context, cast: Cast) -> None:
        """Take in what the call before has told, make masks if it is time, and say which rows to listen to now."""
        progress = context.progress()
        if progress < self._progress:  # another run
            self._average.clear()
            self._sure.clear()
            self._last = None
        elif progress > self._progress:
            self._take_in()
        self._heard, self._progress = {}, progress
        self._latents = max(context.grids.values(), key=lambda grid: grid[0] * grid[1], default=(0, 0))
        due = self._last is None or cast.step - self._last >= EVERY
        warm, frozen = progress >= self.method.warmup - ROUNDING, progress > FREEZE + ROUNDING
        if warm and (not frozen or self._last is None) and due and self._average:
            self._make(context, cast)
            self._last = cast.step
        if warm and frozen and self.method.strict:
            for kind, number, place in cast.all_places():
                if place.automatic and (kind, number, place.subject) not in cast.found:
                    cast.missed(context, kind, number, place.subject, LOST)
        listen = self.method.warmup / 2 - ROUNDING <= progress <= FREEZE and cast.call == 0
        self.listening = {}
        if listen:
            for kind, number, place in cast.all_places():
                if place.automatic:
                    self.listening[kind, number] = cast.rows(kind, number, context, [cast.branches - 1])[0]

    def hear(self, context: Context, attn: Any, x: Tensor, text: Tensor) -> None:
        """Text maps of a cross-attention layer of a UNet: image tokens (B, N, C) ask, text (B, T, C') answers."""
        grid = context.grids.get(x.shape[1])
        if not self.listening or grid is None:
            return
        rows = list(self.listening.values())
        x, text = x[rows], text[rows]
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        q, k = (part.unflatten(-1, (attn.heads, -1)) for part in (attn.to_q(x), attn.to_k(text)))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        logits = torch.einsum("b n h d, b t h d -> b h n t", q.float(), k.float()) * attn.scale
        for row, probabilities in zip(self.listening, logits.softmax(-1).mean(1), strict=True):
            self._text(row, grid, _by_word(probabilities, self._words(row)))

    def see(self, call: LayerCall, cast: Cast) -> None:
        """Self-attention of one of our layers, and in joint layers the text maps too."""
        if not self.listening:
            return
        layout = call.layout
        for row, number in self.listening.items():
            q, k = call.q[number].float(), call.k[number].float()
            ask, answer = q[layout.grid], k[layout.grid]
            if layout.global_tokens:
                background = next((place.words for place in self._row(row) if not place.subject), ())
                words = [*self._words(row), background]
                if any(one and max(one) >= layout.global_tokens for one in words):
                    raise ValueError(f"words of {cast.called(*row)} lie beyond the {layout.global_tokens} text tokens.")
                text = layout.globals_of(torch.arange(layout.tokens)[None])[0]
                places = [text[list(one)] for one in words]
                union = torch.cat(places).unique().to(k.device)
                logits = torch.einsum("n h d, t h d -> h n t", ask, k[union]) * call.scale
                local = [tuple(torch.searchsorted(union.cpu(), one).tolist()) for one in places]
                self._text(row, layout.shape, _by_word(logits.softmax(-1).mean(0), local[:-1]))
            pooled, grid = pool_tokens(ask.flatten(1), layout.shape, MOST_TOKENS)
            keys, _ = pool_tokens(answer.flatten(1), layout.shape, MOST_TOKENS)
            shape = (len(pooled), *ask.shape[1:])
            logits = torch.einsum("n h d, m h d -> h n m", pooled.view(shape), keys.view(shape)) * call.scale
            heard = self._of(row)
            heard.add(heard.own, layout.shape, grid, logits.softmax(-1).mean(0))

    def _text(self, row: Row, grid: Grid, maps: Tensor) -> None:
        pooled, small = pool_tokens(maps, grid, MOST_TOKENS)
        heard = self._of(row)
        heard.add(heard.text, grid, small, pooled)

    def _of(self, row: Row) -> Heard:
        return self._heard.setdefault(row, Heard(self._latents))

    def _row(self, row: Row) -> tuple[Place, ...]:
        return self.method.panels[row[1]] if row[0] == "panel" else (self.method.references[row[1]],)

    def _places(self, row: Row) -> list[Place]:
        return [place for place in self._row(row) if place.automatic and place.subject]

    def _words(self, row: Row) -> list[tuple[int, ...]]:
        return [place.words for place in self._places(row)]

    def _take_in(self) -> None:
        for row, heard in self._heard.items():
            spread = heard.spread()
            if spread is None:
                continue
            maps, grid = spread
            if row in self._average and self._average[row][1] == grid:
                maps = KEEP * self._average[row][0] + (1 - KEEP) * maps
            self._average[row] = (maps, grid)

    def _make(self, context: Context, cast: Cast) -> None:
        for row, (maps, grid) in self._average.items():
            scaled = unit(maps)
            masks = assign(scaled)
            for i, place in enumerate(self._places(row)):
                mask = clean(masks[i].view(grid)).cpu()
                key = (*row, place.subject)
                if not mask.any():
                    if key not in cast.found:
                        cast.missed(context, *row, place.subject, LOST, last=False)
                    continue
                values = scaled[:, i].cpu()
                sure = float(values[mask.flatten()].mean() - values[~mask.flatten()].mean()) if not mask.all() else 0.0
                old = cast.found.get(key)
                if old is None or _agreement(old, mask) >= AGREE or sure > self._sure.get(key, 0.0):
                    cast.found[key], self._sure[key] = mask, sure
                    cast.absent.pop(key, None)
        cast.changed()


def _by_word(probabilities: Tensor, words: list[tuple[int, ...]]) -> Tensor:
    """(N, T) -> (N, K): of every group of text tokens the largest."""
    return torch.stack([probabilities[:, list(one)].amax(1) for one in words], dim=1)


def _agreement(a: Tensor, b: Tensor) -> float:
    """Intersection over union."""
    return float((a & b).sum() / (a | b).sum().clamp(min=1)) if a.shape == b.shape else 0.0
