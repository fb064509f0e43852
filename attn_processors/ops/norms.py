"""GroupNorm of a film whose frames lie in parts: the same numbers as in one piece.

A motion module normalises over all frames at once. Each part gives the mean and the squared deviations of every one of its
frames; these few numbers are shared, and everybody puts them together in the order of the film. So the statistics, and
with them the film, do not depend on how the frames are split. They are kept in double precision and never as E[x^2] - E[x]^2,
which loses all digits where the mean is large.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["film_statistics", "frame_statistics", "normalise"]


def frame_statistics(x: Tensor, groups: int) -> Tensor:
    """Mean and sum of squared deviations of each group of each frame.

    x: frames (..., C, H, W) -> double precision where there is one, shape (..., groups, 2).
    """
    values = x.unflatten(-3, (groups, -1)).flatten(-3)  # (..., groups, values)
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no double precision
    mean = values.mean(-1, dtype=wide, keepdim=True)
    return torch.cat([mean, (values - mean).square().sum(-1, keepdim=True)], dim=-1)


def film_statistics(frames: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance over all frames, each (B, groups), from those of each frame.

    Args:
        frames: (B, F, groups, 2), what `frame_statistics` gives for every frame of the film.
        values: how many numbers one frame has per group.
    """
    means, squares = frames.unbind(-1)
    mean = means.mean(1)
    squares = squares.sum(1) + values * (means - mean.unsqueeze(1)).square().sum(1)
    return mean, squares / (values * frames.shape[1])


def normalise(x: Tensor, norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> Tensor:
    """GroupNorm with given statistics: x (B, C, ...), mean and variance (B, groups) -> shape of x."""
    channels = norm.num_channels // norm.num_groups
    inverse = (variance + norm.eps).rsqrt().repeat_interleave(channels, dim=1)
    factor, shift = inverse, -mean.repeat_interleave(channels, dim=1) * inverse
    if norm.affine:
        weight, bias = norm.weight.to(factor.dtype), norm.bias.to(factor.dtype)
        factor, shift = factor * weight, shift * weight + bias
    wide = (*factor.shape, *(1,) * (x.ndim - 2))
    wanted = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return torch.addcmul(shift.to(wanted).view(wide), x.to(wanted), factor.to(wanted).view(wide)).to(x.dtype)
