"""Jobs on stock diffusers pipelines: load a model, make a picture, keep the recipe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "reattend.pipelines":
    raise ImportError("import reattend.pipelines instead of this bare folder; first: pip install -e .")

# Light modules are imported at once. For `load` it has to be so: its module, imported later, would hide the function.
from .events import Cancelled, CancelToken, StepEvent
from .load import ModelUnavailable, bundled, load
from .recipe import Recipe
from .script import Panel, Script, Subject
from .stages import Upscale
from .videos import Video

if TYPE_CHECKING:
    from ..attn_processors import pluggable
    from .filming import Film, long_video
    from .image import generate, preview
    from .picture import Picture
    from .sheet import contact_sheet, film_sheet
    from .splitting import patches
    from .stories import story
    from .told import Story
    from .upscaling import upscale

_HOME = {
    "Film": ".filming",
    "Picture": ".picture",
    "contact_sheet": ".sheet",
    "film_sheet": ".sheet",
    "generate": ".image",
    "long_video": ".filming",
    "patches": ".splitting",
    "pluggable": "..attn_processors",
    "preview": ".image",
    "Story": ".told",
    "story": ".stories",
    "upscale": ".upscaling",
}

__all__ = [
    "CancelToken", "Cancelled", "Film", "ModelUnavailable", "Panel", "Picture", "Recipe", "Script", "StepEvent", "Story",
    "Subject", "Upscale", "Video", "bundled", "contact_sheet", "film_sheet", "generate", "load", "long_video", "patches",
    "pluggable", "preview", "story", "upscale",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing this package does not import diffusers."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
