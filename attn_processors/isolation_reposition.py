"""Isolation and reposition: several subjects in a picture that do not mix, and that look like their references.

Two causes make a model fail at this (IR-Diffusion, arXiv 2411.19261): subjects of one picture attract each other in
self-attention, and a picture makes little use of a reference whose subject lies elsewhere in the frame. Isolation hides
subjects from each other (`ops.groups`). References are further rows of the same call, whose tokens a subject's queries
see besides their own picture, laid where the subject is and as large (`ops.reposition`). The rows of references never
see the pictures, so they are what the stock model makes of their prompts.

Softmax does not care about the order of keys. So in models without a rotary embedding moving a reference does nothing,
and what resampling changes is how much weight it has and how smooth it is.

What is where is said by boxes, by masks, or read from attention maps as the picture comes about (`attention_maps`). Only
the attention calls are kept apart: text, convolutions and the background still carry something between subjects.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from .attention_maps import Maps
from .bank import Bank
from .layer import LayoutError
from .method import AttnMethod, LayerInfo
from .ops.groups import Extra, grouped_attention
from .ops.regions import MOST_SUBJECTS
from .ops.reposition import sample
from .places import Place, check_panel
from .subjects import ISOLATE, REFER, Cast, Reader
from .text_mix import Ear, mixed_jointly, own_rows

if TYPE_CHECKING:
    from .context import Context
    from .layer import LayerCall

__all__ = ["Bank", "IsolationRepositionAttnProcessor", "Place"]

ROUNDING = 1e-6  # progress is a quotient of step numbers
Window = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class IsolationRepositionAttnProcessor(AttnMethod):
    """Keep subjects apart, and like their references, in UNets, FLUX and Stable Diffusion 3.

    The rows of a call are, in every guidance branch, the references, the captions of the panels' places where
    `caption_rows`, and the panels: give the pipeline the prompts in that order. Without references, one panel stands
    for any number of rows. `reattend.pipelines.story` does it all; without any panel the attention is stock.

    Raises ValueError for a value outside its range, TypeError for one of the wrong type.
    """

    panels: tuple[tuple[Place, ...], ...] = ()  # who is where in each picture
    references: tuple[Place, ...] = ()  # one for each reference; several of one subject share its weight
    # in joint layers, which have text in their rows alone: captions of places are rows of the call
    caption_rows: bool = False
    # rows of the same call; a bank filled by an earlier one; "record" fills the bank
    source: Literal["rows", "bank", "record"] = "rows"
    strength: float = 1.0  # share of a subject's tokens that see its references at each step, 0 to 1; more = more alike
    isolate: tuple[float, float] | None = (0.0, 1.0)  # from and to which share of the steps; None = subjects may mix
    refer: tuple[float, float] | None = (0.0, 1.0)  # from and to which share of the steps references are seen
    reference_layers: str = "."  # regular expression for the layers that see references; "." = all
    # resampled onto the subject's place; keys rotated to it; as they lie; auto: by what the model has
    reposition: Literal["auto", "resample", "coords", "plain"] = "auto"
    fit: Literal["auto", "stretch", "uniform"] = "auto"  # uniform keeps proportions; auto: uniform for coords
    mass: float | None = None  # 1 weighs a reference by the size of the subject; None: as resampling would
    overlap: Literal["smallest", "first", "largest", "shared"] = "smallest"  # whose a token is that several claim
    # guidance branches that see references; "cond": the one with the prompt alone, so that guidance strengthens them
    branches: Literal["both", "cond"] = "both"
    # share, 0 to 1, of its own text in what a subject reads: its place's caption, else half as much of its reference's prompt
    text_mix: float = 0.0
    warmup: float = 0.2  # share of the steps before masks are read from attention maps
    strict: bool = False  # True: a subject that is nowhere is an error, not a warning
    seed: int = 0  # of the tokens drawn for a strength below 1; the picture's own chance is not touched

    name: ClassVar[str] = "isolation-reposition"
    roles: ClassVar[tuple[str, ...]] = ("spatial", "joint")
    honours_padding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is a share from 0 to 1, got {self.strength}; 1 follows references most.")
        for name in ("isolate", "refer"):
            window = getattr(self, name)
            if window is not None and not 0 <= window[0] < window[1] <= 1:
                raise ValueError(
                    f"{name} is a window of the steps with 0 <= from < to <= 1, got {window}; (0, 0.6) is the first "
                    "60 %, None is never."
                )
        if not 0 <= self.text_mix <= 1:
            raise ValueError(f"text_mix is a share from 0 to 1, got {self.text_mix}; 0 leaves the text to the panel.")
        if not 0 < self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps between 0 and 1, got {self.warmup}; 0.2 is usual.")
        try:
            re.compile(self.reference_layers)
        except re.error as problem:
            raise ValueError(
                f"reference_layers={self.reference_layers!r} is no regular expression: {problem}."
            ) from None
        if self.source == "record" and self.panels:
            raise ValueError("a bank is recorded from references alone; leave the panels to the run that reads it.")
        for number, panel in enumerate(self.panels):
            check_panel(number, panel)
        for place in self.references:
            if not place.subject:
                raise ValueError("a reference needs the name of its subject; write Place(subject='cat').")
        names = {place.subject for row in (*self.panels, self.references) for place in row if place.subject}
        if len(names) > MOST_SUBJECTS:
            raise ValueError(
                f"one call holds at most {MOST_SUBJECTS} subjects, got {len(names)}; make fewer panels at once."
            )

    # -- what the installer and the context ask ------------------------------------------------------------------------

    @property
    def neutral(self) -> bool:
        """True if no panel has a subject and nothing is recorded, or isolation, references and captions are all off."""
        if self.source == "record":
            return not self.references
        nobody = not any(place.subject for panel in self.panels for place in panel)
        return nobody or (self.isolate is None and not self._refers and not self.captions)

    @property
    def phased(self) -> bool:
        return True

    def phase(self, progress: float) -> int:
        """Bits: ISOLATE, REFER."""
        return ISOLATE * _in(self.isolate, progress) + REFER * (self._refers and _in(self.refer, progress))

    @property
    def _refers(self) -> bool:
        return bool(self.references) and self.strength > 0 and self.refer is not None

    @property
    def rows_in_front(self) -> int:
        """Rows of references and captions in every branch."""
        return self.reference_rows + (len(self.captions) if self.caption_rows else 0)

    @property
    def reference_rows(self) -> int:
        """Rows of references in every branch."""
        return 0 if self.source == "bank" else len(self.references)

    @property
    def broadcast(self) -> bool:
        """Whether one panel stands for all rows of the call."""
        return len(self.panels) == 1 and not self.references and not self._automatic and not self.captions

    @property
    def captions(self) -> list[tuple[int, str, str]]:
        """(panel, subject, caption) of every place that reads a caption of its own, in the order of their rows."""
        if not self.text_mix:
            return []
        return [(i, one.subject, one.caption) for i, panel in enumerate(self.panels) for one in panel if one.caption]

    @property
    def _automatic(self) -> bool:
        return any(place.automatic for row in (*self.panels, self.references) for place in row)

    def branches_of(self, context: Context) -> int:
        """Guidance branches in a call. Raises LayoutError if its rows are not a multiple of those described."""
        rows = self.rows_in_front + len(self.panels)
        if self.broadcast:
            return 1  # without references all branches are alike
        if context.batch % rows:
            raise LayoutError(
                f"the call has {context.batch} rows, which is no multiple of the {self.reference_rows} references, "
                f"{self.rows_in_front - self.reference_rows} captions and {len(self.panels)} panels; give the pipeline one "
                "prompt for each, in this order."
            )
        return context.batch // rows

    def prepare(self, context: Context) -> None:
        """Learn rows and step, take up masks from the attention maps of the step before."""
        if self.neutral:
            return
        cast = self.cast(context)
        if not cast.layers:
            names = [swap.info.name for item in context.installations if item.method is self for swap in item.swaps]
            cast.layers = {name: i for i, name in enumerate(n for n in names if self.reads(n))}
            cast.check(context)
        if self.source != "rows" and cast.bank is None:
            raise RuntimeError(f"source={self.source!r} needs a bank; reattend.pipelines.story makes it.")
        if not self.caption_rows and not {caption for *_, caption in self.captions} <= set(cast.captions):
            raise RuntimeError("the captions of places have to be encoded; reattend.pipelines.story does that.")
        cast.begin(context)
        if (maps := self.maps(context)) is not None:
            maps.begin(context, cast)

    def cast(self, context: Context) -> Cast:
        """Who is where, for this method on this denoiser."""
        held = context.slots.get((self.name, "cast", id(self)))
        if held is None or held.method is not self:
            held = context.slots[self.name, "cast", id(self)] = Cast(self)
        return held

    def maps(self, context: Context) -> Maps | None:
        """What reads masks from attention maps; None where boxes and masks say all."""
        if not self._automatic:
            return None
        held = context.slots.get((self.name, "maps", id(self)))
        if held is None or held.method is not self:
            held = context.slots[self.name, "maps", id(self)] = Maps(self)
        return held

    def hooks(self, context: Context) -> list[Any]:
        """In the text cross-attention of models that have it, where masks are read and subjects read their prompts."""
        if self.neutral or not (self._automatic or self.text_mix):
            return []
        hooks = context.family.listen(context, Ear(self, context))
        if self.text_mix and not hooks:
            if not any(info.role == "joint" for info, _ in context.family.layers(context.model)):
                raise ValueError(
                    f"text_mix needs layers that read text and that we reach, which {type(context.model).__name__} has "
                    "not; leave it 0."
                )
            if self.source != "rows" and not self.captions:
                raise ValueError(
                    "text_mix in joint layers reads the references' text in their own rows, and a bank keeps none; leave "
                    "out the bank, or text_mix."
                )
        return hooks

    def outlook(self, context: Context, layers: Sequence[LayerInfo]) -> str:
        """Who was not found, and what the bank holds."""
        if self.neutral:
            return ""
        cast = self.cast(context)
        counts = f"{len(cast.subjects)} subjects, {len(self.references)} references, {len(self.panels)} panels"
        return "\n".join([f"{self.name}: {counts}", *cast.told()])

    # -- one layer ----------------------------------------------------------------------------------------------------

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        """Attention of one layer, (B, N, heads * head_dim)."""
        if call.context.strip is not None:
            raise LayoutError(
                "isolation and reposition do not work on a picture that is split over ranks; make it whole."
            )
        cast = self.cast(call.context)
        maps = self.maps(call.context)
        if maps is not None:
            maps.see(call, cast)
        refer = bool(phase & REFER) and self.reads(call.name)
        if self.source == "record":
            if refer:
                self._record(call, cast)
            return call.softmax(call.q, call.k, call.v, mask=call.mask).flatten(2)
        valid = None if call.mask is None else call.mask[:, 0, 0]
        plans = [plan for number in range(len(self.panels)) for plan in self._plans(call, cast, number, phase, refer)]
        if not any(readers or len(groups) > 1 or groups[0].told for *_, groups, readers in plans):
            return call.softmax(call.q, call.k, call.v, mask=call.mask).flatten(2)
        q, k, v = call.q, call.k, call.v
        out = torch.empty_like(q)
        stock = [
            row for n in range(self.rows_in_front) for row in cast.rows("reference", n, call.context, cast.all_branches)
        ]
        if stock:
            mask = None if call.mask is None else call.mask[stock]
            out[stock] = call.softmax(q[stock], k[stock], v[stock], mask=mask)
        for number, rows, groups, readers in plans:
            extra = {s: [self._extra(call, cast, one, len(rows)) for one in several] for s, several in readers.items()}
            seen = None if valid is None else valid[rows]
            out[rows] = grouped_attention(q[rows], k[rows], v[rows], groups, extra, call.softmax, seen)
            if self.text_mix and call.text_places and any(group.subjects or group.told for group in groups):
                own = own_rows(call, cast, number, rows, readers)
                out[rows] = mixed_jointly(call, rows, groups, extra, own, out[rows])
        return out.flatten(2)

    def _plans(self, call: LayerCall, cast: Cast, number: int, phase: int, refer: bool) -> list[tuple]:
        """(number, rows, groups, readers by subject) of one panel, apart for branches with references and without."""
        isolate = bool(phase & ISOLATE)
        told = cast.told_in(number, call) if self.caption_rows and call.text_places else []
        readers = cast.readers(number, call) if refer else {}
        with_references = cast.reference_branches() if readers or told else []
        without = [branch for branch in cast.all_branches if branch not in with_references]
        plans = []
        for branches, reads, hears in ((with_references, readers, told), (without, {}, [])):
            if branches:
                rows = cast.rows("panel", number, call.context, branches)
                plans.append((number, rows, cast.groups(number, call, isolate, reads, hears), reads))
        return plans

    def _extra(self, call: LayerCall, cast: Cast, reader: Reader, rows: int) -> Extra:
        """Keys and values of one reference for the rows of one panel."""
        branches = cast.reference_branches()
        if self.source == "rows":
            x = call.picture[cast.rows("reference", reader.number, call.context, branches)]
        else:
            assert cast.bank is not None
            kept = [cast.bank.get(cast.key(call, branch, reader.number)) for branch in branches]
            x = torch.cat([one for one in kept if one is not None]).to(call.x)
        tokens = sample(x, reader.index, reader.weight)
        k, v = call.keys_at(tokens, reader.places), call.to_v(tokens)
        each = rows // len(branches)
        if each > 1:
            k, v = k.repeat_interleave(each, 0), v.repeat_interleave(each, 0)
        return Extra(k, v, reader.bias)

    def _record(self, call: LayerCall, cast: Cast) -> None:
        bank = cast.bank
        assert bank is not None
        if not bank.keeps(cast.layers[call.name], cast.step):
            return
        for number in range(len(self.references)):
            source = cast.source(number, call.layout.shape)
            if source is None:
                continue
            index = source.tokens.flatten().to(call.x.device)
            branches = cast.all_branches if bank.branches == "both" else cast.all_branches[-1:]
            for branch in branches:
                (row,) = cast.rows("reference", number, call.context, [branch])
                bank.put(cast.key(call, branch, number), call.picture[row, index].clone(), source)

    def reads(self, layer: str) -> bool:
        return re.search(self.reference_layers, layer) is not None

    def mode_of(self, call: LayerCall) -> str:
        """How references are laid onto their subjects in this layer."""
        if self.reposition != "auto":
            return self.reposition
        return "coords" if call.rotary is not None else "resample"

    def fit_of(self, mode: str) -> Literal["stretch", "uniform"]:
        if self.fit != "auto":
            return self.fit
        return "uniform" if mode == "coords" else "stretch"

    def mass_of(self, mode: str) -> float:
        """Factor on log(rho), see `ops.reposition`."""
        if self.mass is not None:
            return self.mass
        return 1.0 if mode == "coords" else 0.0


def _in(window: Window | None, progress: float) -> bool:
    if window is None:
        return False
    begun, over = progress >= window[0] - ROUNDING, window[1] < 1 and progress >= window[1] - ROUNDING
    return begun and not over
