"""Families: what the package knows about model classes, and only they know it.

To add a model: write a file here with a `LayerProcessor` whose `__call__` has the signature of the model's stock
processor, a `Family` that finds the layers and reads the root call, `FAMILY = ThatFamily()`; then name the class below.
Classes are recognised by name, along the bases, so no model file is imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..layer import LayerProcessor
from ..method import AttnMethod, LayerInfo

if TYPE_CHECKING:
    from ..context import Context

FAMILIES = {  # class name -> file
    "UNet2DConditionModel": "unet",
    "UNet2DModel": "unet",
    "UNet3DConditionModel": "unet",
    "UNetMotionModel": "video_unet",
    "ControlNetModel": "unet",
    "SparseControlNetModel": "video_unet",
    "FluxTransformer2DModel": "flux",
    "FluxControlNetModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "QwenImageTransformer2DModel": "qwenimage",
    "ZImageTransformer2DModel": "z_image",
    "SD3Transformer2DModel": "sd3",
    "SD3ControlNetModel": "sd3",
    "PixArtTransformer2DModel": "pixart",
    "DiTTransformer2DModel": "pixart",
}


Change = Callable[[Tensor], Tensor]


class UnsupportedModel(TypeError):
    """No family knows this model class."""


class Family:
    """One way of being built. Stateless; shared by all models of its classes."""

    layer: type[LayerProcessor]

    def layers(self, model: nn.Module) -> list[tuple[LayerInfo, nn.Module]]:
        """The attention layers methods may be put on, in module order."""
        raise NotImplementedError

    def layer_of(self, module: nn.Module) -> type[LayerProcessor]:
        """The class of processor for one of the layers, where they are not all called alike."""
        return self.layer

    def why_not(self, module: nn.Module) -> str | None:
        """What is wrong with the processor now in `module`, and what to do about it; None if ours may replace it."""
        raise NotImplementedError

    def read(self, context: Context, args: tuple, kwargs: dict) -> None:
        """Take grids, batch, frames, device and timestep from the arguments of the root's forward.

        May be traced by torch.compile: store integers and references to tensors, convert nothing.
        """
        raise NotImplementedError

    def listen(self, context: Context, ear: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> list[Any]:
        """Call `ear(layer, image tokens (B, N, C), text (B, T, C'), output)` after every text cross-attention.

        What it returns takes the place of the output. Returns handles with `remove`; none where text attends together
        with the picture.
        """
        return []

    def places(self, model: nn.Module, method: AttnMethod) -> list[tuple[nn.Module, str, Any]]:
        """Patches that leave the places of frames to `method`, in models that add them before temporal attention."""
        return []

    def rearrange(self, context: Context, take: Change, join: Change) -> list[Any]:
        """Hook the model so that it computes on other image tokens than it is given; returns handles with `remove`.

        take: image tokens (B, N, ...) -> those to compute on, chosen along dimension 1: some rows, or another order.
        join: the way back. Both know the grid of the call, which is in the context by then.

        Hooks are objects, not closures: a deep copy of the model then has its own. Raises UnsupportedModel where the model
        cannot be hooked so.
        """
        raise UnsupportedModel(
            f"{type(context.model).__name__} cannot be split over ranks yet; FLUX, Qwen-Image and SD3 can."
        )


@dataclass(eq=False)
class Through:
    """A forward hook that passes what a module gives through `change`."""

    change: Change

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.change(output)


@dataclass(eq=False)
class TakeArguments:
    """A root pre-hook that passes arguments of image tokens (B, N, ...), or lists of them, through `take`."""

    names: tuple[str, ...]
    take: Change

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        found = {name: argument(model, args, kwargs, name) for name in self.names}
        taken = {
            name: [self.take(one) for one in value] if isinstance(value, list | tuple) else self.take(value)
            for name, value in found.items()
            if value is not None
        }
        return replaced(model, args, kwargs, **taken)


def argument(model: nn.Module, args: tuple, kwargs: dict, name: str) -> Any:
    """What the root was called with under this name; pipelines mix positional and keyword arguments."""
    if name in kwargs:
        return kwargs[name]
    place = _parameters(type(model)).index(name)  # type: ignore[arg-type]
    return args[place] if place < len(args) else None


def replaced(model: nn.Module, args: tuple, kwargs: dict, **values: Any) -> tuple[tuple, dict]:
    """The root's arguments with some of them replaced; all become keywords."""
    names = _parameters(type(model))  # type: ignore[arg-type]
    return (), {**dict(zip(names, args, strict=False)), **kwargs, **values}


@functools.cache
def _parameters(model_class: type) -> list[str]:
    return list(inspect.signature(model_class.forward).parameters)[1:]  # type: ignore[attr-defined]


def family_of(model: Any) -> Family:
    """The family of `model`. Raises UnsupportedModel naming the classes that have one."""
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return import_module(f".{FAMILIES[cls.__name__]}", __name__).FAMILY
    raise UnsupportedModel(
        f"{type(model).__name__} is not supported yet; supported are {', '.join(FAMILIES)} and pipelines with one of "
        "them as denoiser. A new one is a file in attn_processors/families."
    )
