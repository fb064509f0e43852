"""Training a pretrained model into a linear one: so far, the folder of a trained student.

from reattend.distill import load_linear

handle = load_linear(pipe, "runs/student")  # or a weight file published with CLEAR
handle.remove()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "reattend.distill":
    raise ImportError("import reattend.distill instead of this bare folder; first: pip install -e .")

if TYPE_CHECKING:
    from .linear_folder import load_linear, save_linear

_FILES = {"load_linear": "linear_folder", "save_linear": "linear_folder"}  # public name -> file

__all__ = ["load_linear", "save_linear"]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_FILES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
