"""The folder of a trained linear model: settings of the attention and the parameters that were trained, nothing else.

    linear_config.json      format, the method with its settings, the layers that have it, the class it was trained on, digest
                            of the tensors
    student.safetensors     parameters by their diffusers names, e.g. transformer_blocks.0.attn.to_q.weight; of a low-rank
                            student its factors, ...to_q.low_rank.down and .up, whose product is added to the weight

`load_linear` puts them into a stock pipeline like any attention: the handle's `remove` brings back the very parameters
that were there. It also reads the weight files published with CLEAR (Liu et al., arXiv 2412.16112), which hold the same
names for FLUX.1-dev, with the map of their pooled keys as `...attn.processor.spatial_weight`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors import ATTN_PROCESSORS, AttnMethod, ClearAttnProcessor, Handle
from ..attn_processors.clear import POOL_WEIGHTS
from ..attn_processors.context import context_of
from ..attn_processors.installer import apply, remove_all
from ..attn_processors.layer import EXTRA
from ..attn_processors.planning import plan, supported
from ..pipelines.files import written_whole
from ..pipelines.load import TINY

__all__ = ["bundled_students", "find_student", "install_linear", "load_linear", "read_linear", "save_linear"]

CONFIG, WEIGHTS = "linear_config.json", "student.safetensors"
FORMAT, VERSION = "reattend linear", 1
PUBLISHED = re.compile(r"local_(\d+)(?:_down_(\d+))?")  # in the names of CLEAR's files: radius and pooling factor
SPATIAL = ".processor.spatial_weight"
DOWN, UP = ".low_rank.down", ".low_rank.up"  # factors (rank, inputs) and (outputs, rank)


def bundled_students() -> dict[str, Path]:
    """The students that come with this package: name and folder."""
    return {path.parent.name: path.parent for path in sorted(TINY.glob(f"*/{CONFIG}"))}


def find_student(path: str | Path) -> Path:
    """The folder of a bundled student of this name, else the path itself, whether there is something or not."""
    return bundled_students().get(str(path), Path(path))


def load_linear(target: Any, path: str | Path, **settings: Any) -> Handle:
    """Install a trained linear attention with its parameters; `Handle.remove()` restores the model exactly.

    Args:
        target: a stock pipeline, or its denoiser; what we installed on it before is removed.
        path: the name of a bundled student, a folder made by `save_linear`, or a safetensors file published with CLEAR.
        settings: replace single settings of the stored method, for example backend="flex"; for a published file whose
            name does not tell them, `radius` and `pool` as well.

    Raises:
        ValueError: for a folder of another format or a damaged file, a model of another class, parameters the model
            does not have or has in another shape.
        FileNotFoundError: if there is nothing at `path`.
    """
    return install_linear(target, read_linear(path, **settings), path)


def install_linear(target: Any, student: tuple[AttnMethod, dict[str, Tensor], str | None, Any], path: Any) -> Handle:
    """As `load_linear`, of what `read_linear` gave; `path` is for messages."""
    method, tensors, trained_on, layers = student
    for model in supported(target):
        if trained_on not in (None, _class_name(model)):
            raise ValueError(f"{path} was trained on a {trained_on}, got a {type(model).__name__}; load that model.")
    plans = plan(target, [method], None if layers is None else frozenset(layers).__contains__, replacing=True)
    ((model, _),) = [part for part in plans if part[1][method]]
    parameters = _parameters(model, tensors, path)
    for other, _ in plans:
        remove_all(other)
    return apply(plans, None if isinstance(target, nn.Module) else target, parameters)


def save_linear(
    folder: str | Path,
    model: nn.Module,
    method: AttnMethod,
    tensors: Mapping[str, Tensor],
    *,
    layers: Sequence[str] | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder that `load_linear` reads, whole or not at all.

    Args:
        folder: made if it is not there.
        model: the denoiser; only its class name is stored.
        method: the attention it was trained with.
        tensors: the trained parameters by their names in `model`.
        layers: names of the layers that have the attention; None = all that the method wants.
        info: what else people should know (base model, steps, licence), JSON-able.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "model": _class_name(model),
        "method": {"name": method.name, **method.settings()},
        "layers": None if layers is None else list(layers),
        "tensors": _digest(whole),
        "info": dict(info or {}),
    }
    with written_whole(folder / WEIGHTS, folder / CONFIG) as (weights, described):
        save_file(whole, weights, metadata={"format": "pt"})
        described.write_text(json.dumps(config, indent=2) + "\n")


def read_linear(
    path: str | Path, **settings: Any
) -> tuple[AttnMethod, dict[str, Tensor], str | None, list[str] | None]:
    """What `load_linear` takes: method, parameters by name, class name of the model it was trained on, names of its layers.

    The last is None where all layers have the method; so are both for a published file.
    """
    path = find_student(path)
    if path.is_file():
        return *_read_published(path, settings), None, None
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"no {CONFIG} and {WEIGHTS} in {path}; give the folder of a distillation run's student."
        )
    try:
        config = json.loads((path / CONFIG).read_text())
    except ValueError as problem:
        raise ValueError(f"{path / CONFIG} is not JSON ({problem}); copy the folder again.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ValueError(f"{path / CONFIG} is not of the format {FORMAT!r} {VERSION}; save it again with save_linear.")
    stored = dict(config["method"])
    name = stored.pop("name")
    if name not in ATTN_PROCESSORS:
        raise ValueError(f"{path} has attention {name!r}, which is not among {', '.join(ATTN_PROCESSORS)}.")
    tensors = _load(path / WEIGHTS)
    if _digest(tensors) != config["tensors"]:
        raise ValueError(f"{path / WEIGHTS} does not hold the tensors {CONFIG} describes; copy the folder again.")
    return ATTN_PROCESSORS[name].from_settings(stored | settings), tensors, config["model"], config.get("layers")


def _read_published(path: Path, settings: dict[str, Any]) -> tuple[AttnMethod, dict[str, Tensor]]:
    """A weight file published with CLEAR: settings from its name, weight maps (1, 1, 1, f, 1, f, 1) -> (f, f)."""
    tensors = {}
    for name, tensor in _load(path).items():
        if name.endswith(SPATIAL):
            side = max(tensor.shape)
            if tensor.numel() != side * side:
                raise ValueError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, no square map of weights.")
            name, tensor = f"{name.removesuffix(SPATIAL)}.{EXTRA}{POOL_WEIGHTS}", tensor.reshape(side, side)
        tensors[name.removeprefix("transformer.")] = tensor
    sides = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(EXTRA + POOL_WEIGHTS)}
    if len(sides) > 1:
        raise ValueError(f"{path} has weight maps of several sides, {sorted(sides)}; a model has one.")
    found = PUBLISHED.search(path.stem)
    stored: dict[str, Any] = {"pool_budget": None, "scale": "tokens_x10", "pool": sides.pop()} if sides else {}
    if found:
        stored["radius"] = float(found[1])
        if found[2] and stored.get("pool") != int(found[2]):
            raise ValueError(f"{path} is named for a pooling factor of {found[2]}, its maps say {stored.get('pool')}.")
    elif "radius" not in settings:
        raise ValueError(f"{path.name} does not tell a radius (as clear_local_8 does); give radius=...")
    return ClearAttnProcessor.from_settings(stored | settings), tensors


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as problem:
        raise ValueError(f"{path} is no whole safetensors file ({problem}); copy it again.") from None


def _parameters(model: nn.Module, tensors: Mapping[str, Tensor], path: Any) -> dict[str, nn.Parameter]:
    """The tensors as parameters on the device and in the type of the ones they replace; checks every name and shape."""
    live, there = dict(model.named_parameters()), _stock(model)
    parameters = {}
    for name, tensor in _merged(there, tensors, path).items():
        layer, _, attribute = name.rpartition(".")
        like = name
        if name not in there and attribute.startswith(EXTRA):
            like = next((key for key in there if key.startswith(layer + ".")), name)
        elif name in there and there[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name!r} has shape {tuple(tensor.shape)}, the model's has {tuple(there[name].shape)}; it was "
                "trained on another model, or this one is quantised."
            )
        if like not in there:
            raise ValueError(
                f"{path}: this {type(model).__name__} has no parameter {name!r}; load the model it was trained on, "
                "without adapters (fuse or unload a LoRA first)."
            )
        now = live[like]  # an original that a student stands in for may have missed a move of the model
        parameters[name] = nn.Parameter(tensor.to(now.device, now.dtype), requires_grad=False)
    return parameters


def _stock(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by name, also those in whose place an installed student's are."""
    found = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in found.items()}
    context = context_of(model)
    for item in reversed(context.installations if context is not None else []):
        for patch in reversed(item.patches):
            name = names.pop(id(patch.replacement), None)
            if name is not None and isinstance(patch.original, nn.Parameter):
                found[name], names[id(patch.original)] = patch.original, name
            elif name is not None:  # one that the student added
                del found[name]
    return found


def _merged(there: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], path: Any) -> dict[str, Tensor]:
    """The tensors with low-rank factors multiplied out and added to the model's own weights."""
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith((DOWN, UP))}
    for name in (name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)):
        own, down, up = there.get(f"{name}.weight"), tensors[name + DOWN], tensors.get(name + UP)
        if own is None or up is None or own.shape != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"{path}: the low-rank factors of {name!r} do not fit this model; load the one it was trained on."
            )
        whole[f"{name}.weight"] = own.detach().cpu().float() + up.float() @ down.float()
    return whole


def _class_name(model: nn.Module) -> str:
    """The stock class; `fully_shard` puts a class of its own before it."""
    from torch.distributed.fsdp import FSDPModule

    return next(cls.__name__ for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        whole.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
