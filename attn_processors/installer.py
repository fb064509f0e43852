"""Install and undo: per module, on this instance only, and back to the very same objects.

`install` first makes the whole plan (which layers, is anything in the way) and only then touches the model, so an error
leaves everything as it was. What was done is recorded on the context of each denoiser; a `Handle` is a view of that.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .context import Context, Installation, Patch, Swap, context_of
from .families import Family, UnsupportedModel, family_of
from .layer import LayerProcessor
from .method import AttnMethod, LayerInfo
from .report import LayerReport, Report

log = logging.getLogger(__name__)

DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "decoder")
LayerFilter = str | re.Pattern | Callable[[str], bool]
Plan = dict[AttnMethod, list[tuple[LayerInfo, nn.Module]]]


class Displaced(RuntimeError):
    """Somebody replaced our processors behind our back."""


@dataclass(frozen=True, eq=False)
class Handle:
    """What one `install` did. Handles of different layers may be removed in any order; `remove` twice is harmless."""

    parts: tuple[tuple[Context, Installation], ...]

    def report(self) -> Report:
        methods = {item.method: {"name": item.method.name, **item.method.settings()} for _, item in self.parts}
        layers = [
            LayerReport(
                model=type(context.model).__name__,
                method=item.method.name,
                state=_state(context, item, swap),
                **dataclasses.asdict(swap.info),
            )
            for context, item in self.parts
            for swap in item.swaps
        ]
        outlooks = (item.method.outlook(context, [swap.info for swap in item.swaps]) for context, item in self.parts)
        return Report(
            methods=tuple(methods.values()), layers=tuple(layers), outlook=tuple(line for line in outlooks if line)
        )

    def verify(self) -> None:
        """Raise Displaced if a layer does not carry ours any more (attention slicing and others replace processors)."""
        lost = [layer for layer in self.report().layers if layer.state not in ("active", "neutral")]
        if lost:
            raise Displaced(
                f"{len(lost)} of {len(self.report().layers)} layers do not run ours any more: {lost[0].name!r} is "
                f"{lost[0].state}; undo what replaced it (for example disable_attention_slicing()), then remove this "
                "handle and install again."
            )

    def remove(self) -> None:
        """Put the original processor objects back, wherever ours is still in place; the last handle takes the hook."""
        for context, item in reversed(self.parts):
            if item in context.installations:
                undo(context, item)


def install(target: Any, processor: Any, *, layers: LayerFilter | None = None, **settings: Any) -> Handle:
    """Put attention processors of ours into a stock pipeline or model.

    target: a pipeline (its denoisers: a ControlNet beside the UNet stays stock, `install(pipe.controlnet, ...)`
        gives it its own), or a model, which has no scheduler: methods with phases then go by the timestep itself.
    processor: AgentAttnProcessor(...) or another method, or its short name with `settings`, or a list of these for
        different layers.
    layers: narrows the layers the method wants: a regular expression searched in the module name, or a function of it.

    Raises TypeError or ValueError with one sentence if the model class is not supported, no layer matches, a layer
    carries somebody else's processor or already one of ours; nothing is changed then.
    """
    plans = plan(target, resolve(processor, settings), layers)
    return apply(plans, None if isinstance(target, nn.Module) else target)


@contextmanager
def installed(target: Any, processor: Any, **settings: Any) -> Iterator[Handle]:
    """`install` for the length of a with block; takes the same arguments. The block must enclose `backward()`."""
    handle = install(target, processor, **settings)
    try:
        yield handle
    finally:
        handle.remove()


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


def replace(target: Any, methods: Sequence[AttnMethod], layers: LayerFilter | None = None, pipe: Any = None) -> Handle:
    """Install in place of everything of ours that is there; if that cannot be done, what is there stays."""
    plans = plan(target, methods, layers, replacing=True)
    for model, _ in plans:
        remove_all(model)
    return apply(plans, pipe)


def remove_all(model: nn.Module) -> None:
    """Undo every installation on one denoiser, also where the handle is lost (as on a deep copy)."""
    if (context := context_of(model)) is not None:
        for item in reversed(tuple(context.installations)):
            undo(context, item)


def apply(
    plans: Sequence[tuple[nn.Module, Plan]], pipe: Any = None, parameters: Mapping[str, nn.Parameter] | None = None
) -> Handle:
    """Carry out plans; after an error nothing of them remains.

    parameters: by name in the denoiser, put in place of its own until removal (the original objects come back); a name
        the denoiser lacks is a new parameter, which its layer finds by `LayerCall.extra`.
    """
    parts: list[tuple[Context, Installation]] = []
    try:
        for model, chosen in plans:
            for method, layers in chosen.items():
                if layers:
                    context = context_of(model) or Context(model, family_of(model))
                    if pipe is not None:
                        context.pipeline = type(context.pipeline)(pipe)
                    item = Installation(method)
                    context.installations.append(item)
                    parts.append((context, item))
                    _fill(context, item, layers, parameters or {})
    except BaseException:
        Handle(tuple(parts)).remove()
        raise
    return Handle(tuple(parts))


def undo(context: Context, item: Installation) -> None:
    """Take one installation back, in reverse order, and only where ours is still in place."""
    context.adopt()
    for hook in item.hooks:
        hook.remove()
    for patch in reversed(item.patches):
        _take_back(patch)
    left = [swap.info.name for swap in reversed(item.swaps) if not _put_back(swap)]
    for swap in item.swaps:  # somebody may still hold ours and set it again: then it is the stock layer
        swap.ours.retired = swap.ours.neutral = True
    if left:
        log.warning("left %d layers alone, whose processors somebody replaced: %s", len(left), ", ".join(left[:3]))
    context.installations.remove(item)
    if not context.installations:
        context._hook.remove()


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


def _fill(
    context: Context,
    item: Installation,
    layers: list[tuple[LayerInfo, nn.Module]],
    parameters: Mapping[str, nn.Parameter],
) -> None:
    for info, module in layers:
        stock = module.processor
        if isinstance(stock, LayerProcessor):  # a retired one
            stock = stock.stock
        ours = context.family.layer_of(module)(item.method, context, info.name, info.level, stock)
        for attribute in ("_attention_backend", "_parallel_config"):
            if getattr(stock, attribute, None) is not None:
                setattr(ours, attribute, getattr(stock, attribute))
        item.swaps.append(Swap(info, module, ours))
        module.set_processor(ours)
    replaced = []
    for name, parameter in parameters.items():
        path, _, attribute = name.rpartition(".")
        replaced.append((context.model.get_submodule(path), attribute, parameter))
    for triple in [*item.method.patches(context.model), *replaced]:
        item.patches.append(_patch(*triple))
    item.hooks += item.method.hooks(context)


def _patch(module: Any, attribute: str, replacement: Any) -> Patch:
    stores = ("__dict__", "_modules", "_parameters", "_buffers")
    own = any(attribute in getattr(module, store, {}) for store in stores)
    patch = Patch(module, attribute, replacement, getattr(module, attribute, None), own)
    setattr(module, attribute, replacement)
    return patch


def _take_back(patch: Patch) -> None:
    """Put the original back where ours is still in place."""
    if getattr(patch.module, patch.attribute, None) is patch.replacement:
        before, now = patch.original, patch.replacement
        if isinstance(before, nn.Parameter) and isinstance(now, nn.Parameter):
            before.data = before.data.to(now.device, now.dtype)  # it missed a move of the model meanwhile
        if patch.own:
            setattr(patch.module, patch.attribute, patch.original)
        else:
            delattr(patch.module, patch.attribute)


@contextmanager
def patched(triples: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """(object, attribute, replacement) triples, in place for the length of a with block."""
    done: list[Patch] = []
    try:
        done.extend(_patch(*triple) for triple in triples)
        yield
    finally:
        for patch in reversed(done):
            _take_back(patch)


def _put_back(swap: Swap) -> bool:
    if swap.module.processor is not swap.ours:
        return swap.module.processor is swap.ours.stock
    for attribute in ("_attention_backend", "_parallel_config"):
        if hasattr(swap.ours.stock, attribute):
            setattr(swap.ours.stock, attribute, getattr(swap.ours, attribute))
    swap.module.set_processor(swap.ours.stock)
    return True


def _state(context: Context, item: Installation, swap: Swap) -> str:
    if item not in context.installations:
        return "removed"
    context.adopt()
    if swap.module.processor is not swap.ours:
        return f"replaced by {type(swap.module.processor).__name__}"
    return "neutral" if swap.ours.neutral else "active"


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
