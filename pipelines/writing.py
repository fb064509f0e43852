"""The last part of a film: every rank decodes its own frames, and the first one writes all of them, in order.

Ranks go from clip to clip together: while the first rank decodes one of its own, the others decode one that they will send
when it is its turn. So no rank waits longer for another than a clip takes, and the first holds one clip at a time. The others
keep their pictures as bytes until their turn, 3 W H for each.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attn_processors.comm import Span
from ..attn_processors.ops.scopes import Clip
from .borrowing import upcast_vae
from .checkpoint import barrier
from .film import film_file
from .offloading import device_of
from .recipe import Recipe

if TYPE_CHECKING:
    import numpy as np

__all__ = ["decoded", "write_film"]

DECODED = 8  # frames decoded, sent and written at a time

Told = Callable[[int, int, float, "np.ndarray | None"], None]


def write_film(pipe: Any, recipe: Recipe, out: Path, latents: Tensor, film: Clip, told: Told) -> None:
    """Decode this rank's frames; the first rank writes those of all. Every rank calls it.

    Args:
        pipe: its VAE decodes.
        recipe: a filled-in one.
        latents: of this rank's frames, finished, (1, C, f, H, W).
        film: the frames of all ranks, and the ranks.
        told: called after every clip with its number, how many there are, the seconds left, and on the first rank its
            frames, uint8 of shape (f, H, W, 3). What it raises ends the film, with a file that plays so far.

    Raises:
        OSError: the disk is full.
        RuntimeError: the model computed no pictures.
        RankLost: another rank is gone.
    """
    comm = film.comm
    assert recipe.width is not None and recipe.height is not None
    comm.place = "the file"
    size = (recipe.width, recipe.height)
    mine = _clips((0, latents.shape[2]))
    own = torch.empty(latents.shape[2] if comm.rank else 0, size[1], size[0], 3, dtype=torch.uint8)
    sink = film_file(out, *size, recipe) if comm.rank == 0 else contextlib.nullcontext()
    clips = [(rank, low, high) for rank, part in enumerate(film.parts) for low, high in _clips(part)]
    began = time.monotonic()
    with upcast_vae(pipe) as dtype, sink as file:
        for number, (rank, low, high) in enumerate(clips):
            frames = None
            if comm.rank and number < len(mine):  # its turn to be sent comes later: the first rank has a clip, too
                own[slice(*mine[number])] = decoded(pipe.vae, latents[:, :, slice(*mine[number])], dtype)
            if rank == 0 and comm.rank == 0:
                frames = decoded(pipe.vae, latents[:, :, low:high], dtype)
            elif rank:
                frames = _sent(own, film, rank, (low, high))
            if file is not None and frames is not None:
                for frame in frames.numpy():
                    file.write(frame)
            barrier(comm)
            left = (time.monotonic() - began) / (number + 1) * (len(clips) - number - 1)
            told(number, len(clips), left, None if frames is None else frames.numpy())


@torch.no_grad()
def decoded(vae: Any, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames of finished latents, (1, C, f, H, W) -> uint8 (f, H, W, 3) on the CPU."""
    frames = latents[0].transpose(0, 1).to(device_of(vae), dtype)
    pictures = vae.decode(frames / vae.config.scaling_factor, return_dict=False)[0].float()
    if not bool(pictures.isfinite().all()):
        raise RuntimeError(
            "the model computed no pictures: values are not numbers (NaN); float16 often overflows, use dtype float32 "
            "or bfloat16"
        )
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def _sent(own: Tensor, film: Clip, rank: int, frames: Span) -> Tensor | None:
    """Decoded frames of one rank, on the first; these two send and receive, the others do nothing."""
    comm = film.comm
    if comm.rank not in (0, rank):
        return None
    none = torch.zeros((), dtype=torch.uint8).expand(film.own[1] - film.own[0], *own.shape[1:])  # no memory
    wanted = [frames, *[(frames[0], frames[0])] * (comm.size - 1)]
    got = comm.collect(own if comm.rank == rank else none, film.parts, wanted, dim=0)
    return got if comm.rank == 0 else None


def _clips(span: Span) -> list[Span]:
    return [(low, min(low + DECODED, span[1])) for low in range(span[0], span[1], DECODED)]
