"""From attention maps to masks: where in a picture the words of its prompt act.

Text attention P (N, K) says how much each image token looks at each of K words; it is sparse. Image self-attention A
(N, N), rows summing to 1, says which image tokens belong together, and spreads P over whole objects:

    R = (1/p) sum_{k=1..p} A^k P

Products go from right to left, so no power of A is ever made. Tried beside it: A^4 P^2 with both scaled to [0, 1] first
(AttenCraft, arXiv 2405.17965), and a margin over all other maps in place of the threshold. On tiny-sd at 8 x 8 tokens (11
sprites, intersection over union with what the reader saw) the powers reach 0.29 at a fifth of the steps and 0.26 at three
fifths, the other 0.15, no spreading 0.13 and 0.17; a margin instead of the threshold about half of each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["assign", "clean", "otsu", "pool_tokens", "resized", "spread_powers", "unit"]

BINS = 256
SMALLEST = 0.01  # of all tokens: smaller pieces of a mask are dropped
FEWEST = 4  # tokens
FLAT = 0.01  # a map that varies by less than this share of its peak says nothing
FAINT = 0.2  # values of a scaled map below it are no subject


def spread_powers(a: Tensor, p: Tensor, powers: int = 4) -> Tensor:
    """Average of the first powers of A applied to P: (N, N), (N, K) -> (N, K)."""
    total, moved = torch.zeros_like(p), p
    for _ in range(powers):
        moved = a @ moved
        total = total + moved
    return total / powers


def unit(p: Tensor) -> Tensor:
    """Every map scaled to [0, 1]: (N, K). One that is nearly the same everywhere becomes nearly 0."""
    low, high = p.amin(0), p.amax(0)
    return (p - low) / (high - low).maximum(FLAT * high).clamp(min=1e-12)


def otsu(values: Tensor) -> float:
    """The threshold that parts values into two classes of least variance within (Otsu 1979), on 256 bins."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        return high
    counts = torch.histc(values.double(), BINS, low, high)
    centres = low + (torch.arange(BINS, dtype=torch.float64, device=values.device) + 0.5) * (high - low) / BINS
    below, total = counts.cumsum(0), counts.sum()
    sums = (counts * centres).cumsum(0)
    above = total - below
    mean_below, mean_above = sums / below.clamp(min=1), (sums[-1] - sums) / above.clamp(min=1)
    between = below * above * (mean_below - mean_above) ** 2
    best = between == between.max()  # a plateau between two far classes: its middle
    return float(centres[best].mean() + (high - low) / BINS / 2)


def assign(maps: Tensor) -> Tensor:
    """Which subject each token is of: the one whose map is highest there, if it is above that map's Otsu threshold.

    Args:
        maps: shape (N, S), all on one scale.

    Returns:
        bool, shape (S, N), disjoint.
    """
    first = maps.argmax(1)
    thresholds = [max(FAINT, otsu(column)) for column in maps.T]
    return torch.stack([(first == i) & (maps[:, i] > threshold) for i, threshold in enumerate(thresholds)])


def clean(mask: Tensor) -> Tensor:
    """Close, then open by 3 x 3, drop small pieces (keep the largest), fill holes: bool (H, W) -> bool (H, W)."""
    if not mask.any():
        return mask
    room = F.pad(mask, (2, 2, 2, 2))  # what touches the edge of the picture does not grow along it
    closed = _eroded(_grown(room))
    opened = _grown(_eroded(closed))
    smooth = (opened if opened.any() else closed)[2:-2, 2:-2]
    pieces = _pieces(smooth)
    least = max(FEWEST, SMALLEST * mask.numel())
    kept = torch.zeros_like(mask)
    for i, piece in enumerate(sorted(pieces, key=lambda one: -int(one.sum()))):
        if i == 0 or int(piece.sum()) >= least:
            kept |= piece
    outside = torch.zeros_like(mask)
    for hole in _pieces(~kept):
        if hole[0].any() or hole[-1].any() or hole[:, 0].any() or hole[:, -1].any():
            outside |= hole
    return ~outside


def resized(maps: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Maps on another grid, bilinear: (N, K) -> (N', K)."""
    if grid == wanted:
        return maps
    planes = maps.T.unflatten(1, grid)[None]
    return F.interpolate(planes, wanted, mode="bilinear", align_corners=False)[0].flatten(1).T


def pool_tokens(x: Tensor, grid: tuple[int, int], most: int) -> tuple[Tensor, tuple[int, int]]:
    """Means of 2 x 2 tokens until there are at most `most`: (N, C) -> (N', C) and its grid."""
    while grid[0] * grid[1] > most and min(grid) > 1:
        planes = F.avg_pool2d(x.T.unflatten(1, grid)[None], 2, ceil_mode=True, count_include_pad=False)[0]
        grid = (planes.shape[1], planes.shape[2])
        x = planes.flatten(1).T
    return x, grid


def _grown(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask[None, None].float(), 3, 1, 1)[0, 0] > 0.5


def _eroded(mask: Tensor) -> Tensor:
    return ~_grown(~mask)


def _pieces(mask: Tensor) -> list[Tensor]:
    """Connected pieces (4 neighbours), by spreading the largest label until nothing changes."""
    height, width = mask.shape
    labels = torch.arange(1, height * width + 1, device=mask.device).view(height, width) * mask
    while True:
        padded = F.pad(labels, (1, 1, 1, 1))
        spread = torch.stack([labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]).amax(0)
        spread = spread * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    return [labels == label for label in labels.unique().tolist() if label]
