"""Where an unfinished film is kept: latents by range of frames, so that any number of ranks can go on with it.

    movie.mp4.parts/step-000012/frames-0000000-0001152.safetensors     latents and the scheduler's history of these frames
                                frames-0001152-0002304.safetensors
                                manifest.json                          step, recipe, check sums; written last

A checkpoint without a manifest, or with a shard that is missing or damaged, does not count: the one before it is used. The
last two are kept. No random state is needed, because the noise of a frame depends on seed, frame and step alone (`noise`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..attn_processors.comm import Comm, Span
from ..attn_processors.ops.scopes import Clip
from .files import written_whole

__all__ = ["Checkpoint", "Moment", "latest", "parts_folder", "restore", "save", "scheduler_state"]

FORMAT = "reattend film checkpoint"
VERSION = 1
KEPT = 2
TENSOR = "frames of"  # marks a value that is in the shards


@dataclass(frozen=True, eq=False)
class Moment:
    """A film between two steps.

    Attributes:
        step: entries of the scheduler's `timesteps` that are done.
        latents: shape (1, C, f, H, W).
        history: what the scheduler remembers, by attribute: plain values, tensors (f, ...), and lists of these.
    """

    step: int
    latents: Tensor
    history: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint on disk that was found whole."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]

    def read(self, own: Span) -> Moment:
        """The frames [first, end) of it, whoever saved them."""
        pieces: dict[str, list[Tensor]] = {}
        for shard in self.manifest["shards"]:
            low, high = max(own[0], shard["first"]), min(own[1], shard["end"])
            if high > low:
                for name, tensor in load_file(self.folder / shard["file"]).items():
                    pieces.setdefault(name, []).append(tensor[low - shard["first"] : high - shard["first"]])
        tensors = {name: torch.cat(parts) for name, parts in pieces.items()}
        history = {name: _with_tensors(value, tensors) for name, value in self.manifest["history"].items()}
        return Moment(self.step, tensors["latents"].transpose(0, 1).unsqueeze(0), history)


def parts_folder(film: Path) -> Path:
    """Where the checkpoints of a film lie."""
    return film.with_name(film.name + ".parts")


def save(folder: Path, moment: Moment, film: Clip, digest: str, recipe: str) -> None:
    """Write a checkpoint; every rank calls it. It counts once all have written theirs.

    Args:
        folder: `parts_folder` of the film, seen by all ranks.
        film: the ranks, which carry a message each, and their frames.
        digest: of recipe and model.
        recipe: as JSON.

    Raises:
        OSError: the disk is full; what was kept before stays.
    """
    tensors: dict[str, Tensor] = {"latents": _shard(moment.latents[0].transpose(0, 1))}
    history = {name: _without_tensors(value, name, tensors) for name, value in moment.history.items()}
    step = folder / f"step-{moment.step:06d}"
    name = "frames-{:07d}-{:07d}.safetensors"
    mine = step / name.format(*film.own)
    try:
        with written_whole(mine) as (aside,):
            save_file(tensors, aside)
    except SafetensorError as problem:
        raise OSError(
            f"cannot keep step {moment.step} of the film in {folder}: {problem}; make room and start again, which goes on "
            "from the step kept before"
        ) from problem
    film.comm.place = f"the checkpoint of step {moment.step}"
    sums = film.comm.everyones(torch.frombuffer(bytearray(_digest(mine)), dtype=torch.uint8))  # all have written
    if film.comm.rank == 0:
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": moment.step,
            "digest": digest,
            "history": history,
            "recipe": json.loads(recipe),
            "shards": [
                {"file": name.format(*part), "first": part[0], "end": part[1], "sha256": bytes(total.tolist()).hex()}
                for part, total in zip(film.parts, sums, strict=True)
            ],
        }
        with written_whole(step / "manifest.json") as (aside,):
            aside.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for old in _steps(folder)[KEPT:]:
            shutil.rmtree(old)


def latest(folder: Path, digest: str | None = None) -> Checkpoint | None:
    """The newest whole checkpoint in a folder; None if there is none.

    digest: of recipe and model; None takes any.

    Raises:
        ValueError: the newest whole checkpoint is of another film.
    """
    for step in _steps(folder):
        try:
            manifest = json.loads((step / "manifest.json").read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT or manifest["version"] != VERSION:
                raise ValueError(f"it is of version {manifest['version']}")
            files = [(step / shard["file"], shard["sha256"]) for shard in manifest["shards"]]
            if any(file.parent != step for file, _ in files):
                raise ValueError("it names files elsewhere")
            for file, total in files:
                if _digest(file).hex() != total:
                    raise ValueError(f"{file.name} is damaged")
        except (OSError, ValueError, KeyError, TypeError) as problem:
            warnings.warn(f"the checkpoint {step} is not used: {problem}", stacklevel=2)
            continue
        if digest is not None and manifest["digest"] != digest:
            raise ValueError(
                f"{folder} holds an unfinished film of another recipe or model; finish it (reattend video --resume), delete "
                "the folder, or choose another output path"
            )
        return Checkpoint(step, manifest)
    return None


def scheduler_state(scheduler: Any, frames: int) -> dict[str, Any]:
    """What a scheduler remembers between steps. What `set_timesteps` computes anew (tables of one dimension) is left out.

    Raises:
        ValueError: it remembers something of another kind, such as a random state.
    """
    found = {}
    for name, value in vars(scheduler).items():
        if name == "_internal_dict" or callable(value) or (_is_table(value) and not _is_scalar(value)):
            continue
        if not _is_state(value, frames):
            raise ValueError(
                f"{type(scheduler).__name__}.{name} cannot be kept in a checkpoint ({type(value).__name__}); use another "
                "scheduler, such as DDIM, Euler or DPM-Solver++"
            )
        found[name] = list(value) if isinstance(value, (list, tuple)) else value
    return found


def restore(scheduler: Any, history: dict[str, Any]) -> None:
    """Give a scheduler its memory back, after `set_timesteps`; tensors that this made or left are constants and stay."""
    for name, value in history.items():
        if isinstance(value, (Tensor, list)) or not isinstance(getattr(scheduler, name, None), Tensor):
            setattr(scheduler, name, list(value) if isinstance(value, list) else value)


def barrier(comm: Comm) -> None:
    """Wait for all ranks."""
    comm.everyones(torch.zeros(1, dtype=torch.uint8))


def _is_table(value: Any) -> bool:
    return hasattr(value, "ndim") and value.ndim <= 1


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _is_state(value: Any, frames: int) -> bool:
    if isinstance(value, Tensor):
        return _is_scalar(value) or (value.ndim == 4 and value.shape[0] == frames)
    if isinstance(value, (list, tuple)):
        return all(_is_state(item, frames) or (_is_table(item) and item.ndim == 0) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value for JSON; its tensors go to `tensors`, and their names in their place."""
    if isinstance(value, list):
        return [_without_tensors(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Tensor) and value.ndim:
        tensors[name] = _shard(value)
        return {TENSOR: name}
    return value.item() if hasattr(value, "item") else value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return tensors[value[TENSOR]] if isinstance(value, dict) else value


def _shard(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().clone()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _steps(folder: Path) -> list[Path]:
    """The folders of whole checkpoints, newest first."""
    return sorted(_with_manifest(folder), reverse=True)


def _with_manifest(folder: Path) -> Iterator[Path]:
    return (path.parent for path in folder.glob("step-*/manifest.json"))
