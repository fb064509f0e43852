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
        if parameters[0].device.type != "cuda":
            raise ValueError(
                f"optimizer='adamw-8bit' computes on CUDA only, the model is on {parameters[0].device.type}; use 'adamw'"
            )
        return _package(name).optim.AdamW8bit(parameters, **settings)
    with contextlib.redirect_stdout(io.StringIO()):  # it greets, and stdout belongs to results
        return _package(name).Prodigy(parameters, safeguard_warmup=config.warmup > 0, **settings)


def _package(name: str) -> Any:
    package = PACKAGES[name]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"optimizer={name!r} needs the package {package} ({error}): pip install {package}, or use optimizer='adamw'"
        ) from None
