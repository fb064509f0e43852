"""Ranks that make one film: are they asked for the same, may they begin, and what went wrong on the one that is gone?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..attn_processors.comm import Comm, RankLost
from .checks import attention_in_full
from .events import Cancelled, CancelToken
from .files import held
from .recipe import Recipe

__all__ = ["check_alike", "check_backends", "held_for_all", "named", "request_digest", "stop_wanted"]

WORD, COLUMNS = 8, 1024  # bytes that are summed as one number, and numbers in a row of them


def request_digest(recipe: Recipe, pipe: Any) -> str:
    """Of the request, the weights and what is switched on beside them, the same on every device."""
    total = hashlib.sha256(replace(recipe, made_with={}).to_json().encode())
    total.update(json.dumps(attention_in_full(recipe.attention)).encode())
    settings = {
        k: v for k, v in sorted(pipe.scheduler.config.items()) if not k.startswith("_")
    }  # notes are in no order
    total.update(f"{type(pipe).__name__} {type(pipe.scheduler).__name__} {settings}".encode())
    for part, model in sorted(pipe.components.items()):
        if isinstance(model, nn.Module):
            for line in _switches(model):
                total.update(f"{part}.{line}".encode())
            for name, value in model.named_parameters():
                total.update(f"{part}.{name} {tuple(value.shape)} ".encode() + _sums(value))
    return total.hexdigest()


def _switches(model: nn.Module) -> Iterator[str]:
    """What changes a model's pictures and is in no weight: adapters, as PEFT keeps them, and FreeU."""
    for name, layer in model.named_modules():
        if isinstance(scales := getattr(layer, "scaling", None), dict) and hasattr(layer, "active_adapters"):
            active = [(adapter, scales.get(adapter)) for adapter in layer.active_adapters]
            yield f"{name} adapters {[] if layer.disable_adapters else active}"
    for i, block in enumerate(getattr(model, "up_blocks", ())):
        free_u = [getattr(block, key, None) for key in ("s1", "s2", "b1", "b2")]
        if free_u != [None] * 4:
            yield f"up_blocks.{i} FreeU {free_u}"


@torch.no_grad()
def _sums(value: Tensor) -> bytes:
    """Of a tensor's bits, by rows and by columns, so that they are others if weights change places; cheap on every device."""
    bits = value.detach().contiguous().flatten().view(torch.uint8)
    if bits.storage_offset() % WORD:
        bits = bits.clone()
    end = len(bits) // (WORD * COLUMNS) * WORD * COLUMNS
    table = bits[:end].view(torch.int64).view(-1, COLUMNS)
    return b"".join(piece.cpu().numpy().tobytes() for piece in (table.sum(0), table.sum(1), bits[end:]))


def check_backends(comm: Comm, device: torch.device) -> None:
    """Raise ValueError if the process group cannot carry tensors of the host, or those of the device the film is made on."""
    if comm.size == 1 or not dist.is_initialized():
        return
    config = dist.get_backend_config(comm.group)
    carriers = dict(pair.split(":") for pair in config.split(","))
    host, card = "cpu" in carriers, device.type in carriers and (device.type, carriers[device.type]) != ("cuda", "gloo")
    if not (host and card):
        raise ValueError(
            f"a film on {device.type} sends tensors of {' and '.join(dict.fromkeys(('cpu', device.type)))}, which the "
            f"process group cannot do: got {config!r}; start it with init_process_group('cpu:gloo,cuda:nccl'), without CUDA "
            "with 'gloo'"
        )


def check_alike(comm: Comm, digest: str) -> None:
    """Raise ValueError if the ranks were not called with the same recipe and weights."""
    comm.place = "comparing requests"
    mine = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)
    for rank, theirs in enumerate(comm.everyones(mine)):
        if not torch.equal(theirs, mine):
            raise ValueError(
                f"rank {rank} was given another recipe or other weights than rank {comm.rank}; call all ranks alike, with "
                "the same versions and model files"
            )


@contextlib.contextmanager
def held_for_all(comm: Comm, folder: Path) -> Iterator[None]:
    """The first rank holds the folder for the length of a with block; where it cannot, no rank begins.

    Raises:
        ValueError: if another process holds the folder, or it cannot be written.
    """
    comm.place = "holding the folder"
    with contextlib.ExitStack() as stack:
        refused = None
        if comm.rank == 0:
            try:
                stack.enter_context(held(folder))
            except (OSError, ValueError) as error:
                refused = error
        answer = comm.everyones(torch.tensor(refused is not None, dtype=torch.uint8))
        if refused is not None:
            raise refused
        if bool(answer[0]):
            raise ValueError(
                f"rank 0 could not hold {folder}: mostly another process works there; see that rank's error"
            )
        yield


def stop_wanted(comm: Comm, cancel: CancelToken) -> bool:
    """Was any rank asked to stop? All ranks ask at the same place, and get the same answer."""
    votes = comm.everyones(torch.tensor(cancel.requested, dtype=torch.uint8))
    return any(bool(vote) for vote in votes)


@contextlib.contextmanager
def named(comm: Comm) -> Iterator[None]:
    """Leave word of what went wrong on this rank, so that the others can say more than that it is gone."""
    try:
        yield
    except (Cancelled, RankLost):
        raise
    except Exception as error:
        comm.tell(f"rank {comm.rank} on {socket.gethostname()} in {comm.place or 'its preparations'}: {error}")
        raise
