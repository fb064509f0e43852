"""Attention processors for stock diffusers pipelines, installed with one call and removed with one call.

    from reattend.attn_processors import AgentAttnProcessor, install, installed

    handle = install(pipe, AgentAttnProcessor(ratio=0.4))
    handle.remove()
    with installed(pipe, "agent", ratio=0.4):
        ...

Names load on first use. `ATTN_PROCESSORS` is the dict from short name to class.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "reattend.attn_processors":
    raise ImportError("import reattend.attn_processors instead of this bare folder; first: pip install -e .")

if TYPE_CHECKING:
    from .agent import AgentAttnProcessor
    from .agent_joint import AgentJointAttnProcessor
    from .binding import pluggable
    from .clear import ClearAttnProcessor
    from .compat import BackendUnavailable
    from .context import Context
    from .dual_scope import DualScopeAttnProcessor
    from .families import UnsupportedModel
    from .heads import MixtureOfHeadsAttnProcessor
    from .installer import Displaced, Handle, install, installed
    from .isolation_reposition import IsolationRepositionAttnProcessor
    from .layer import LayerCall, LayoutError
    from .linear_forms import (
        FlowAttnProcessor,
        InLineAttnProcessor,
        KernelLinearAttnProcessor,
        NeighborhoodAttnProcessor,
    )
    from .method import AttnMethod, LayerInfo
    from .places import Place
    from .report import Report
    from .routed import RoutedAttnProcessor

    ATTN_PROCESSORS: dict[str, type[AttnMethod]]

_METHODS = {  # short name -> class
    "agent": "AgentAttnProcessor",
    "clear": "ClearAttnProcessor",
    "neighborhood": "NeighborhoodAttnProcessor",
    "linear": "KernelLinearAttnProcessor",
    "inline": "InLineAttnProcessor",
    "flow": "FlowAttnProcessor",
    "agent-joint": "AgentJointAttnProcessor",
    "mixture-of-heads": "MixtureOfHeadsAttnProcessor",
    "routed": "RoutedAttnProcessor",
    "isolation-reposition": "IsolationRepositionAttnProcessor",
    "dual-scope": "DualScopeAttnProcessor",
}
_FILES = {  # public name -> file
    "AgentAttnProcessor": "agent",
    "AgentJointAttnProcessor": "agent_joint",
    "AttnMethod": "method",
    "BackendUnavailable": "compat",
    "ClearAttnProcessor": "clear",
    "Context": "context",
    "Displaced": "installer",
    "DualScopeAttnProcessor": "dual_scope",
    "FlowAttnProcessor": "linear_forms",
    "Handle": "installer",
    "InLineAttnProcessor": "linear_forms",
    "IsolationRepositionAttnProcessor": "isolation_reposition",
    "KernelLinearAttnProcessor": "linear_forms",
    "LayerCall": "layer",
    "LayerInfo": "method",
    "LayoutError": "layer",
    "MixtureOfHeadsAttnProcessor": "heads",
    "NeighborhoodAttnProcessor": "linear_forms",
    "Place": "places",
    "Report": "report",
    "RoutedAttnProcessor": "routed",
    "UnsupportedModel": "families",
    "install": "installer",
    "installed": "installer",
    "pluggable": "binding",
}

__all__ = [
    "ATTN_PROCESSORS",
    "AgentAttnProcessor",
    "AgentJointAttnProcessor",
    "AttnMethod",
    "BackendUnavailable",
    "ClearAttnProcessor",
    "Context",
    "Displaced",
    "DualScopeAttnProcessor",
    "FlowAttnProcessor",
    "Handle",
    "InLineAttnProcessor",
    "IsolationRepositionAttnProcessor",
    "KernelLinearAttnProcessor",
    "LayerCall",
    "LayerInfo",
    "LayoutError",
    "MixtureOfHeadsAttnProcessor",
    "NeighborhoodAttnProcessor",
    "Place",
    "Report",
    "RoutedAttnProcessor",
    "UnsupportedModel",
    "install",
    "installed",
    "pluggable",
]


def __getattr__(name: str) -> Any:
    if name == "ATTN_PROCESSORS":
        value: Any = {short: __getattr__(cls) for short, cls in _METHODS.items()}
    elif name in _FILES:
        value = getattr(import_module(f".{_FILES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
