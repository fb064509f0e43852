"""Optimisers by name. AdamW is torch's; others come from packages that are installed for them."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any

import torch
from torch import nn

from .config import DistillConfig

__all__ = ["STATE_BYTES", "make_optimizer"]

PACKAGES = {"adamw-8bit": "bitsandbytes", "prodigy": "prodigyopt"}
STATE_BYTES = {"adamw": 8, "adamw-8bit": 2, "prodigy": 16}  # for each trained number


def make_optimizer(config: DistillConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of `config` on these parameters.

    Raises:
        ValueError: if its package is not installed, or it does not run here.
    """
    name = config.optimizer
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if config.parallel == "fsdp":
        raise ValueError(f"optimizer={name!r} does not know shared weights; use parallel='ddp', or optimizer='adamw'")
    if name == "adamw-8bit":
        package = _package(name)
        _try_8bit(package, parameters[0].device)
        return package.optim.AdamW8bit(parameters, **settings)
    with contextlib.redirect_stdout(io.StringIO()):  # it greets, and stdout belongs to results
        return _package(name).Prodigy(parameters, safeguard_warmup=config.warmup > 0, **settings)


def _try_8bit(package: Any, device: torch.device) -> None:
    """One step on a weight of its own: which devices the package computes on depends on its version.

    Raises ValueError, so that a run ends before its first step and not in it.
    """
    weight = nn.Parameter(torch.zeros(8192, device=device))  # shorter ones keep their moments in fp32
    weight.grad = torch.ones_like(weight)
    try:
        package.optim.AdamW8bit([weight]).step()
    except Exception as error:  # of many kinds: no kernel, no library, no device
        reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        raise ValueError(
            f"optimizer='adamw-8bit' does not run on {device.type} with this bitsandbytes ({reason}): "
            "pip install -U bitsandbytes, or use optimizer='adamw'"
        ) from error


def _package(name: str) -> Any:
    package = PACKAGES[name]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"optimizer={name!r} needs the package {package} ({error}): pip install {package}, or use optimizer='adamw'"
        ) from None
