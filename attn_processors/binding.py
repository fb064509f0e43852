"""`pipe.set_attn_processor(...)` as people are used to, on one pipeline object and its denoisers.

No pipeline class of diffusers has the method, and the one of the models puts one object on every layer. So we bind two
methods on instances: ours go through `install`, foreign processors to the model's own method. Nothing global changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from .context import PipelineRef, context_of
from .installer import remove_all, replace
from .layer import LayerProcessor
from .method import AttnMethod
from .planning import denoisers, resolve

Target = TypeVar("Target")


def pluggable(target: Target) -> Target:
    """Give a pipeline (and its denoisers), or a model, `set_attn_processor` and `reset_attn_processor`.

    Returns the same object. The binding is plain instance state: it follows `copy.deepcopy`, is not inherited by
    `from_pipe` (call pluggable again there), and does not show in `components` or `save_pretrained`.
    """
    models = denoisers(target)
    pipe = None if isinstance(target, nn.Module) else target
    for model in models:  # partials, not methods: they can be pickled and copied with their object
        model.set_attn_processor = partial(_set_on_model, model, PipelineRef(pipe))  # type: ignore[assignment]
        model.reset_attn_processor = partial(_reset, [model])  # type: ignore[assignment]
    if pipe is not None:
        pipe.set_attn_processor = partial(_set_on_pipe, pipe)  # type: ignore[attr-defined]
        pipe.reset_attn_processor = partial(_reset_pipe, pipe)  # type: ignore[attr-defined]
    return target


def _set_on_pipe(pipe: Any, /, processor: Any, **settings: Any) -> None:
    """Replace what we installed before; a foreign processor goes to each denoiser's own method."""
    _set(pipe, pipe, processor, settings)


def _set_on_model(model: nn.Module, pipe: PipelineRef, /, processor: Any, **settings: Any) -> None:
    """Replace what we installed before on this model; a foreign processor goes to the model's own method."""
    _set(model, pipe(), processor, settings)


def _set(target: Any, pipe: Any, processor: Any, settings: dict[str, Any]) -> None:
    if _is_ours(processor):
        layers = settings.pop("layers", None)
        replace(target, resolve(processor, settings), layers, pipe)
        return
    if settings:
        raise TypeError(f"settings ({', '.join(settings)}) go with the name of an attention, got {processor!r}.")
    if not callable(processor) and not isinstance(processor, dict):
        raise TypeError(
            f"got {processor!r} as attention processor, need one of ours, its name, a list of these, or a diffusers "
            "processor; reset_attn_processor() goes back to stock."
        )
    for model in denoisers(target):
        _set_foreign(model, processor)


def _set_foreign(model: nn.Module, processor: Any) -> None:
    own = getattr(type(model), "set_attn_processor", None)
    if own is None:
        raise TypeError(f"{type(model).__name__} has no set_attn_processor of its own for foreign processors.")
    if not isinstance(processor, dict):
        remove_all(model)
        own(model, processor)
        return
    table = {name: _alive(value) for name, value in processor.items()}  # a copy: the stock method empties the dict
    if gone := sum(table[name] is not value for name, value in processor.items()):
        warnings.warn(f"{gone} processors of ours in this dict were removed before; stock ones are set.", stacklevel=4)
    if not any(isinstance(value, LayerProcessor) for value in table.values()):
        remove_all(model)
    own(model, table)
    if (context := context_of(model)) is not None:
        context.adopt()


def _alive(processor: Any) -> Any:
    return processor.stock if isinstance(processor, LayerProcessor) and processor.retired else processor


def _reset_pipe(pipe: Any, /) -> None:
    """Take out everything of ours: the stock processors run again, bit for bit."""
    _reset(denoisers(pipe))


def _reset(models: Sequence[nn.Module], /) -> None:
    """Take out everything of ours: the stock processors run again, bit for bit."""
    for model in models:
        remove_all(model)


def _is_ours(processor: Any) -> bool:
    if isinstance(processor, type):
        return issubclass(processor, AttnMethod)
    return isinstance(processor, (AttnMethod, str, list, tuple))
