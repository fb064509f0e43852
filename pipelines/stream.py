"""A film through a stock AnimateDiff UNet, a few frames at a time, on one process or many.

The UNet's own `forward` runs once per step on all frames of this rank. What it calls is what we divide:

- modules between the motion modules treat every picture on its own, so they run over *clips* of a few frames;
- a motion module treats every place of the picture on its own, apart from its norm, so it runs over *tiles* of a few places
  with all frames. Its norm takes its statistics in one sweep over the clips first.

Full-length tensors stay where the caller has them (host memory, if the caller keeps the latents there), and only a clip or
a tile is on the model's device at a time. So the working set depends on the clip, not on the film, until a tile is a single
place: that is when a rank has more frames than a clip has places at the finest level (with 16 frames in a clip 65,536 for
pictures of 512 px, 4,096 for 128 px). Beyond, it grows with the frames of a rank.

Over several ranks, each has its own frames; statistics, keys and values go through the same `Comm` that one rank leaves
idle. Which ranks there are changes who computes, never what.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..attn_processors.comm import Comm, Span, rows_sent, split_rows
from ..attn_processors.context import Context, context_of
from ..attn_processors.dual_scope import DualScopeAttnProcessor
from ..attn_processors.families import UnsupportedModel
from ..attn_processors.families.video_unet import VideoUNetFamily
from ..attn_processors.installer import patched
from ..attn_processors.ops.norms import film_statistics, frame_statistics, normalise
from ..attn_processors.ops.scopes import Clip
from ..attn_processors.planning import supported
from .agreement import stop_wanted
from .events import Cancelled, CancelToken
from .offloading import device_of

__all__ = ["CLIP", "PerFrame", "bytes_per_step", "streamed"]

CLIP = 16  # frames on the device at a time
STATISTIC = 16  # bytes of the mean and the squares of one group of one frame


class PerFrame:
    """Stands for a tensor with one row per frame of every row of the batch, made when a clip needs it.

    Pass it to the UNet in place of `encoder_hidden_states`, inside `streamed`.
    """

    def take(self, first: int, end: int) -> Tensor:
        """Rows [first, end) of the tensor; the frames of one row of the batch follow each other."""
        raise NotImplementedError


@contextmanager
def streamed(
    target: Any, frames: int, *, clip: int = CLIP, comm: Comm | None = None, cancel: CancelToken | None = None
) -> Iterator[Clip]:
    """For the length of a with block, the UNet works on this rank's frames of a film, a clip at a time.

    Call the pipeline with `num_frames` of this rank's own, and latents and text of these frames.

    Args:
        target: an AnimateDiff pipeline or its UNet, with dual-scope attention on all temporal layers. A ControlNet of the
            pipeline works on a clip at a time, too; one with motion modules needs the attention as well.
        frames: of the whole film.
        clip: frames on the device at a time; less takes less memory and more time.
        comm: the ranks; None = all of torch.distributed, or just this process.
        cancel: asked before every motion module. Of several ranks all give one, and any that was asked stops all of them.

    Yields:
        the frames of every rank.

    Raises:
        ValueError: temporal layers with other attention, fewer frames than ranks.
        UnsupportedModel: no AnimateDiff UNet.
        RankLost: in the block, if another rank is gone; it is named.
        Cancelled: in the block, on all ranks in the same place.
    """
    comm = Comm.of_group() if comm is None else comm
    if frames < comm.size:
        raise ValueError(f"{frames} frames cannot be split over {comm.size} ranks; use at most {frames} of them.")
    film = Clip(comm, tuple(split_rows(frames, comm.size)))
    models = supported(target)
    net = getattr(target, "controlnet", None)
    if has_motion(net):
        models = [*models, net]
    contexts = [_ready(model) for model in models]
    triples: list[tuple[nn.Module, str, Any]] = []
    for context in contexts:
        triples += _divided(_Work(context, film, clip, cancel))
    if isinstance(net, nn.Module) and not has_motion(net):
        triples.append((net, "forward", _OwnClipWise(net, _Work(contexts[0], film, clip, None))))
    with patched(triples):
        for context in contexts:
            context.clip = film
        try:
            yield film
        finally:
            for context in contexts:
                context.clip = context.rows = None


def has_motion(net: Any) -> bool:
    """Does this ControlNet have motion modules of its own, in which frames meet?"""
    return isinstance(net, nn.Module) and any("motion_modules" in name for name, _ in net.named_modules())


def bytes_per_step(target: Any, film: Clip, grid: tuple[int, int], batch: int) -> list[int]:
    """What each rank sends in one call of the UNet, worked out from the plan alone.

    Args:
        target: as for `streamed`, with its attention installed.
        grid: (H, W) of the latents.
        batch: rows of the call, with guidance twice the films.
    """
    (model,) = supported(target)
    context = _ready(model)
    family: Any = context.family
    method = _method(context)
    scopes, parts = method.scopes(film.frames), film.parts
    size, number = len(parts), next(model.parameters()).element_size()
    reach = [scopes.reach(part) for part in parts]
    owners, everyone = [scopes.anchors_in(part) for part in parts], [(0, len(scopes.anchors))] * size
    whole = [(0, film.frames)] * size
    sides = [grid]
    for _ in model.down_blocks:
        sides.append(((sides[-1][0] + 1) // 2, (sides[-1][1] + 1) // 2))
    layers = [info for info, _ in family.layers(model) if info.role == "temporal"]
    frame = sum(2 * batch * sides[info.level][0] * sides[info.level][1] * info.width * number for info in layers)
    groups = sum(module.norm.num_groups for module in family.motion_modules(model).values())
    return [
        frame * (rows_sent(rank, parts, reach) + rows_sent(rank, owners, everyone))
        + STATISTIC * batch * groups * rows_sent(rank, parts, whole)
        for rank in range(size)
    ]


def _divided(work: _Work) -> list[tuple[nn.Module, str, Any]]:
    """Triples for `patched` that divide one model."""
    model, family = work.context.model, work.context.family
    assert isinstance(family, VideoUNetFamily)
    triples: list[tuple[nn.Module, str, Any]] = []
    for part in family.framewise(model):
        triples.append((part, "forward", _ClipWise(part, work)))
    if isinstance(part := getattr(model, "controlnet_cond_embedding", None), nn.Module):
        triples.append((part, "forward", _OwnClipWise(part, work)))  # has no rows for guidance
    for name, part in family.motion_modules(model).items():
        norm = _HeldNorm(part.norm)
        triples += [(part.norm, "forward", norm), (part, "forward", _TileWise(part, name, norm, work))]
    return triples


class _Work:
    """What the parts of one `streamed` block share."""

    def __init__(self, context: Context, film: Clip, clip: int, cancel: CancelToken | None):
        self.context, self.film, self.clip, self.cancel = context, film, clip, cancel
        self.votes = copy.copy(film.comm)  # counts its own bytes

    @property
    def device(self) -> torch.device:
        return next(self.context.model.parameters()).device

    @property
    def rows(self) -> int:
        """Pictures in this call: frames of every row of the batch."""
        return self.context.batch * self.context.frames

    def clips(self, rows: int) -> list[Span]:
        return [(first, min(first + self.clip, rows)) for first in range(0, rows, self.clip)]


class _ClipWise:
    """Stands for the `forward` of a module that treats every picture on its own."""

    def __init__(self, module: nn.Module, work: _Work):
        self.module, self.stock, self.work = module, module.forward, work

    def rows(self, args: tuple, kwargs: dict) -> int:
        """Pictures in this call."""
        return self.work.rows

    @property
    def device(self) -> torch.device:
        return self.work.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        work, rows, device = self.work, self.rows(args, kwargs), self.device
        home = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), device)
        if not any(_per_picture(x, rows) for x in (*args, *kwargs.values())):  # a time, the same for all
            here = [_part(x, 0, rows, rows, device) for x in args]
            there = {name: _part(x, 0, rows, rows, device) for name, x in kwargs.items()}
            out = run_part(self.stock, here, there)
            return _like(out, iter([piece.to(home) for piece in _flat(out)]))
        whole: list[Tensor] = []
        for first, end in work.clips(rows):
            work.context.rows = (first, end)
            here = [_part(x, first, end, rows, device) for x in args]
            there = {name: _part(x, first, end, rows, device) for name, x in kwargs.items()}
            out = run_part(self.stock, here, there)
            pieces = _flat(out)
            if not whole:
                if end == rows and device == home:
                    return out
                whole = [piece.new_empty((rows, *piece.shape[1:]), device=home) for piece in pieces]
            for into, piece in zip(whole, pieces, strict=True):
                into[first:end] = piece
        return _like(out, iter(whole))


class _OwnClipWise(_ClipWise):
    """The same where the first argument says how many pictures there are, as of a ControlNet, which is called first."""

    def rows(self, args: tuple, kwargs: dict) -> int:
        return (args[0] if args else kwargs["sample"]).shape[0]

    @property
    def device(self) -> torch.device:
        return device_of(self.module)  # an offloaded ControlNet comes there with its first clip


class _HeldNorm:
    """Stands for the `forward` of a motion module's GroupNorm, with the statistics of the whole film."""

    def __init__(self, norm: nn.GroupNorm):
        self.norm = norm
        self.statistics: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def __call__(self, x: Tensor) -> Tensor:
        return normalise(x, self.norm, *self.statistics)


class _TileWise:
    """Stands for the `forward` of a motion module."""

    def __init__(self, module: nn.Module, name: str, norm: _HeldNorm, work: _Work):
        self.stock, self.name, self.norm, self.work = module.forward, name, norm, work

    def __call__(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """(B * frames, C, H, W) -> the same shape. Of what the stock call takes, the UNet gives the frames only."""
        work, context, x = self.work, self.work.context, hidden_states
        if work.cancel is not None:
            work.votes.place = self.name
            if stop_wanted(work.votes, work.cancel):
                raise Cancelled("stopped on request")
        self.norm.statistics = self._statistics(x)
        flat = x.flatten(2)
        out = torch.empty_like(flat)
        places = flat.shape[2]
        # As many numbers as a clip has at the finest level; the same tiles on every rank, which exchange them in turn.
        longest = max(end - first for first, end in work.film.parts)
        finest = max(height * width for height, width in context.grids.values())
        side = min(places, max(1, work.clip * finest // longest))
        for first in range(0, places, side):
            tile = flat[:, :, first : first + side].unsqueeze(2).to(work.device)
            out[:, :, first : first + side] = run_part(self.stock, [tile], {"num_frames": context.frames}).squeeze(2)
        return out.view(x.shape)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group over the whole film, (B, groups)."""
        work, groups = self.work, self.norm.norm.num_groups
        clips = [run_part(frame_statistics, [x[a:b].to(work.device), groups], {}) for a, b in work.clips(x.shape[0])]
        own = torch.cat(clips).view(work.context.batch, work.context.frames, groups, 2)
        comm, film = work.film.comm, work.film
        if comm.size > 1:
            comm.place = f"{self.name}.norm"
            own = comm.collect(own, film.parts, [(0, film.frames)] * comm.size, dim=1)
        return film_statistics(own, x[0].numel() // groups)


def run_part(forward: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """One clip or tile through one module: all that is on the device beside the weights. A benchmark measures here."""
    return forward(*args, **kwargs)


def _per_picture(value: Any, rows: int) -> bool:
    """Has this argument a row per picture?"""
    if isinstance(value, (list, tuple)):
        return any(_per_picture(item, rows) for item in value)
    return isinstance(value, PerFrame) or (isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows)


def _part(value: Any, first: int, end: int, rows: int, device: torch.device) -> Any:
    """The rows of a clip of an argument; what has no row per picture is passed as it is."""
    if isinstance(value, PerFrame):
        return value.take(first, end).to(device)
    if isinstance(value, Tensor):
        return (value[first:end] if _per_picture(value, rows) else value).to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(_part(item, first, end, rows, device) for item in value)
    return value


def _flat(out: Any) -> list[Tensor]:
    """The tensors in lists and tuples."""
    return [out] if isinstance(out, Tensor) else [piece for item in out for piece in _flat(item)]


def _like(out: Any, pieces: Iterator[Tensor]) -> Any:
    """`out` with other tensors in it."""
    return next(pieces) if isinstance(out, Tensor) else type(out)(_like(item, pieces) for item in out)


def _method(context: Context) -> DualScopeAttnProcessor:
    for item in context.installations:
        if isinstance(item.method, DualScopeAttnProcessor):
            return item.method
    raise ValueError(f"{type(context.model).__name__} has no dual-scope attention; install 'dual-scope' first.")


def _ready(model: nn.Module) -> Context:
    """The context of an AnimateDiff UNet whose temporal layers all carry dual-scope attention."""
    context = context_of(model)
    if context is None:
        raise ValueError(f"{type(model).__name__} has no dual-scope attention; install 'dual-scope' first.")
    if not isinstance(context.family, VideoUNetFamily):
        raise UnsupportedModel(f"{type(model).__name__} is no AnimateDiff UNet, which is what films are made with.")
    method = _method(context)
    ours = {swap.info.name for item in context.installations if item.method is method for swap in item.swaps}
    others = [i.name for i, _ in context.family.layers(model) if i.role == "temporal" and i.name not in ours]
    if others:
        raise ValueError(
            f"{len(others)} temporal layers carry other attention, for example {others[0]!r}, and would see a part of "
            "the film only; install 'dual-scope' on all of them."
        )
    return context
