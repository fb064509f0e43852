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
from .positions import KEPT, SlotTables, far_slots, near_slots, slot

__all__ = ["Clip", "Scopes", "TokenScale", "midpoints", "scoped_attention", "scoped_reference"]

TokenScale = Literal["none", "log", "sqrt_log"]
SCORE_BYTES = 64 * 2**20  # of one block of logits; larger sequences are worked on in turns
BLOCK_BYTES = 2**19  # of logits of blocks that are computed together; more would not stay in a core's cache
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
    block = min(max(BLOCK, scopes.length), q.shape[1])
    keys = min(block + scopes.length, near[0].shape[1]) + len(scopes.anchors)
    cost = 4 * q.shape[2] * block * keys  # bytes of the logits of a block, for one sequence
    count = -(-q.shape[1] // block)
    chunk = max(1, min(q.shape[0], SCORE_BYTES // cost))  # sequences
    together = max(1, min(count, BLOCK_BYTES // (cost * chunk)))  # blocks
    rows = []
    for start in range(0, q.shape[0], chunk):
        part = slice(start, start + chunk)
        sequences = [x[part].transpose(1, 2) for x in (q * scale, *near, *far)]  # (n, h, frames, d)
        done = []
        for low in range(own[0], own[1], block * together):
            frames = (low, min(low + block * together, own[1]))
            plan = _blocks(scopes, frames, block, biases, q.device)
            if len(plan.stretches) == 1:  # as views
                a, b = scopes.reach(frames)
                queries = sequences[0][:, :, frames[0] - own[0] : frames[1] - own[0]]
                k, v = (x[:, :, None, a - first_near : b - first_near] for x in sequences[1:3])
            else:
                queries = sequences[0][:, :, (plan.queries - own[0]).flatten()]
                k, v = (x[:, :, plan.stretches - first_near] for x in sequences[1:3])
            made = _attend(queries, (k, v), (sequences[3], sequences[4]), plan, biases, tables)
            done.append(made[:, :, : frames[1] - frames[0]])
        rows.append(torch.cat(done, dim=2) if len(done) > 1 else done[0])
    out = torch.cat(rows) if len(rows) > 1 else rows[0]
    return out.transpose(1, 2)


def _attend(
    q: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    plan: _Blocks,
    biases: tuple[float, float],
    tables: SlotTables | None,
) -> Tensor:
    """Blocks of queries, (n, h, b * c, d), each with its stretch of near frames, (n, h, b, R, d), all with the same far ones."""
    favoured = max(biases) if far[0].shape[2] else biases[0]  # gets no bias, so that its logits keep all their digits
    count = near[0].shape[2]
    to_near = (q.unflatten(2, (count, -1)) @ near[0].mT).flatten(2, 3)
    scores = []
    for score, mask, slots, bias in zip((to_near, q @ far[0].mT), plan.masks, plan.slots, biases, strict=True):
        whole = score.float() if tables is None else score.float() + tables.score(q, slots).float()
        scores.append((whole + (bias - favoured)).masked_fill(~mask, float("-inf")))
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(q.dtype)
    shares = weights.split([score.shape[-1] for score in scores], dim=-1)
    out = (shares[0].unflatten(2, (count, -1)) @ near[1]).flatten(2, 3) + shares[1] @ far[1]
    if tables is not None:
        for share, slots in zip(shares, plan.slots, strict=True):
            out = out + tables.value(share, slots)
    return out


@dataclass(frozen=True, eq=False)
class _Blocks:
    """b blocks of c queries, with all that depends on frames alone. Rows of `masks` and `slots` are the b * c queries.

    Attributes:
        queries: their frames, (b, c); the last is repeated where the last block is short.
        stretches: the frames a block reaches, (b, R), as many of each; the mask hides those that are too many.
        masks: who of the stretch and who of the anchors counts, (b * c, R) and (b * c, G); each frame once.
        slots: where they sit in the window of the query, the same shapes.
    """

    queries: Tensor
    stretches: Tensor
    masks: tuple[Tensor, Tensor]
    slots: tuple[Tensor, Tensor]


@lru_cache(maxsize=KEPT)
@torch.inference_mode(False)  # what is kept may be needed with gradients later
def _blocks(scopes: Scopes, own: Span, block: int, biases: tuple[float, float], device: torch.device) -> _Blocks:
    """The queries `own` in blocks. Kept, since every layer, place and step asks for the same ones."""
    block = min(block, own[1] - own[0])
    starts = torch.arange(own[0], own[1], block)
    queries = (starts[:, None] + torch.arange(block)).clamp(max=own[1] - 1)
    windows = torch.tensor([scopes.window(i) for i in queries.flatten().tolist()])  # (b * c, 2)
    begin, end = windows[::block, 0], windows[block - 1 :: block, 1]
    stretches = begin[:, None] + torch.arange(int((end - begin).max()))
    anchors = torch.tensor(scopes.anchors, dtype=torch.long)
    frames = stretches.repeat_interleave(block, dim=0)  # (b * c, R)
    last = scopes.reach(own)[1] - 1
    inside, among = _between(frames, windows), _between(anchors, windows)
    if biases[1] > biases[0]:  # the anchors are favoured, and take the frames that are both
        masks = inside & ~torch.isin(frames, anchors), torch.ones_like(among)
    else:
        masks = inside, ~among
    slots = near_slots(frames, windows), far_slots(anchors, queries.flatten(), windows)
    there = [(a.to(device), b.to(device)) for a, b in (masks, slots)]
    return _Blocks(queries.to(device), stretches.clamp(max=last).to(device), *there)


def _between(frames: Tensor, windows: Tensor) -> Tensor:
    """Whether each of the frames (c, K) or (K,) lies in the window (c, 2) of its row."""
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
            slots = [slot(scopes, i, j) for j, _ in seen]
            keys, values = keys + tables.keys[slots], values + tables.values[slots]
        logits = torch.einsum("nhd,njhd->nhj", q[:, i] * scale, keys).float()
        logits = logits + torch.tensor([bias for _, bias in seen], device=q.device)
        out.append(torch.einsum("nhj,njhd->nhd", logits.softmax(-1).to(v.dtype), values))
    return torch.stack(out, dim=1)
