"""The files of a folder of samples: written whole, recognised, and checked when read.

dataset.json              what the samples were made from; the same file from every process
empty.safetensors         embeddings of the empty caption, for models that compare with it
shard-00000.safetensors   up to `shard` samples of one size; its header holds captions and a SHA-256 of each sample
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pipelines.files import written_whole
from .denoising import Size

__all__ = [
    "EMPTY", "FORMAT", "INDEX", "VERSION", "DamagedSample", "Samples", "about_digest", "claim", "is_whole",
    "read_index", "write_shard",
]  # fmt: skip

FORMAT, VERSION = "reattend samples", 1
INDEX, EMPTY = "dataset.json", "empty.safetensors"


class DamagedSample(ValueError):
    """A sample that is not what was written."""


class Samples(torch.utils.data.Dataset):
    """The samples of a finished folder. Item i: {"latents": (...), "text": (T, C), ...} and whatever the model needs.

    Files are opened on first use, so that a copy in another process opens its own. `damaged` holds the samples of files that
    cannot be opened; others are found out when they are read.

    Raises:
        ValueError: if there are no samples at `folder`, for another format, or shards that are missing.
        DamagedSample: for an item that is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"no {INDEX} in {self.folder}; make samples with: reattend distill data")
        self.about = read_index(self.folder)
        digest = about_digest(self.about)
        counts = self.about["shards"]
        states = [_state(self._file(i), digest, count) for i, count in enumerate(counts)]
        missing = [self._file(i).name for i, state in enumerate(states) if state == "missing"]
        missing += [] if is_whole(self.folder / EMPTY, digest, 1) else [EMPTY]
        if missing:
            raise ValueError(
                f"{self.folder} is not finished: {len(missing)} of {len(counts) + 1} files are missing, the first is "
                f"{missing[0]}; run reattend distill data again with the same options, which makes only what is not there"
            )
        self.starts = np.cumsum([0, *counts])
        self.damaged = frozenset(
            index for i, state in enumerate(states) if state == "damaged"
            for index in range(int(self.starts[i]), int(self.starts[i + 1]))
        )  # fmt: skip
        self._open: dict[int, tuple[Any, list[str]]] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self._read(*self._place(index))

    def where(self, index: int) -> tuple[Path, int]:
        """File of a sample, and its number in it."""
        shard, place = self._place(index)
        return self._file(shard), place

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    @property
    def digest(self) -> str:
        """What the samples were made from, as one hash."""
        return about_digest(self.about)

    @property
    def empty(self) -> dict[str, Tensor]:
        """Embeddings of the empty caption, each without a batch dimension."""
        return self._read(-1, 0)

    def groups(self) -> dict[Size, np.ndarray]:
        """Indices of the samples of each size."""
        found: dict[Size, list[int]] = {}
        for shard, size in enumerate(self.about["sizes"]):
            found.setdefault(tuple(size), []).extend(range(int(self.starts[shard]), int(self.starts[shard + 1])))
        return {size: np.array(indices) for size, indices in found.items()}

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, int(index - self.starts[shard])

    def _file(self, shard: int) -> Path:
        return self.folder / (EMPTY if shard < 0 else f"shard-{shard:05d}.safetensors")

    def _read(self, shard: int, place: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        prefix = f"{place}."
        try:
            if shard not in self._open:
                file = safe_open(self._file(shard), framework="pt")
                self._open[shard] = file, json.loads(file.metadata()["samples"])
            file, digests = self._open[shard]
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a dict
            sample = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
            problem = None if _sample_digest(sample) == digests[place] else "it is not what was written"
        except (OSError, SafetensorError) as error:
            problem = str(error)
        if problem is not None:
            raise DamagedSample(
                f"{self._file(shard)} is damaged: sample {place}: {problem}; delete the file and run reattend distill data "
                "again, which makes it anew"
            )
        return {name: value[0] for name, value in sample.items()}


def claim(folder: Path, about: dict[str, Any]) -> None:
    """Write the index, or check that the one that is there says the same."""
    if (folder / INDEX).exists():
        there = read_index(folder)
        if about_digest(there) != about_digest(about):
            known = json.loads(json.dumps(about))
            differs = next((key for key in known if there.get(key) != known[key]), "an entry")
            raise ValueError(
                f"{folder} holds samples made in another way ({differs} differs); choose another folder, or delete it"
            )
        return
    with written_whole(folder / INDEX) as (aside,):
        aside.write_text(json.dumps(about, indent=2) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as problem:
        raise ValueError(f"{folder / INDEX} cannot be read ({problem}); delete the folder and make it again") from None
    if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("version") != VERSION:
        raise ValueError(f"{folder / INDEX} is not of the format {FORMAT!r} {VERSION}; make the samples again")
    return about


def write_shard(file: Path, made: list[dict[str, Tensor]], captions: list[str], digest: str, size: Size) -> None:
    from safetensors.torch import save_file

    plain = [{name: value.detach().cpu().contiguous() for name, value in sample.items()} for sample in made]
    tensors = {f"{i}.{name}": value.clone() for i, sample in enumerate(plain) for name, value in sample.items()}
    metadata = {
        "format": "pt",
        "made_from": digest,
        "samples": json.dumps([_sample_digest(sample) for sample in plain]),
        "captions": json.dumps(captions),
        "size": json.dumps(size),
    }
    with written_whole(file) as (aside,):
        save_file(tensors, aside, metadata=metadata)


def is_whole(file: Path, digest: str, count: int) -> bool:
    """Whether a shard is there, of this data set, and as long as its header says; samples are checked when read."""
    return _state(file, digest, count) == "whole"


def _state(file: Path, digest: str, count: int) -> str:
    """Of a shard: "whole", "damaged", or "missing", which one of other samples is too."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return "missing"
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (OSError, SafetensorError):
        return "damaged"
    if metadata.get("made_from") != digest or len(json.loads(metadata.get("samples", "[]"))) != count:
        return "missing"
    return "whole"


def about_digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _sample_digest(sample: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(sample):
        value = sample[name].contiguous()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        whole.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
