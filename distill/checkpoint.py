"""Checkpoints of a run: everything the next step depends on, in files that anybody can read, whole or not there at all.

    checkpoints/step-00000500/state.safetensors    trained.NAME, ema.NAME, optimizer.KEY.NAME, all whole tensors
    checkpoints/step-00000500/state.json           step, configuration, digest of the samples, single numbers
    checkpoints/step-00000500/student/             the averaged student, which `load_linear` installs

A folder is written under another name and renamed. Tensors are stored whole, whoever holds which piece of them while training,
so a run may go on with another number of processes, and with "ddp" or "fsdp". No random state is kept: draws depend on
(seed, step, place in the batch) alone.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["checkpoints", "gathered", "newest", "restore", "save"]

log = logging.getLogger(__name__)

STATE, ABOUT = "state.safetensors", "state.json"
FORMAT, VERSION = "reattend distillation", 1
NAME = "step-{:08d}"


def save(
    folder: Path,
    step: int,
    tensors: Iterator[tuple[str, Tensor]],
    numbers: Mapping[str, Any],
    write_student: Callable[[Path], None],
    *,
    keep: int,
    writes: bool = True,
) -> None:
    """Write one checkpoint into `folder` and delete all but the newest `keep`, and those of later steps.

    A run goes on from the newest that can be read, so what is of a later step than this one could not.

    Args:
        tensors: names and values; every process has to go through them, since they may be gathered on the way. Those of
            a process that does not write are not used.
        numbers: JSON-able.
        write_student: called with the folder of the student; on every process.
        writes: whether this process is the one that writes.
    """
    from safetensors.torch import save_file

    state = dict(tensors)
    final = folder / NAME.format(step)
    aside = folder / f".{final.name}.part"
    if writes:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(state, aside / STATE, metadata={"format": "pt"})
    write_student(aside / "student")
    if not writes:
        return
    about = {"format": FORMAT, "version": VERSION, "step": step, **numbers}
    (aside / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    there = checkpoints(folder)
    later = [path for path in there if path.name > final.name]
    for old in [*later, *there[len(later) + keep :]]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def newest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """(numbers, file of the tensors) of the newest checkpoint that can be read, or None if there is none at all.

    Raises:
        ValueError: if there are some and none can be read.
    """
    from safetensors import SafetensorError, safe_open

    there = checkpoints(folder)
    for path in there:
        try:
            about = json.loads((path / ABOUT).read_text())
            if about.get("format") != FORMAT or about.get("version") != VERSION:
                raise ValueError(f"it is not of the format {FORMAT!r} {VERSION}")
            with safe_open(path / STATE, framework="pt"):
                return about, path / STATE
        except (OSError, ValueError, SafetensorError) as problem:
            log.warning("left out the checkpoint %s: %s", path, problem)
    if there:
        raise ValueError(f"none of the {len(there)} checkpoints in {folder} can be read; delete them to begin anew")
    return None


def restore(file: Path, targets: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Fill `targets` from a checkpoint; then give its remaining tensors by name, of which there are not too many.

    Raises:
        ValueError: if a target is missing or has another shape.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened, torch.no_grad():
        names = set(opened.keys())
        for name, target in targets.items():
            if name not in names or tuple(opened.get_slice(name).get_shape()) != tuple(target.shape):
                raise ValueError(f"{file} does not fit this run: {name!r} is missing or has another shape")
            target.copy_(like(opened.get_tensor(name), target))
        for name in sorted(names - set(targets)):
            yield name, opened.get_tensor(name)


def gathered(tensor: Tensor) -> Tensor:
    """The tensor where it is; of a sharded one all of it, for which every process has to call."""
    from torch.distributed.tensor import DTensor

    value = tensor.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, target: Tensor) -> Tensor:
    """`value` on the device of `target`, and sharded as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)
    return value.to(target.device, target.dtype)
