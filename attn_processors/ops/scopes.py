"""Two scopes of a film: a window of near frames and a few frames from all over it, under one softmax.

A query of frame i sees

- its *window*: `length` frames around i, slid inward at the ends of the film, so that it never shrinks and no frame from
  outside the film is ever made up;
- the *anchors*: frames spread evenly over the film, the same for every query.

A frame in both is used once, and belongs to the scope that is favoured at this step. Each scope has a bias that is added to
its logits; only the difference of the two matters. Both scopes stand under one softmax, which is what merging two softmaxes
by their log-sum-exp gives, without the rounding. A film no longer than the window has one scope and no bias: attention is
then the model's own. Source: Tan et al., Video-Infinity (arXiv 2406.16260), section 3.3; windows, anchors and their places
differ, see `positions`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..comm import Comm, Span
from .positions import KEPT, SlotTables, slots_of

__all__ = ["Clip", "Scopes", "TokenScale", "midpoints", "scoped_attention", "scoped_reference"]

TokenScale = Literal["none", "log", "sqrt_log"]
SCORE_BYTES = 64 * 2**20  # of one block of logits; larger sequences are worked on in turns
BLOCK = 16  # queries that share one stretch of keys, at least


@dataclass(frozen=True, eq=False)
class Clip:
    """The frames one rank owns of a film.

    Attributes:
        comm: the ranks.
        parts: frames on each rank, [first, end), consecutive.
    """

    comm: Comm
    parts: tuple[Span, ...]

    @property
    def own(self) -> Span:
        return self.parts[self.comm.rank]

    @property
    def frames(self) -> int:
        """F, of the whole film."""
        return self.parts[-1][1]


def midpoints(frames: int, count: int) -> tuple[int, ...]:
    """`count` frames in the middle of equal stretches of the film: floor((2m + 1) F / 2G). All frames if there are fewer."""
    if count >= frames:
        return tuple(range(frames))
    return tuple((2 * m + 1) * frames // (2 * count) for m in range(count))


@dataclass(frozen=True)
class Scopes:
    """Who sees whom; a function of the film alone, never of how it is split.

    Attributes:
        frames: F, of the whole film.
        length: L, frames of a window.
        count: G, anchors.
    """

    frames: int
    length: int
    count: int

    @property
    def single(self) -> bool:
        """True if the window covers the film, so that there is one scope."""
        return self.frames <= self.length

    @cached_property
    def anchors(self) -> tuple[int, ...]:
        """The frames all queries see, ascending; none if the window covers the film."""
        return () if self.single else midpoints(self.frames, self.count)

    def window(self, frame: int) -> Span:
        """[first, end) of the window of a frame: min(F, L) frames, both bounds never fall as `frame` grows."""
        first = min(max(frame - (self.length - 1) // 2, 0), max(0, self.frames - self.length))
        return first, min(self.frames, first + self.length)

    def reach(self, own: Span) -> Span:
        """The frames whose keys the windows of these frames hold."""
        return self.window(own[0])[0], self.window(own[1] - 1)[1]

    def anchors_in(self, own: Span) -> Span:
        """Which of the anchors, by their place among them, lie in these frames."""
        inside = [m for m, frame in enumerate(self.anchors) if own[0] <= frame < own[1]]
        before = sum(frame < own[0] for frame in self.anchors)
        return before, before + len(inside)

    def seen(self, frame: int) -> int:
        """Frames that a query of this frame sees."""
        first, end = self.window(frame)
        return end - first + sum(not first <= anchor < end for anchor in self.anchors)

    def sharpness(self, frame: int, trained: int, rule: TokenScale) -> float:
        """The factor on the softmax scale: 1, log n / log trained, or its square root, for n frames seen."""
        seen = self.seen(frame)
        if rule == "none" or seen <= 1:
            return 1.0
        ratio = math.log(seen) / math.log(trained)
        return ratio if rule == "log" else math.sqrt(ratio)


def scoped_attention(
    q: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    scopes: Scopes,
    own: Span,
    *,
    scale: float,
    biases: tuple[float, float] = (0.0, 0.0),
    tables: SlotTables | None = None,
) -> Tensor:
    """Attention of the frames `own` over their windows and the anchors.

    N is the number of sequences (places of the picture times rows), f of own frames, r of reached ones, G of anchors.

    Args:
        q: shape (N, f, h, d), with its place in the window already in it.
        near: keys and values of the frames `scopes.reach(own)`, each (N, r, h, d), without places.
        far: keys and values of `scopes.anchors`, each (N, G, h, d), without places.
        scopes, own: as there.
        scale: of the logits; may differ between frames if q is scaled instead.
        biases: of the window's and of the anchors' logits; ignored where there is one scope.
        tables: what places add to keys and values; None for a model without them.

    Returns:
        shape (N, f, h, d).
    """
    first_near = scopes.reach(own)[0]
    block = max(BLOCK, scopes.length)
    keys = min(block + scopes.length, near[0].shape[1]) + len(scopes.anchors)
    chunk = max(1, SCORE_BYTES // (4 * q.shape[2] * min(block, q.shape[1]) * keys))
    rows = []
    for start in range(0, q.shape[0], chunk):
        part = slice(start, start + chunk)
        sequences = [x[part].transpose(1, 2) for x in (q * scale, *near, *far)]  # (n, h, frames, d)
        blocks = []
        for low in range(own[0], own[1], block):
            span = (low, min(low + block, own[1]))
            a, b = scopes.reach(span)
            queries = sequences[0][:, :, span[0] - own[0] : span[1] - own[0]]
            k, v = (x[:, :, a - first_near : b - first_near] for x in sequences[1:3])
            blocks.append(_attend(queries, (k, v), (sequences[3], sequences[4]), scopes, span, biases, tables))
        rows.append(torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0])
    out = torch.cat(rows) if len(rows) > 1 else rows[0]
    return out.transpose(1, 2)


def _attend(
    q: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    scopes: Scopes,
    span: Span,
    biases: tuple[float, float],
    tables: SlotTables | None,
) -> Tensor:
    """One block of queries, (n, h, c, d); `near` has the frames that the block reaches."""
    masks = _masks(scopes, span, biases, q.device)
    favoured = max(biases) if scopes.anchors else biases[0]  # gets no bias, so that its logits keep all their digits
    scores, slots = [], []
    for (k, _), mask, bias, frames in zip(
        (near, far), masks, biases, (range(*scopes.reach(span)), scopes.anchors), strict=True
    ):
        score = (q @ k.transpose(-1, -2)).float()
        if tables is not None:
            slots.append(slots_of(scopes, span, frames, q.device))
            score = score + tables.score(q, slots[-1]).float()
        scores.append((score + (bias - favoured)).masked_fill(~mask, float("-inf")))
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(q.dtype)
    shares = weights.split([score.shape[-1] for score in scores], dim=-1)
    out = shares[0] @ near[1] + shares[1] @ far[1]
    if tables is not None:
        for share, slot in zip(shares, slots, strict=True):
            out = out + tables.value(share, slot)
    return out


@lru_cache(maxsize=KEPT)
@torch.inference_mode(False)  # what is kept may be needed with gradients later
def _masks(scopes: Scopes, span: Span, biases: tuple[float, float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Who of the reached frames and who of the anchors counts for each query of the block; each frame once."""
    a, b = scopes.reach(span)
    windows = torch.tensor([scopes.window(i) for i in range(*span)], device=device)
    anchors = torch.tensor(scopes.anchors, dtype=torch.long, device=device)
    frames = torch.arange(a, b, device=device)
    inside = _between(frames, windows)
    if biases[1] > biases[0]:  # the anchors are favoured, and take the frames that are both
        return inside & ~torch.isin(frames, anchors), torch.ones(len(windows), len(anchors), dtype=bool, device=device)
    return inside, ~_between(anchors, windows)


def _between(frames: Tensor, windows: Tensor) -> Tensor:
    """(c, frames): whether each frame lies in each of the c windows."""
    return (frames >= windows[:, :1]) & (frames < windows[:, 1:])


def scoped_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scopes: Scopes,
    *,
    scale: float,
    biases: tuple[float, float] = (0.0, 0.0),
    tables: SlotTables | None = None,
) -> Tensor:
    """`scoped_attention` of a whole film, written for reading: every query, its keys one by one, their places put in.

    q, k, v: (N, F, h, d) -> (N, F, h, d). `tables` adds to the key and value of frame j what its slot says.
    """
    out = []
    for i in range(scopes.frames):
        first, end = scopes.window(i)
        window, anchors = set(range(first, end)), set(scopes.anchors)
        favour_anchors = biases[1] > biases[0]
        biases = (biases[0] - max(biases), biases[1] - max(biases)) if anchors else (0.0, 0.0)
        seen = [(j, biases[0]) for j in sorted(window - anchors if favour_anchors else window)]
        seen += [(j, biases[1]) for j in sorted(anchors if favour_anchors else anchors - window)]
        keys, values = k[:, [j for j, _ in seen]], v[:, [j for j, _ in seen]]
        if tables is not None:
            slots = [min(max(j - first, 0), end - first - 1) for j, _ in seen]
            keys, values = keys + tables.keys[slots], values + tables.values[slots]
        logits = torch.einsum("nhd,njhd->nhj", q[:, i] * scale, keys).float()
        logits = logits + torch.tensor([bias for _, bias in seen], device=q.device)
        out.append(torch.einsum("nhj,njhd->nhd", logits.softmax(-1).to(v.dtype), values))
    return torch.stack(out, dim=1)
