"""Where models compute and where a pipeline keeps its tensors: what the hooks of offloading say, and one of ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

__all__ = ["device_of", "kept_on_host"]


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, also if it is offloaded.

    Such a model is moved by its first call, with what it is given; what later calls are given has to be there already.
    """
    hook = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    found = getattr(model, "device", None) if hook is None else hook
    return next(model.parameters()).device if found is None else torch.device(found)


def kept_on_host(pipe: Any) -> list[tuple[Any, str, Any]]:
    """A patch that makes the pipeline keep latents in host memory, where `streamed` wants them; none on a CPU.

    Pipelines compute where the offloading hook of their first model says. While that is ours, `device_of` answers so too:
    ask it before. A pipeline that is offloaded has such hooks already and keeps its latents where they say.
    """
    first = next(part for part in pipe.components.values() if isinstance(part, nn.Module))
    if pipe.device.type == "cpu" or hasattr(first, "_hf_hook"):
        return []
    return [(first, "_hf_hook", SimpleNamespace(execution_device=torch.device("cpu")))]
