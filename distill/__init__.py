"""Training a pretrained model into a linear one: teacher and student are the same model in two roles.

from reattend.distill import DistillConfig, distill, load_linear, make_dataset

make_dataset(pipe, "runs/samples", prompts=[...])
distill(DistillConfig(model="...", data="runs/samples", out="runs/student", attention={"name": "clear", "radius": 8}))
handle = load_linear(pipe, "runs/student/student")  # or a weight file published with CLEAR
handle.remove()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "reattend.distill":
    raise ImportError("import reattend.distill instead of this bare folder; first: pip install -e .")

if TYPE_CHECKING:
    from .comparison import evaluate
    from .config import DistillConfig
    from .data import make_dataset
    from .linear_folder import load_linear, save_linear
    from .trainer import distill

_FILES = {  # public name -> file
    "DistillConfig": "config",
    "distill": "trainer",
    "evaluate": "comparison",
    "load_linear": "linear_folder",
    "make_dataset": "data",
    "save_linear": "linear_folder",
}

__all__ = ["DistillConfig", "distill", "evaluate", "load_linear", "make_dataset", "save_linear"]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_FILES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
