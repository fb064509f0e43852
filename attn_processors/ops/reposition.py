"""Reposition: put the tokens of a reference where the subject is in the picture, and as large.

A box map takes places in the target box to places in the reference box: u_ref = b.x0 + (u - a.x0) * (b.w / a.w), in y
alike. It acts in one of two ways.

*Resampling* (models without a position in attention: UNets, Stable Diffusion 3): the reference's tokens are sampled
at the places of the target box. Softmax does not care about the order of keys, so moving alone does nothing there. What
acts is the number of keys: a subject twice as large in area has twice as many reference tokens, twice the mass in the
softmax. Nearest upsampling by r each way equals a bias of log r^2 on the plain tokens.

*Coordinates* (rotary models: FLUX): the tokens stay as they are, and their keys are rotated as if they lay at the
target's places. Here position acts, and mass is a bias: log(rho), rho = area(target) / area(reference) in tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .regions import Box, box_tokens

__all__ = ["Fit", "area_ratio", "rotary_places", "sample", "sampling"]

Fit = Literal["stretch", "uniform"]  # each axis by its own factor; both by the smaller one, about the centres

MOST_SHRINK = 1.5  # beyond it a sample is the mean of several
MOST_SAMPLES = 4  # each way
EDGE = 1e-9  # a place on the edge between two tokens is in the second
ROTARY_RANGE = (0.5, 2.0)  # spacing of rotary places, in what they were trained with


def area_ratio(target: Box, grid: tuple[int, int], source: Box, source_grid: tuple[int, int]) -> float:
    """rho: how many times more tokens the target box has than the reference box, each on its own grid."""
    (h, w), (h_ref, w_ref) = _side(target, grid), _side(source, source_grid)
    return (h * w) / (h_ref * w_ref)


def sampling(
    target: Box, grid: tuple[int, int], source: Box, tokens: Tensor, fit: Fit = "stretch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Which reference tokens, with which weights, make the tokens of the target box. Bilinear, among true tokens only.

    Args:
        target: the subject's box in the picture.
        grid: (H, W) of the picture.
        source: the subject's box in the reference.
        tokens: bool, shape (h, w): the subject's tokens in the reference; at least one is true.
        fit: how the boxes are laid over each other.

    Returns:
        (index, weight, place): raster index into the reference and weight, both (n, K), every row of weights sums to 1;
        and (row, column) of the target token, float64 (n, 2). A target token is kept if the reference tokens nearest to
        its samples are true, at least half of them; if none is kept, the true token nearest to the box's centre is taken
        alone.
    """
    height, width = tokens.shape
    places = box_tokens(target, grid).nonzero().double() + 0.5  # centres
    (row, row_factor), (column, column_factor) = _map(target, grid, source, (height, width), fit)
    many = [_samples(factor) for factor in (row_factor, column_factor)]
    index, weight, near = [], [], []
    for y in _offsets(many[0]):
        for x in _offsets(many[1]):
            rows = row[0] + (places[:, 0] + y - row[1]) * row_factor - 0.5
            columns = column[0] + (places[:, 1] + x - column[1]) * column_factor - 0.5
            corner_index, corner_weight = _corners(rows, columns, tokens)
            index.append(corner_index)
            weight.append(corner_weight)
            near.append(_nearest_is_true(rows, columns, tokens))
    indices, weights = torch.cat(index, 1), torch.cat(weight, 1)
    kept = torch.stack(near).double().mean(0) >= 0.5
    if not kept.any():
        return _middle(source, tokens), torch.ones(1, 1, dtype=torch.float64), places.mean(0, keepdim=True) - 0.5
    indices, weights = indices[kept], weights[kept]
    used = weights.any(0)  # with boxes of equal size often one token only
    indices, weights = indices[:, used], weights[:, used]
    return indices, weights / weights.sum(1, keepdim=True), places[kept] - 0.5


def sample(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Tokens of a reference put together by `sampling`: (B, N_ref, C) -> (B, n, C)."""
    if index.shape[1] == 1:
        return x[:, index[:, 0]]
    picked = x[:, index.flatten()].unflatten(1, index.shape)
    return (picked * weight.to(x.dtype)[..., None]).sum(2)


def rotary_places(
    target: Box, grid: tuple[int, int], source: Box, tokens: Tensor, fit: Fit = "uniform"
) -> tuple[Tensor, Tensor]:
    """Where reference tokens lie when their box is laid over the target's.

    The spacing is kept between 0.5 and 2 of what it was, beyond that boxes share their centres only.

    Args:
        as `sampling`.

    Returns:
        (index, place): raster indices of the true tokens, int64 (n,), and (row, column) in the target's grid, float64
        (n, 2), fractional; token centres have whole numbers.
    """
    index = tokens.flatten().nonzero().flatten()
    height, width = tokens.shape
    own = torch.stack([index.div(width, rounding_mode="floor"), index % width], dim=1).double() + 0.5
    places = []
    for axis, ((source_centre, target_centre), factor) in enumerate(
        _map(target, grid, source, (height, width), fit, centred=True)
    ):
        spacing = min(max(1 / factor, ROTARY_RANGE[0]), ROTARY_RANGE[1])
        places.append(target_centre + (own[:, axis] - source_centre) * spacing - 0.5)
    return index, torch.stack(places, dim=1)


def _side(box: Box, grid: tuple[int, int]) -> tuple[float, float]:
    """(height, width) of a box in tokens."""
    return (box[3] - box[1]) * grid[0], (box[2] - box[0]) * grid[1]


def _map(
    target: Box, grid: tuple[int, int], source: Box, source_grid: tuple[int, int], fit: Fit, centred: bool = False
) -> list[tuple[tuple[float, float], float]]:
    """For rows, then columns: ((place in the reference, same place in the target), reference tokens per target token)."""
    wanted, there = _side(target, grid), _side(source, source_grid)
    factors = [there[axis] / wanted[axis] for axis in (0, 1)]
    if fit == "uniform":
        factors = [max(factors)] * 2
    centred = centred or fit == "uniform"
    result = []
    for axis, factor in enumerate(factors):
        low, high = (1, 3) if axis == 0 else (0, 2)
        at = [(box[low] + (box[high] - box[low]) / 2 * centred) for box in (source, target)]
        result.append(((at[0] * source_grid[axis], at[1] * grid[axis]), factor))
    return result


def _samples(factor: float) -> int:
    """How many samples a target token takes along one axis."""
    return 1 if factor <= MOST_SHRINK else min(math.ceil(factor), MOST_SAMPLES)


def _offsets(count: int) -> list[float]:
    """Centres of `count` equal parts of a token, from its own centre."""
    return [(i + 0.5) / count - 0.5 for i in range(count)]


def _corners(rows: Tensor, columns: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The four tokens around each place and their bilinear weights, 0 where a token is not true: both (n, 4)."""
    height, width = tokens.shape
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    top, left = rows.floor().long(), columns.floor().long()
    down, right = rows - top, columns - left
    index, weight = [], []
    for r, share_r in ((top, 1 - down), ((top + 1).clamp(max=height - 1), down)):
        for c, share_c in ((left, 1 - right), ((left + 1).clamp(max=width - 1), right)):
            index.append(r * width + c)
            weight.append(share_r * share_c * tokens[r, c])
    return torch.stack(index, 1), torch.stack(weight, 1)


def _nearest_is_true(rows: Tensor, columns: Tensor, tokens: Tensor) -> Tensor:
    """Whether the token nearest to each place is inside the grid and true, bool (n,)."""
    height, width = tokens.shape
    r, c = (rows + 0.5 + EDGE).floor().long(), (columns + 0.5 + EDGE).floor().long()
    inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
    return inside & tokens[r.clamp(0, height - 1), c.clamp(0, width - 1)]


def _middle(source: Box, tokens: Tensor) -> Tensor:
    """Raster index of the true token nearest to the middle of the box, shape (1, 1)."""
    height, width = tokens.shape
    middle = torch.tensor([(source[1] + source[3]) / 2 * height, (source[0] + source[2]) / 2 * width]).double()
    true = tokens.nonzero()
    row, column = true[((true + 0.5 - middle) ** 2).sum(1).argmin()].tolist()
    return torch.tensor([[row * width + column]])
