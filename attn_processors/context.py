"""The context: what all layers of one denoiser have in common while it runs.

It is itself the forward pre-hook of the denoiser's root, so it learns grid and timestep whoever calls the model, and a
deep copy or a pickle of the model carries its own context, linked to its own layers. It is overwritten by the next
forward and never cleared: gradient checkpointing recomputes layers after the forward has returned.

Everything that depends on the step is decided here, outside compiled regions. Layers read integers and tensors only.
"""

from __future__ import annotations

import math
import warnings
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .compat import require_backend
from .families import UnsupportedModel
from .layer import LayerProcessor
from .method import AttnMethod, LayerInfo
from .tile_order import TileOrder

if TYPE_CHECKING:
    from .families import Family
    from .ops.layout import Order
    from .ops.scopes import Clip
    from .ops.strips import Strip

TRAIN_STEPS = 1000  # of the schedule, where no pipeline tells


class PipelineRef:
    """A weak reference to a pipeline: it follows a deep copy of the whole pipeline, and is empty after pickling."""

    def __init__(self, pipe: Any = None):
        self._ref = None if pipe is None else weakref.ref(pipe)

    def __call__(self) -> Any:
        return None if self._ref is None else self._ref()

    def __deepcopy__(self, memo: dict) -> PipelineRef:
        pipe = self()
        return PipelineRef(memo.get(id(pipe), pipe))

    def __reduce__(self) -> tuple:
        return PipelineRef, ()


@dataclass(eq=False)
class Swap:
    """One layer in our hands. The processor that was there is `ours.stock`."""

    info: LayerInfo
    module: nn.Module
    ours: LayerProcessor


@dataclass(eq=False)
class Patch:
    """One attribute of one object, nearly always a module, in our hands."""

    module: Any
    attribute: str
    replacement: Any
    original: Any
    own: bool  # False: the original came from the class, so removal deletes ours


@dataclass(eq=False)
class Installation:
    """One method on one denoiser: what has to be undone."""

    method: AttnMethod
    swaps: list[Swap] = field(default_factory=list)
    patches: list[Patch] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)  # with `remove`


class Context:
    """Shared by every layer of ours in one denoiser; see the module docstring.

    Refreshed by every call of the denoiser:
        grids: token count -> (height, width), for every level of the model
        text: tokens of text that attend together with the picture's (0 where text has layers of its own)
        references: tokens of reference pictures, or of filling, that follow the picture's own, in models that have them
        batch, frames: rows of the call, and pictures per row (1 for images)
        clip: this rank's frames, where a film is worked on in parts; None = it is whole
        rows: the pictures of the batch that a layer works on, where they come in clips; None = all
        strip: this rank's rows of the grid, where the picture is split over ranks; None = it is whole
        order: how the picture's tokens follow each other in the layers; the model is called with raster order
        device: of the call
        timestep: as it was passed, never converted here; times `timestep_unit` it is the scheduler's
    `slots` holds what methods keep between `prepare` and their layers, under a key of their own. It is not copied with
    the model.
    """

    def __init__(self, model: nn.Module, family: Family, pipe: Any = None):
        self.model, self.family, self.pipeline = model, family, PipelineRef(pipe)
        self.installations: list[Installation] = []
        self.grids: dict[int, tuple[int, int]] = {}
        self.text, self.references = 0, 0
        self.strip: Strip | None = None
        self.order: Order = "raster"
        self.clip: Clip | None = None
        self.rows: tuple[int, int] | None = None
        self.batch, self.frames = 0, 1
        self.device = torch.device("cpu")
        self.timestep: Tensor | float | None = None
        self.timestep_unit = 1
        self.slots: dict[Any, Any] = {}
        self._warned: set[Any] = set()
        self._schedule: Tensor | None = None  # the scheduler's own object, and its values
        self._values: list[float] = []
        self._last = 0
        self._position: tuple[float, int | None] | None = None
        self._hooks = [model.register_forward_pre_hook(self, with_kwargs=True)]
        self._reorders = False

    # -- what methods may ask (outside compiled regions) --------------------------------------------------------------

    def progress(self) -> float:
        """How far the denoising is, in [0, 1): the place of this timestep among the pipeline's, else 1 - t / 1000."""
        return self._locate()[0]

    def step(self) -> int | None:
        """Index of this timestep in `pipe.scheduler.timesteps`; None for a bare model or an unknown timestep."""
        return self._locate()[1]

    def reset(self) -> None:
        """Forget what methods kept and where the last run was."""
        self.slots.clear()
        self._last, self._position = 0, None

    def let_reorder(self) -> None:
        """Hook the model so that its tokens can be in tile order, where its family can."""
        if not self._reorders:
            tiles = TileOrder(self)
            with suppress(UnsupportedModel):
                self._hooks += self.family.rearrange(self, tiles.take, tiles.join)
                self._reorders = True

    def close(self) -> None:
        """Leave the model."""
        for hook in self._hooks:
            hook.remove()

    # -- the hook -----------------------------------------------------------------------------------------------------

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.family.read(self, args, kwargs)
        self.order = "tile" if self._reorders and self._tiles_pay() else "raster"
        self._position = None
        if not torch.compiler.is_compiling():
            self.adopt()
            self._check_backend()
        for installation in self.installations:
            method = installation.method
            if method.phased:
                phase = method.phase(self.progress())
                for swap in installation.swaps:
                    swap.ours.phase = phase
            method.prepare(self)

    def _tiles_pay(self) -> bool:
        """Whether a method gains by tile order in this call, and none minds. Training has the order of its teacher."""
        methods = [item.method for item in self.installations]
        neutral = any(swap.ours.neutral for item in self.installations for swap in item.swaps)
        calm = not (neutral or torch.is_grad_enabled() or torch.compiler.is_compiling())
        whole = self.strip is None and len(self.grids) == 1
        return calm and whole and all(m.any_order for m in methods) and any(m.wants_tiles for m in methods)

    def adopt(self) -> None:
        """Put ours back where diffusers rebuilt it without settings (loading or unloading an IP-Adapter does)."""
        for installation in self.installations:
            for swap in installation.swaps:
                found = swap.module.processor
                if found is not swap.ours and isinstance(found, LayerProcessor) and found.method is None:
                    if found._attention_backend is not None:
                        swap.ours._attention_backend = found._attention_backend
                    swap.module.set_processor(swap.ours)

    def warn_once(self, key: Any, message: str) -> None:
        if key not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(key)
            warnings.warn(message, stacklevel=3)

    def _check_backend(self) -> None:
        for wanted in {swap.ours._attention_backend for item in self.installations for swap in item.swaps}:
            require_backend(wanted, self.device)

    def _locate(self) -> tuple[float, int | None]:
        if self._position is None:
            self._position = self._find(self._timestep_value())
        return self._position

    def _timestep_value(self) -> float:
        if not isinstance(self.timestep, Tensor):
            return float(self.timestep or 0)
        values = self.timestep.flatten().tolist()  # the one read per call
        if min(values) != max(values):
            raise ValueError(
                f"the rows of this call are at different timesteps ({min(values):g} to {max(values):g}), but a method "
                "with phases needs one; give every call one timestep, or install a method without phases."
            )
        return float(values[0])

    def _find(self, value: float) -> tuple[float, int | None]:
        steps = self._as_passed(self._scheduled())
        for start in (self._last, 0):  # at or after the last one; if it went back, from the start
            for index in range(start, len(steps)):
                if math.isclose(steps[index], value, rel_tol=1e-4, abs_tol=1e-4):
                    self._last = index
                    return index / len(steps), index
        total = getattr(getattr(getattr(self.pipeline(), "scheduler", None), "config", None), "num_train_timesteps", 0)
        return min(max(1 - value * self.timestep_unit / (total or TRAIN_STEPS), 0.0), 1 - 1e-6), None

    def _as_passed(self, steps: list[float]) -> list[float]:
        """The scheduler's timesteps as the model gets them: in its unit, and rounded as its half precision rounds."""
        if self.timestep_unit == 1 or not isinstance(self.timestep, Tensor):
            return [step / self.timestep_unit for step in steps]
        return torch.tensor(steps).to(self.timestep.dtype).div(self.timestep_unit).tolist()

    def _scheduled(self) -> list[float]:
        """Timesteps of the pipeline this denoiser is in, read at call time because people change schedulers."""
        pipe = self.pipeline()
        parts = () if pipe is None else vars(pipe).values()
        if not any(part is self.model or getattr(part, "_orig_mod", None) is self.model for part in parts):
            return []
        schedule = getattr(pipe.scheduler, "timesteps", None)
        if schedule is not self._schedule:
            self._schedule, self._last = schedule, 0
            self._values = [] if schedule is None else [float(value) for value in schedule]
        return self._values

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: links and settings, without what single calls left behind."""
        passing: dict[str, Any] = {
            "timestep": None,
            "slots": {},
            "_schedule": None,
            "_values": [],
            "_position": None,
            "_last": 0,
        }
        return self.__dict__ | passing


def context_of(model: nn.Module) -> Context | None:
    """The context hooked into `model`, if any."""
    return next((hook for hook in model._forward_pre_hooks.values() if isinstance(hook, Context)), None)
