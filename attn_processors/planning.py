"""Which layers of a pipeline get which attention: the whole plan, made before the model is touched.

A plan reads and changes nothing, so whatever is in the way (a class without a family, no layer that fits, somebody
else's processor, two methods for one layer) is told while everything is as it was. `installer` carries plans out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .families import Family, UnsupportedModel, family_of
from .layer import LayerProcessor
from .method import AttnMethod, LayerInfo

DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "decoder")
LayerFilter = str | re.Pattern | Callable[[str], bool]
Plan = dict[AttnMethod, list[tuple[LayerInfo, nn.Module]]]


def resolve(processor: Any, settings: dict[str, Any]) -> list[AttnMethod]:
    """Method objects from what people pass: an object, a name with settings, or a list."""
    from . import ATTN_PROCESSORS

    if isinstance(processor, str):
        if processor not in ATTN_PROCESSORS:
            names = ", ".join(sorted(ATTN_PROCESSORS))
            raise ValueError(f"there is no attention called {processor!r}; there are: {names}.")
        return [ATTN_PROCESSORS[processor].from_settings(settings)]
    if settings:
        raise TypeError(
            f"settings ({', '.join(settings)}) go with a name, got {processor!r}; write them into the object, or pass "
            "the name."
        )
    if isinstance(processor, AttnMethod):
        return [processor]
    if isinstance(processor, (list, tuple)) and processor:
        return [method for item in processor for method in resolve(item, {})]
    if isinstance(processor, type) and issubclass(processor, AttnMethod):
        raise TypeError(f"got the class {processor.__name__}, need an object; write {processor.__name__}().")
    raise TypeError(
        f"got {processor!r} as attention processor, need one of ours, a name ({', '.join(sorted(ATTN_PROCESSORS))}) or "
        "a list of these; foreign processors go to the model's own set_attn_processor."
    )


def denoisers(target: Any) -> list[nn.Module]:
    """The models that denoise in a pipeline, or the model itself; compiled wrappers are taken off."""
    if isinstance(target, nn.Module):
        return [getattr(target, "_orig_mod", target)]
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"need a diffusers pipeline or a model, got {type(target).__name__}.")
    found = [components[name] for name in DENOISERS if isinstance(components.get(name), nn.Module)]
    return [getattr(model, "_orig_mod", model) for model in found]


def supported(target: Any) -> list[nn.Module]:
    """The denoisers of `target` that have a family; an error if there are none."""
    models = denoisers(target)
    if not models:
        raise UnsupportedModel(
            f"{type(target).__name__} has no denoiser under a name we know ({', '.join(DENOISERS)}); install on the "
            "model itself."
        )
    good = [model for model in models if _family_or_none(model)]
    return good or [model for model in models if family_of(model)]  # raises, naming the first


def plan(
    target: Any, methods: Sequence[AttnMethod], layers: LayerFilter | None = None, replacing: bool = False
) -> list[tuple[nn.Module, Plan]]:
    """Which layers of which denoiser each method gets; raises what `install` raises, and changes nothing.

    replacing: what is there of ours will be gone by then, so it is not in the way.
    """
    models = supported(target)
    plans = [(model, _plan(model, methods, layers, replacing)) for model in models]
    for method in methods:
        if not any(chosen[method] for _, chosen in plans):
            raise ValueError(_no_layer(models, method, layers))
    return plans


def _plan(model: nn.Module, methods: Sequence[AttnMethod], layers: LayerFilter | None, replacing: bool) -> Plan:
    family = family_of(model)
    keep = _filter(layers)
    chosen: Plan = {}
    taken: dict[str, AttnMethod] = {}
    for method in methods:
        chosen[method] = []
        for info, module in family.layers(model):
            if info.role not in method.roles or not method.wants(info) or not keep(info.name):
                continue
            if info.name in taken:
                raise ValueError(
                    f"layer {info.name!r} is wanted by both {taken[info.name].name!r} and {method.name!r}; give them "
                    "different layers, with two install calls and layers=..."
                )
            taken[info.name] = method
            _check_free(family, info, module, replacing)
            chosen[method].append((info, module))
    return chosen


def _check_free(family: Family, info: LayerInfo, module: nn.Module, replacing: bool) -> None:
    if isinstance(module.processor, LayerProcessor):
        if replacing or module.processor.retired:
            return
        held = module.processor.method.name if module.processor.method else "an attention of ours"
        raise ValueError(
            f"layer {info.name!r} already carries {held!r}; remove its handle first, or use "
            "pluggable(pipe).set_attn_processor(...), which replaces."
        )
    if reason := family.why_not(module):
        raise ValueError(f"layer {info.name!r} cannot take ours: {reason}.")


def _filter(layers: LayerFilter | None) -> Callable[[str], bool]:
    if layers is None:
        return lambda name: True
    if isinstance(layers, (str, re.Pattern)):
        try:
            pattern = re.compile(layers)
        except re.error as problem:
            raise ValueError(f"layers={layers!r} is no regular expression: {problem}.") from None
        return lambda name: pattern.search(name) is not None
    if callable(layers):
        return layers
    raise TypeError(f"layers wants a regular expression or a function of the module name, got {layers!r}.")


def _no_layer(models: Sequence[nn.Module], method: AttnMethod, layers: LayerFilter | None) -> str:
    there = [info for model in models for info, _ in family_of(model).layers(model)]
    some = ", ".join(f"{info.name} ({info.role}, level {info.level})" for info in there[:4]) or "none"
    narrowed = "" if layers is None else f" within layers={layers!r}"
    return (
        f"no layer for {method.name!r}: it wants {' or '.join(method.roles)} attention{narrowed}; "
        f"{', '.join(sorted({type(model).__name__ for model in models}))} has {len(there)} layers: {some}"
        f"{' ...' if len(there) > 4 else ''}. Change the settings or layers=..."
    )


def _family_or_none(model: nn.Module) -> Family | None:
    try:
        return family_of(model)
    except UnsupportedModel:
        return None
