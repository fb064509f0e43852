"""What works on this machine, found out by trying it.

Versions, devices, the attention backends of diffusers (each one gets a tiny call on the device that pipelines would
use), the bundled models, and what to install for the rest.
"""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap
import warnings
from typing import Any

import diffusers
import torch

from ..attn_processors.compat import dispatch_attention_fn, require_backend
from ..pipelines.load import bundled, find_device

__all__ = ["examine", "table"]

PACKAGES = ("reattend", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")
EXTRAS = {"gradio": "ui", "imageio": "video", "torchmetrics": "metrics", "tensorboard": "train"}
GIB = 2**30
WIDTH = 100  # of wrapped text in the table


def examine() -> dict[str, Any]:
    """Everything as one JSON-able value."""
    device = find_device()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in (*PACKAGES, *EXTRAS, "xformers")},
        "device": str(device),
        "devices": _devices(),
        "attention_backends": {name.value: why_not(name, device) or "works" for name in diffusers.AttentionBackendName},
        "models": {name: _megabytes(folder) for name, folder in bundled().items()},
        "install": [
            f'pip install "reattend[{extra}]"   # {name}' for name, extra in EXTRAS.items() if _version(name) is None
        ],
    }


def why_not(backend: Any, device: torch.device) -> str | None:
    """The reason why an attention backend of diffusers cannot run on `device`, or None if it can.

    Backends that fetch their kernel from the model hub are not tried: looking should not download anything.
    """
    if backend.value.endswith("_hub"):
        return "not tried: it downloads a kernel from the hub (pip install kernels)"
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    query, key, value = torch.randn(3, 1, 16, 2, 32, device=device, dtype=dtype)  # (B, N, h, d) each
    try:
        with warnings.catch_warnings(), diffusers.attention_backend(backend.value):
            warnings.simplefilter("ignore")
            require_backend(backend, device)
            out = dispatch_attention_fn(query, key, value)
            truth = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))
            torch.testing.assert_close(out, truth.transpose(1, 2), atol=2e-2, rtol=0)
    except Exception as error:  # every backend has its own way to fail
        return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return None


def table(found: dict[str, Any]) -> str:
    """What `examine` found, for people to read."""
    backends = found["attention_backends"]
    lines = [f"Python {found['python']} on {found['system']}", "", "Packages"]
    lines += [f"  {name:<14}{version or '-'}" for name, version in found["packages"].items()]
    lines += ["", f"Devices (pipelines use {found['device']})"]
    lines += [f"  {name:<14}{text}" for name, text in found["devices"].items()]
    lines += ["", f"Attention backends, tried on {found['device']}"]
    lines += [f"  works         {', '.join(name for name, state in backends.items() if state == 'works')}"]
    lines += ["  do not work:", *_grouped({name: state for name, state in backends.items() if state != "works"})]
    lines += ["", "Bundled models"]
    lines += [f"  {name:<14}{size:.1f} MB" for name, size in found["models"].items()] or ["  none in this install"]
    if found["install"]:
        lines += ["", "To install for the rest", *(f"  {line}" for line in found["install"])]
    return "\n".join(lines)


def _grouped(reasons: dict[str, str]) -> list[str]:
    """Two lines for each reason: the names it holds for, and the reason itself without the name."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason.replace(f"'{name}' ", ""), []).append(name)
    pairs = [(textwrap.wrap(", ".join(names), WIDTH), textwrap.wrap(reason, WIDTH)) for reason, names in groups.items()]
    return [
        line for names, reason in pairs for line in (*(f"    {n}" for n in names), *(f"        {r}" for r in reason))
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    found = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{card.name}, {card.total_memory / GIB:.0f} GiB, capability {card.major}.{card.minor}"
    if torch.backends.mps.is_available():
        found["mps"] = platform.processor() or "available"
    return found


def _megabytes(folder: Any) -> float:
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 1)
