"""Dual-scope attention: temporal layers that were trained on short clips make films of any length.

A frame attends to a window of near frames, as long as the clips the model was trained on, and to a few anchor frames from
all over the film (`ops.scopes`). The window keeps motion smooth and within what the model knows; the anchors keep things
what they are. Early steps, which lay out the film, favour the anchors. Source: Tan et al., Video-Infinity (arXiv 2406.16260),
section 3.3, where the first fifth of the steps does so and the rest favours the window. Then things drift from window to
window; so here the first two fifths do, in which tints are settled, too, and the rest favours nothing.

A film no longer than the window is left to the stock attention: the pipeline with this processor is the stock one, bit for
bit. `long_video` also takes the film through the model a clip at a time, so sums are in another order: from the same noise it
equals the stock pipeline to rounding (1e-5 in fp32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from .compat import BackendUnavailable
from .families import family_of
from .method import AttnMethod, LayerInfo, coerce
from .ops.positions import own_slots, slot_tables
from .ops.scopes import Clip, Scopes, TokenScale, scoped_attention

if TYPE_CHECKING:
    from .context import Context
    from .layer import LayerCall

__all__ = ["DualScopeAttnProcessor", "ScopePhase"]

NAME = "dual-scope"
ROUNDING = 1e-6  # progress is a quotient of step numbers
LIMIT = 1e4  # of a bias; beyond it nothing changes


@dataclass(frozen=True, kw_only=True)
class ScopePhase:
    """What is favoured during one stretch of the denoising steps. Raises ValueError for a value outside its range."""

    until: float = 1.0  # end of the stretch, as a fraction of all steps in (0, 1]
    window: float = 0.0  # added to the logits of near frames; more = smoother motion, looser likeness over the film
    anchors: float = (
        0.0  # added to the logits of the anchors; more = the film keeps to them; only the difference counts
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(ScopePhase)
        for field in fields(self):
            object.__setattr__(self, field.name, coerce(getattr(self, field.name), hints[field.name], field.name))
        if not 0 < self.until <= 1:
            raise ValueError(
                f"until must be in (0, 1], got {self.until}. It is a fraction of the steps: give 0.2 for step 10 of 50."
            )
        for name in ("window", "anchors"):
            if not abs(getattr(self, name)) <= LIMIT:
                raise ValueError(f"{name} must be a number from {-LIMIT:g} to {LIMIT:g}, got {getattr(self, name)}.")


PHASES = (ScopePhase(until=0.4, anchors=10.0), ScopePhase(until=1.0))


@dataclass(frozen=True, kw_only=True)
class DualScopeAttnProcessor(AttnMethod):
    """Attention between frames in a window and a few anchors, in the temporal layers of AnimateDiff.

    Raises ValueError for a number outside its range, TypeError for a value of the wrong type.
    """

    window: int | None = None  # frames a frame sees around itself, itself included; None: `train_frames`
    anchors: int = 16  # frames from all over the film that every frame sees; more = things stay alike, slower
    train_frames: int = 16  # frames of the clips the model was trained on
    token_scale: TokenScale = "none"  # sharpen the softmax where more frames are seen than in training
    phases: tuple[ScopePhase, ...] | None = None  # what is favoured when; None: the anchors, in the first two fifths

    name: ClassVar[str] = NAME
    roles: ClassVar[tuple[str, ...]] = ("temporal",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 frame, got {self.window}; 16 suits AnimateDiff.")
        if self.anchors < 0:
            raise ValueError(f"anchors must not be negative, got {self.anchors}; 0 means the window alone.")
        if self.train_frames < 2:
            raise ValueError(f"train_frames must be at least 2, got {self.train_frames}; 16 suits AnimateDiff.")
        ends = [phase.until for phase in self.schedule]
        if not ends or ends[-1] != 1 or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(
                f"phases must have growing ends, the last at 1.0, got until = {ends}. Give for example "
                "ScopePhase(until=0.2, anchors=10), ScopePhase()."
            )

    @property
    def schedule(self) -> tuple[ScopePhase, ...]:
        """The phases that run."""
        return PHASES if self.phases is None else self.phases

    @property
    def length(self) -> int:
        """L, frames of a window."""
        return self.train_frames if self.window is None else self.window

    def scopes(self, frames: int) -> Scopes:
        """Who sees whom in a film of so many frames."""
        return Scopes(frames, self.length, self.anchors)

    @property
    def phased(self) -> bool:
        """True if the favour changes, so that the timestep matters."""
        return len({phase.window - phase.anchors for phase in self.schedule}) > 1

    def phase(self, progress: float) -> int:
        """Index of the phase at `progress`; a phase ends just before the step at its `until`."""
        ends = [phase.until for phase in self.schedule]
        return next((i for i, end in enumerate(ends) if progress < end - ROUNDING), len(ends) - 1)

    def patches(self, model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
        """The tables of places add nothing while we put the places in ourselves."""
        return family_of(model).places(model, self)

    def prepare(self, context: Context) -> None:
        """A film that fits into the window, whole, is left to the stock layers."""
        scopes = self.scopes(context.frames if context.clip is None else context.clip.frames)
        if context.clip is not None and context.clip.own[1] - context.clip.own[0] != context.frames:
            raise ValueError(
                f"this rank owns frames {context.clip.own[0]} to {context.clip.own[1]}, but the model was called with "
                f"{context.frames}; pass num_frames={context.clip.own[1] - context.clip.own[0]}."
            )
        for installation in context.installations:
            if installation.method is self:
                for swap in installation.swaps:
                    swap.ours.idle = context.clip is None and scopes.single
                    if not swap.ours.idle:
                        _check_backend(swap.ours._attention_backend, swap.info.name)

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        """Attention of one layer, (N, f, heads * head_dim)."""
        table = getattr(call, "table", None)
        context, frames = call.context, call.x.shape[1]
        clip = context.clip
        scopes = self.scopes(frames if clip is None else clip.frames)
        own = (0, frames) if clip is None else clip.own
        x, tables = call.x, None
        if table is not None:
            self._check_table(call, table)
            x = self.placed(call)
            tables = slot_tables(table[: min(scopes.length, scopes.frames)].to(x.dtype), call.to_k, call.to_v)
        q = call.to_q(x)
        if self.token_scale != "none":
            sharp = [scopes.sharpness(i, self.train_frames, self.token_scale) for i in range(*own)]
            q = q * torch.tensor(sharp, device=q.device, dtype=q.dtype).view(-1, 1, 1)
        near, far = share(torch.stack([call.k, call.v]), scopes, clip, call.name)
        now = self.schedule[phase]
        out = scoped_attention(
            q, (near[0], near[1]), (far[0], far[1]), scopes, own,
            scale=call.scale, biases=(now.window, now.anchors), tables=tables,
        )  # fmt: skip
        return out.flatten(2)

    def placed(self, call: LayerCall) -> Tensor:
        """The tokens with the places of their frames, as they would be in one training clip; same shape as `call.x`."""
        table, clip = getattr(call, "table", None), call.context.clip
        if table is None:
            return call.x
        frames = call.x.shape[1]
        scopes = self.scopes(frames if clip is None else clip.frames)
        own = (0, frames) if clip is None else clip.own
        return call.x + table.to(call.x.dtype)[own_slots(scopes, own, call.x.device)]

    def _check_table(self, call: LayerCall, table: Tensor) -> None:
        attn = call._attn
        if self.length > len(table):
            raise ValueError(
                f"layer {call.name!r}: a window of {self.length} frames needs as many places, this model has "
                f"{len(table)}; choose window={min(self.train_frames, len(table))}."
            )
        if self.length > self.train_frames:
            call.context.warn_once(
                (NAME, "window"),
                f"a window of {self.length} frames is longer than the {self.train_frames} of the training clips; places "
                "beyond them were never trained.",
            )
        if getattr(attn, "norm_k", None) is not None:
            raise ValueError(f"layer {call.name!r} normalises its keys, so places cannot be added to them afterwards.")

    def outlook(self, context: Context, layers: Sequence[LayerInfo]) -> str:
        """What a frame sees."""
        return (
            f"{NAME}: each frame sees {self.length} near frames and {self.anchors} anchors, at a cost per frame that does "
            f"not grow with the film; up to {self.length} frames the stock layers run"
        )


def share(both: Tensor, scopes: Scopes, clip: Clip | None, layer: str) -> tuple[Tensor, Tensor]:
    """Keys and values of the frames this rank's windows reach, and of the anchors.

    both: keys and values of its own frames, (2, N, f, h, d) -> (2, N, r, h, d), (2, N, G, h, d).
    """
    if clip is None or clip.comm.size == 1:
        return both, both[:, :, list(scopes.anchors)]
    comm = clip.comm
    comm.place = layer
    near = comm.collect(both, clip.parts, [scopes.reach(part) for part in clip.parts], dim=2)
    mine = [frame - clip.own[0] for frame in scopes.anchors if clip.own[0] <= frame < clip.own[1]]
    owners = [scopes.anchors_in(part) for part in clip.parts]
    count = len(scopes.anchors)
    far = comm.collect(both[:, :, mine], owners, [(0, count)] * comm.size, dim=2)
    return near, far


def _check_backend(wanted: Any, layer: str) -> None:
    if wanted is not None and "native" not in str(getattr(wanted, "value", wanted)):
        raise BackendUnavailable(
            f"layer {layer!r} was given the attention backend {getattr(wanted, 'value', wanted)!r}, but dual-scope attention "
            "needs every weight of the softmax and runs as 'native' alone; call model.set_attention_backend('native')."
        )
