"""Everything this package takes from the inside of diffusers, so that a new release is checked in one file.

Model files are never imported here: they cost seconds, and models are recognised by class name.
"""

from __future__ import annotations

import importlib.util
import warnings

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb

__all__ = [
    "Attention",
    "AttnProcessor",
    "AttnProcessor2_0",
    "BackendUnavailable",
    "JointAttnProcessor2_0",
    "apply_rotary_emb",
    "dispatch_attention_fn",
    "is_native",
    "require_backend",
    "why_not_xformers",
]


class BackendUnavailable(RuntimeError):
    """The attention backend the user asked for cannot run here."""


def why_not_xformers(device: torch.device) -> str | None:
    """The reason why xformers cannot attend on `device`, or None.

    Its Python package imports without its compiled part, so the probe asks for the operator, not for the import.
    """
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import xformers.ops

        probe = torch.zeros(1, 8, 1, 32, device=device, dtype=torch.float16)
        xformers.ops.memory_efficient_attention(probe, probe, probe)
    except (ImportError, NotImplementedError, RuntimeError, OSError) as problem:
        return f"its operator does not run: {str(problem).strip().splitlines()[0]}"
    return None


WHY_NOT = {AttentionBackendName.XFORMERS: why_not_xformers}  # backends diffusers believes in too early


def is_native(wanted: AttentionBackendName | str | None) -> bool:
    """Whether `wanted` (None: the current default) is torch's scaled_dot_product_attention."""
    if wanted is None:
        wanted = _AttentionBackendRegistry.get_active_backend()[0]
    return wanted == AttentionBackendName.NATIVE  # whose members are strings


def require_backend(wanted: AttentionBackendName | str | None, device: torch.device) -> None:
    """Raise BackendUnavailable if `wanted` (None: the current default) cannot run on `device`."""
    name = _AttentionBackendRegistry.get_active_backend()[0] if wanted is None else AttentionBackendName(wanted)
    probe = WHY_NOT.get(name)
    if probe and (reason := probe(device)):
        raise BackendUnavailable(
            f"attention backend {name.value!r} was chosen, but {reason}; choose another one, for example "
            "model.set_attention_backend('native')."
        )
