"""Install and undo: per module, on this instance only, and back to the very same objects.

`install` has the whole plan made first (`planning`) and only then touches the model, so an error leaves everything as it
was. What was done is recorded on the context of each denoiser; a `Handle` is a view of that.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .context import Context, Installation, Patch, Swap, context_of
from .families import family_of
from .layer import LayerProcessor
from .method import AttnMethod, LayerInfo
from .planning import LayerFilter, Plan, plan, resolve
from .report import LayerReport, Report

log = logging.getLogger(__name__)


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
        context.close()


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
    if item.method.wants_tiles:
        context.let_reorder()


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
