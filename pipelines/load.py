"""From a name, a folder or a hub id to the stock pipeline, ready for our attention.

The class is the one that the model's own `model_index.json` names, as diffusers ships it. Nothing a model folder brings
along is ever run: weights come from safetensors only, and classes from outside diffusers and transformers are refused.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import DTYPES

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = ["GUIDANCE", "ModelUnavailable", "bundled", "load"]

TINY = Path(__file__).with_name("tiny")
LENDER = "tiny-sd"  # bundled models need not bring along what they share with it
GUIDANCE = {"tiny-sd": 3.0, "tiny-video": 3.0}  # with which bundled models draw best; of others the stock call knows it
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ModelUnavailable(ValueError):
    """The model is not there, or what is there cannot be loaded."""


def bundled() -> dict[str, Path]:
    """The models that come with this package: name and folder."""
    return {path.parent.name: path.parent for path in sorted(TINY.glob("*/model_index.json"))}


def load(
    source: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> DiffusionPipeline:
    """Load the stock pipeline of a model and give it `set_attn_processor` and `reset_attn_processor`.

    Args:
        source: a bundled name ("tiny-sd"), else a local diffusers folder, else a hub id ("owner/name").
        device: "cpu", "cuda", "cuda:1", "mps"; None takes the first there is of cuda, mps, cpu.
        dtype: "float32", "float16" or "bfloat16"; None takes bfloat16 on a CUDA device that computes in it, float16 on
            other CUDA devices, and float32 elsewhere. Files in another precision are converted.

    Raises:
        ModelUnavailable: no such model, no network, a folder that cannot be read, or one that wants code of its own.
        ValueError: an unknown or absent device or dtype.
    """
    place = find_device(device)
    numbers = _dtype(dtype, place)
    folder = _folder(str(source))
    pipe = _from_folder(folder, numbers).to(place)
    pipe.register_to_config(_name_or_path=str(source))  # a bundled name or hub id, not the place of its files
    if folder in bundled().values() and hasattr(pipe, "transformer"):
        # Pipelines of transformers take 1024 px for granted; the VAE of a bundled model tells its base size.
        pipe.default_sample_size = pipe.vae.config.sample_size // pipe.vae_scale_factor
    from ..attn_processors import pluggable

    return pluggable(pipe)


def find_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device of that name if it is here; None: the first there is of cuda, mps, cpu."""
    import torch

    if wanted is None:
        return torch.device(_present()[0])
    there = _present()
    try:
        place = torch.device(wanted)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in there or (place.index or 0) >= max(1, torch.cuda.device_count()):
        raise ValueError(
            f"device is not available: got {str(wanted)!r}, this machine and torch offer {', '.join(there)}"
        )
    return place


def _present() -> list[str]:
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, is_there in there.items() if is_there]


def _dtype(wanted: str | torch.dtype | None, place: torch.device) -> torch.dtype:
    import torch

    if wanted is None and place.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    name = "float32" if wanted is None else str(wanted).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is unknown: got {str(wanted)!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def _folder(source: str) -> Path:
    """The local folder of a model; downloads a hub id, which takes network once."""
    here = bundled()
    if source in here:
        return here[source]
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelUnavailable(f"{source} is a file; a model is a diffusers folder that holds model_index.json")
    if not HUB_ID.fullmatch(source):
        raise ModelUnavailable(
            f"no model {source!r}: it is no folder here, no bundled name ({', '.join(here) or 'none in this install'}) "
            "and no hub id (owner/name)"
        )
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(source, use_safetensors=True))
    except Exception as error:  # the hub client, its transport and the file system each raise their own
        raise ModelUnavailable(
            f"cannot get the model {source!r}: it is no folder here, and the hub gave nothing ({_short(error)}); "
            "check the name and the network, or give a local folder"
        ) from error


def _from_folder(folder: Path, numbers: torch.dtype) -> DiffusionPipeline:
    cls = _stock_class(folder)
    variant = "fp16" if any(folder.glob("*/*.fp16.safetensors")) and not _plain_weights(folder) else None
    try:
        with warnings.catch_warnings():
            # Older diffusers knows this name only; newer ones take it with a notice.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            return cls.from_pretrained(
                folder, torch_dtype=numbers, use_safetensors=True, local_files_only=True, variant=variant,
                **_lent(folder, numbers),
            )  # fmt: skip
    except Exception as error:  # broken configs and weights raise nearly anything, deep inside two libraries
        raise ModelUnavailable(
            f"cannot read the model folder {folder}: {_short(error)}; it must hold what save_pretrained writes, "
            "with weights as safetensors"
        ) from error


def _lent(folder: Path, numbers: torch.dtype) -> dict[str, Any]:
    """Components of tiny-sd for a bundled model: its index names them, its folder has none of its own."""
    if folder not in bundled().values():
        return {}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    named = [part for part, origin in index.items() if isinstance(origin, list) and any(origin)]
    missing = [part for part in named if not (folder / part).is_dir()]
    lender = _from_folder(TINY / LENDER, numbers) if missing and folder.name != LENDER else None
    return {part: getattr(lender, part) for part in missing} if lender is not None else {}


def _plain_weights(folder: Path) -> bool:
    return any(not path.name.endswith(".fp16.safetensors") for path in folder.glob("*/*.safetensors"))


def _stock_class(folder: Path) -> type[DiffusionPipeline]:
    """The pipeline class that `model_index.json` names, after checking that every class in it is a stock one."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelUnavailable(
            f"{folder} is not a diffusers model: cannot read its model_index.json ({reason}); "
            "give a folder written by save_pretrained"
        ) from error
    import diffusers

    name = index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ModelUnavailable(
            f"{folder} names the pipeline {name!r}, which this diffusers {diffusers.__version__} does not have; "
            "only stock classes are loaded, code from a model folder is never run"
        )
    for part, origin in index.items():
        if isinstance(origin, list) and not part.startswith("_") and not _is_stock(origin):
            raise ModelUnavailable(
                f"{folder} wants {origin} as its {part}, which is no class of diffusers or transformers here; "
                "only stock classes are loaded, code from a model folder is never run"
            )
    return cls


def _is_stock(origin: list[Any]) -> bool:
    """Whether a [library, class] entry is empty, or a class of diffusers (or its pipelines) or transformers."""
    import diffusers
    import transformers

    if origin == [None, None]:
        return True
    if len(origin) != 2 or not all(isinstance(word, str) for word in origin):
        return False
    library, name = origin
    home = {"diffusers": diffusers, "transformers": transformers}.get(library) or getattr(
        diffusers.pipelines, library, None
    )
    return hasattr(getattr(home, name, None), "from_pretrained")


def _short(error: Exception) -> str:
    """The first line of another library's message, at most 200 characters."""
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
