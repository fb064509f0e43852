"""How much memory a training takes at full size, found on the meta device: nothing is downloaded, nothing is allocated.

The model is built without numbers and split into its two roles by the same code that trains, so weights, gradients and
moments are counted, not estimated. Activations are what autograd would keep of one forward of the student, where an attention
keeps q, k, v and its output, as fused kernels do; scratch space and the allocator's gaps come on top. In 16 bits autocast
keeps a copy of every trained weight during that forward, of all of them on every process, also where they are shared. Text
encoders and VAE are not counted: they leave the device before the first step, unless pictures are made in between.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attn_processors import AttnMethod, LayerCall
from .config import DistillConfig
from .losses import matched_layers
from .optimizers import STATE_BYTES
from .roles import TwoRoles

__all__ = ["MemoryPlan", "known_models", "memory_plan"]

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLUX = ("FluxTransformer2DModel", {"guidance_embeds": True})
SD35: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64,
    "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
}  # fmt: skip
LARGE = SD35 | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
MEDIUM = SD35 | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {  # hub id -> class and the arguments its config.json has
    "black-forest-labs/FLUX.1-dev": FLUX,
    "stabilityai/stable-diffusion-3.5-large": ("SD3Transformer2DModel", LARGE),
    "stabilityai/stable-diffusion-3.5-medium": ("SD3Transformer2DModel", MEDIUM),
}
VAE_FACTOR = 8  # of all of these


def known_models() -> list[str]:
    """Hub ids whose architecture is known here, without a download."""
    return list(KNOWN)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one process. `total` leaves out kernels' scratch space."""

    model: str
    parameters: int  # of the denoiser
    trained: int  # of the student
    processes: int
    frozen_bytes: int
    trained_bytes: int  # fp32
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activation_bytes: int
    copy_bytes: int  # of trained weights, in 16 bits, by autocast
    two_models_bytes: int  # the same where the teacher is a second model; what full copies train the student has once

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, optimiser."""
        return self.frozen_bytes + self.trained_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.average_bytes + self.activation_bytes + self.copy_bytes

    @property
    def ratio(self) -> float:
        """State against that of two models."""
        return self.state_bytes / self.two_models_bytes

    def to_json(self) -> str:
        more = {"state_bytes": self.state_bytes, "total_bytes": self.total_bytes, "ratio": round(self.ratio, 4)}
        return json.dumps({**dataclasses.asdict(self), **more})

    def __str__(self) -> str:
        rows = [
            ("frozen weights", self.frozen_bytes),
            ("trained weights, fp32", self.trained_bytes),
            ("gradients", self.gradient_bytes),
            ("optimiser", self.optimizer_bytes),
            ("averaged weights", self.average_bytes),
            ("activations", self.activation_bytes),
            ("16-bit copies of trained", self.copy_bytes),
            ("in all", self.total_bytes),
        ]
        table = "\n".join(f"  {name:24}{size / GIB:8.1f} GiB" for name, size in rows)
        share = f"on each of {self.processes} processes" if self.processes > 1 else "on one process"
        return (
            f"{self.model}: {self.parameters / 1e9:.2f} billion parameters, {self.trained / 1e9:.2f} trained; {share}\n{table}\n"
            f"  weights, gradients and optimiser: {self.ratio:.2f} of a recipe with two models "
            f"({self.two_models_bytes / GIB:.1f} GiB)"
        )


def memory_plan(config: DistillConfig, *, size: tuple[int, int] = (1024, 1024), text_length: int = 512,
                processes: int = 1) -> MemoryPlan:  # fmt: skip
    """What `config` takes.

    Args:
        config: the training; its model is a local diffusers folder, a bundled model, or one of `known_models()`.
        size: width and height of the samples, in pixels.
        text_length: text tokens of a sample.
        processes: how many share the work; with parallel="fsdp" they share the state as well.

    Raises:
        ValueError: for a model that is none of these, or is no transformer with joint attention.
    """
    model = _on_meta(config.model)
    number = BYTES[config.precision]
    method = config.method
    own = {name: value.numel() for name, value in model.named_parameters()}
    parameters = sum(own.values())
    roles = TwoRoles(model, method, layers=config.layers, projections=config.projections, rank=config.rank)
    learned = roles.trained()
    trained = sum(value.numel() for value in learned.values())
    replaced = sum(value.numel() for name, value in learned.items() if name in own)  # by full copies
    activations = _activations(model, roles, config, size, text_length)
    share = processes if config.parallel == "fsdp" else 1
    counted = {
        "frozen_bytes": parameters * number // share,
        "trained_bytes": trained * 4 // share,
        "gradient_bytes": trained * 4 // share,
        "optimizer_bytes": trained * STATE_BYTES[config.optimizer] // share,
    }
    return MemoryPlan(
        model=config.model, parameters=parameters, trained=trained, processes=processes, **counted,
        average_bytes=trained * 4 // share if config.ema else 0,
        activation_bytes=activations,
        copy_bytes=trained * number if number < 4 else 0,
        two_models_bytes=sum(counted.values()) + (parameters - replaced) * number // share,
    )  # fmt: skip


def _on_meta(name: str) -> nn.Module:
    """The denoiser without numbers."""
    import diffusers

    from ..pipelines.load import bundled

    folder = bundled().get(name, Path(name).expanduser()) / "transformer" / "config.json"
    if folder.is_file():
        values: Mapping[str, Any] = json.loads(folder.read_text())
        kind = str(values.get("_class_name"))
    elif name in KNOWN:
        kind, values = KNOWN[name]
    else:
        raise ValueError(
            f"the architecture of {name!r} is not here: it is no folder with transformer/config.json, and none of "
            f"{', '.join(KNOWN)}; download it, or plan one of these"
        )
    if kind not in ("FluxTransformer2DModel", "SD3Transformer2DModel"):
        raise ValueError(f"{name} has a {kind}; planned are FluxTransformer2DModel and SD3Transformer2DModel")
    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(dict(values)).eval()


def _activations(
    model: nn.Module, roles: TwoRoles, config: DistillConfig, size: tuple[int, int], text_length: int
) -> int:
    """Bytes that autograd keeps of one forward of the student and of the taps of both roles."""
    dtype = getattr(torch, config.precision)
    nn.Module.to(model, dtype)  # as autocast computes; not the method of diffusers, which warns
    batch, flux = config.micro_batch, type(model).__name__.startswith("Flux")
    cell = 2 * VAE_FACTOR if flux else VAE_FACTOR * model.config.patch_size
    height, width = size[1] // cell, size[0] // cell
    blocks = [block for blocks in model.children() if isinstance(blocks, nn.ModuleList) for block in blocks]
    kept = [0] * (len(blocks) + 1)  # by block; the last for what is outside of blocks
    inputs = [0] * len(blocks)

    def made(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    call: dict[str, Any] = {
        "encoder_hidden_states": made(batch, text_length, model.config.joint_attention_dim),
        "pooled_projections": made(batch, model.config.pooled_projection_dim),
        "timestep": made(batch),
    }
    if flux:
        call |= {
            "hidden_states": made(batch, height * width, model.config.in_channels),
            "img_ids": made(height * width, 3),
        }
        call |= {"txt_ids": made(text_length, 3), "guidance": made(batch) if model.config.guidance_embeds else None}
    else:
        call["hidden_states"] = made(batch, model.config.in_channels, size[1] // VAE_FACTOR, size[0] // VAE_FACTOR)
    ((context, _),) = roles.handle.parts
    context.close()  # it reads numbers, and there are none
    context.grids, context.text, context.batch = {height * width: (height, width)}, text_length, batch
    roles.use(_Fused())
    with roles.student(), _counted(model, blocks, kept, inputs):
        model(**call)
    tokens, width_of = height * width + text_length, model.inner_dim
    taps = 2 * len(matched_layers(roles.layers, config.match)) if config.attention_weight else 0
    each = batch * tokens * width_of * dtype.itemsize
    if config.checkpointing:
        return sum(inputs) + max(kept[:-1]) + kept[-1] + taps * each
    return sum(kept) + taps // 2 * each  # the student's taps are kept anyway


class _Kept(torch.autograd.Function):
    """What a fused attention leaves for backward, without the attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return grad, grad, grad


@dataclass(frozen=True, kw_only=True)
class _Fused(AttnMethod):
    name: ClassVar[str] = "fused"
    roles: ClassVar[tuple[str, ...]] = ("spatial", "joint")

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        return _Kept.apply(call.q, call.k, call.v).flatten(2)


@contextmanager
def _counted(model: nn.Module, blocks: list[nn.Module], kept: list[int], inputs: list[int]) -> Iterator[None]:
    """Count the bytes that autograd saves, each storage once, without parameters."""
    now = [len(blocks)]
    parameters = {value.untyped_storage()._cdata for value in model.parameters()}
    seen: dict[int, Any] = {}  # keeps storages alive, so that no id comes twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and storage._cdata not in parameters:
            seen[storage._cdata] = storage
            kept[now[0]] += storage.nbytes()
        return tensor

    def enter(number: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            now[0] = number
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 3]
            inputs[number] = sum(value.nbytes for value in given)

        return hook

    hooks = [block.register_forward_pre_hook(enter(i), with_kwargs=True) for i, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(lambda *_: now.__setitem__(0, len(blocks))) for block in blocks]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        for hook in hooks:
            hook.remove()
