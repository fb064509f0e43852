"""Where subjects are on a token grid: from boxes and masks to sets of tokens, and who owns a token.

A box is (x0, y0, x1, y1) in fractions of width and height, edges and not centres. Token (r, c) of an H x W grid has its
centre at ((c + 0.5) / W, (r + 0.5) / H). A token may belong to several subjects; its owners are the bits of an integer,
bit i for subject i, and 0 is the background.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LARGEST_MASK", "MOST_SUBJECTS", "Box", "Overlap", "box_tokens", "clipped", "mask_tokens", "owners", "pack_mask",
    "tight_box", "unpack_mask",
]  # fmt: skip

Box = tuple[float, float, float, float]  # x0, y0, x1, y1
Overlap = Literal["smallest", "first", "largest", "shared"]

MOST_SUBJECTS = 62  # bits of an int64 that are no sign
LARGEST_MASK = 1024  # side of a packed mask
ROUNDING = 1e-9  # of a centre against an edge


def clipped(box: Box) -> Box | None:
    """The part of a box inside the picture; None if there is none."""
    x0, y0, x1, y1 = (min(max(float(edge), 0.0), 1.0) for edge in box)
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def box_tokens(box: Box, grid: tuple[int, int]) -> Tensor:
    """The tokens whose centres are inside a box, or the one that holds its centre if there is none.

    Args:
        box: inside the picture and not empty, see `clipped`.
        grid: (H, W).

    Returns:
        bool, shape (H, W), never empty.
    """
    height, width = grid
    x0, y0, x1, y1 = box
    columns = (torch.arange(width, dtype=torch.float64) + 0.5) / width
    rows = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    inside = _between(rows, y0, y1)[:, None] & _between(columns, x0, x1)[None]
    if not inside.any():
        row, column = min(int((y0 + y1) / 2 * height), height - 1), min(int((x0 + x1) / 2 * width), width - 1)
        inside[row, column] = True
    return inside


def mask_tokens(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens of which a mask covers at least half; the most covered one if there is none.

    Args:
        mask: bool, shape (h, w), of any resolution.
        grid: (H, W).

    Returns:
        bool, shape (H, W), empty only if `mask` is.
    """
    share = F.adaptive_avg_pool2d(mask[None, None].double(), grid)[0, 0]
    tokens = share >= 0.5
    if mask.any() and not tokens.any():
        tokens.view(-1)[share.argmax()] = True
    return tokens


def tight_box(tokens: Tensor) -> Box | None:
    """The smallest box that holds all true tokens, bool of shape (H, W); None if there are none."""
    rows, columns = tokens.any(1).nonzero().flatten(), tokens.any(0).nonzero().flatten()
    if not len(rows):
        return None
    height, width = tokens.shape
    return (
        int(columns[0]) / width, int(rows[0]) / height, (int(columns[-1]) + 1) / width, (int(rows[-1]) + 1) / height,
    )  # fmt: skip


def owners(masks: Tensor, overlap: Overlap = "smallest") -> Tensor:
    """Who owns each token.

    Args:
        masks: bool, shape (S, H, W).
        overlap: whose a token is that several subjects claim: of the smallest one (it is usually in front), of the
            first, of the largest, or "shared" between all.

    Returns:
        int64, shape (H * W,): bit i for subject i, 0 for the background.
    """
    claims = masks.flatten(1)
    bits = 2 ** torch.arange(len(claims), dtype=torch.int64, device=masks.device)
    if overlap == "shared":
        return (claims * bits[:, None]).sum(0)
    sizes = claims.sum(1)
    order = {"first": range(len(claims)), "smallest": _order(sizes), "largest": _order(-sizes)}[overlap]
    owner = torch.zeros(claims.shape[1], dtype=torch.int64, device=masks.device)
    for subject in order:
        owner = torch.where((owner == 0) & claims[subject], bits[subject], owner)
    return owner


def pack_mask(mask: Tensor) -> str:
    """A mask as a short text for recipes, "HxW:" and its bits in base64. `unpack_mask` is the way back."""
    height, width = mask.shape
    flat = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    packed = (flat * 2 ** torch.arange(7, -1, -1)).sum(1).to(torch.uint8)
    return f"{height}x{width}:{base64.b64encode(bytes(packed.tolist())).decode()}"


def unpack_mask(text: str) -> Tensor:
    """The mask of a text that `pack_mask` wrote, bool of shape (H, W). Raises ValueError for any other text."""
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4}):([A-Za-z0-9+/=]*)", text)
    if match is None:
        raise ValueError(f"a packed mask is 'HxW:bits in base64', got {text[:40]!r}; write it with pack_mask.")
    height, width = int(match[1]), int(match[2])
    if not (1 <= height <= LARGEST_MASK and 1 <= width <= LARGEST_MASK):
        raise ValueError(f"a mask has sides of 1 to {LARGEST_MASK}, got {height}x{width}; make it smaller.")
    try:
        packed = base64.b64decode(match[3], validate=True)
    except binascii.Error as problem:
        raise ValueError(f"a packed mask is 'HxW:bits in base64', got bits that are none ({problem}).") from None
    if len(packed) != math.ceil(height * width / 8):
        raise ValueError(f"a mask of {height}x{width} has {math.ceil(height * width / 8)} bytes, got {len(packed)}.")
    bits = torch.tensor(list(packed), dtype=torch.uint8)[:, None] >> torch.arange(7, -1, -1) & 1
    return bits.flatten()[: height * width].view(height, width).bool()


def _between(centres: Tensor, low: float, high: float) -> Tensor:
    return (centres >= low - ROUNDING) & (centres < high - ROUNDING)


def _order(sizes: Tensor) -> list[int]:
    return sizes.argsort(stable=True).tolist()
