"""Who is where in the rows of a call: what isolation and reposition need to know, worked out once per grid.

A `Cast` belongs to one installed method and one denoiser: it lays the places over the grids of the call, finds the tokens
of every subject, and keeps what changes from step to step (masks read from attention maps, which queries may read a
reference, the bank).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bank import Bank, Source
from .ops.groups import Group, isolation_groups
from .ops.regions import Box, box_tokens, clipped, mask_tokens, owners, tight_box, unpack_mask
from .ops.reposition import area_ratio, rotary_places, sampling
from .places import Place

if TYPE_CHECKING:
    from .context import Context
    from .isolation_reposition import IsolationRepositionAttnProcessor
    from .layer import LayerCall

__all__ = ["ISOLATE", "REFER", "Cast", "Reader"]

ISOLATE, REFER = 1, 2  # bits of a phase

Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Reader:
    """What one subject of one panel takes from one reference, on one grid.

    Attributes:
        number: of the reference.
        index, weight: how its tokens are put together, (n, K).
        places: (row, column) that the keys are rotated to, (n, 2).
        bias: on the logits of its keys.
    """

    number: int
    index: Tensor
    weight: Tensor
    places: Tensor
    bias: float


class Cast:
    """See the module docstring. One per installed method; `begin` is called for every call of the denoiser."""

    def __init__(self, method: IsolationRepositionAttnProcessor):
        self.method = method
        names = [place.subject for row in (*method.panels, method.references) for place in row if place.subject]
        self.subjects = list(dict.fromkeys(names))
        self.bank: Bank | None = None
        self.captions: dict[str, Tensor] = {}  # the text (T, C) of every caption of the panels' places
        self.first_panel = 0  # panels of the story before those of this call, counted in what people are told
        self.found: dict[tuple[str, int, str], Tensor] = {}  # ("panel" or "reference", row, subject) -> bool (h, w)
        self.absent: dict[tuple[str, int, str], str] = {}  # keys as in `found` -> why it was not
        self.branches, self.step, self.call, self.phase = 1, 0, 0, 0
        self.layers: dict[str, int] = {}  # order of the layers that may read references
        self._moment: float | None = None
        self._cache: dict[tuple, Any] = {}

    # -- every call ---------------------------------------------------------------------------------------------------

    def begin(self, context: Context) -> None:
        """Learn the rows and the step of this call. Raises LayoutError if the rows do not fit the method."""
        self.branches = self.method.branches_of(context)
        progress, step = context.progress(), context.step()
        self.step = round(progress * 1_000_000) if step is None else step
        self.call = self.call + 1 if progress == self._moment else 0  # of those with the same timestep
        if self._moment is not None and progress < self._moment:  # another run
            self.found.clear()
            self.changed()
        self._moment = progress
        self.phase = self.method.phase(progress)

    def changed(self) -> None:
        """Masks are others now."""
        self._cache.clear()

    # -- rows ---------------------------------------------------------------------------------------------------------

    def rows(self, kind: str, number: int, context: Context, branches: Sequence[int]) -> list[int]:
        """Rows of the call that hold a panel, a reference or a caption, for each of some branches."""
        if self.method.broadcast:
            return list(range(context.batch))
        first = {"reference": 0, "caption": self.method.reference_rows, "panel": self.method.rows_in_front}[kind]
        per_branch = self.method.rows_in_front + len(self.method.panels)
        return [branch * per_branch + first + number for branch in branches]

    @property
    def all_branches(self) -> list[int]:
        return list(range(self.branches))

    def reference_branches(self) -> list[int]:
        """Branches whose panels read references: all of them, or the one with the prompt."""
        if self.method.branches == "both" and (self.bank is None or self.bank.branches == "both"):
            return self.all_branches
        return self.prompt_branches()

    def prompt_branches(self) -> list[int]:
        """The branch that reads the prompts; none in a second call of the same step, which reads the negative ones."""
        return [self.branches - 1] if self.branches > 1 or self.call == 0 else []

    # -- places on a grid ---------------------------------------------------------------------------------------------

    def tokens(self, kind: str, number: int, place: Place, grid: Grid) -> tuple[Tensor, Box] | None:
        """The tokens and the box of a subject; None if it is not there, or not yet."""
        if place.mask is not None or (kind, number, place.subject) in self.found:
            mask = self.found[kind, number, place.subject] if place.mask is None else unpack_mask(place.mask)
            box = tight_box(mask)
            return None if box is None else (mask_tokens(mask, grid), box)
        if place.automatic:
            return None
        box = (0.0, 0.0, 1.0, 1.0) if place.box is None else clipped(place.box)
        return None if box is None else (box_tokens(box, grid), box)

    def check(self, context: Context) -> None:
        """Say once of every subject with a box or mask that it is nowhere. Raises ValueError if the method is strict."""
        for kind, number, place in self.all_places():
            if not place.automatic and self.tokens(kind, number, place, (1, 1)) is None:
                why = "its mask is empty" if place.mask is not None else f"its box {place.box} is outside the picture"
                self.missed(context, kind, number, place.subject, why)

    def missed(self, context: Context, kind: str, number: int, subject: str, why: str, last: bool = True) -> None:
        """Say that a subject was not found; `last`: it will not be looked for again."""
        where = f"{subject!r} in {self.called(kind, number)}"
        if self.method.strict and last:
            raise ValueError(f"{where} was not found: {why}; give a box or mask, or allow it with strict=False.")
        if (kind, number, subject) in self.absent:
            return
        self.absent[kind, number, subject] = why
        effect = "it is neither kept apart nor referred to there" if kind == "panel" else "this reference is left out"
        if not self.method.strict:
            context.warn_once((self.method.name, where), f"{where} was not found: {why}; {effect}.")

    def called(self, kind: str, number: int) -> str:
        """A panel or a reference as people know it."""
        return f"{kind} {number + 1 + (self.first_panel if kind == 'panel' else 0)}"

    def told(self) -> list[str]:
        """Who was not found, and what the bank holds."""
        lost = dict(self.absent)
        for kind, number, place in self.all_places():
            if place.automatic and (kind, number, place.subject) not in self.found and self._moment is not None:
                lost.setdefault(
                    (kind, number, place.subject), "no mask was read from attention maps; more steps give one"
                )
        lines = [
            f"not found: {subject!r} in {self.called(kind, number)} ({why})"
            for (kind, number, subject), why in lost.items()
        ]
        if self.bank is not None:
            limit = "no limit" if self.bank.limit is None else f"{self.bank.limit:,} allowed"
            lines.append(f"bank: {self.bank.held:,} bytes held, {limit}, {self.bank.missing} times nothing was kept")
        return lines

    def all_places(self) -> Iterator[tuple[str, int, Place]]:
        for number, place in enumerate(self.method.references):
            yield "reference", number, place
        for number, panel in enumerate(self.method.panels):
            for place in panel:
                if place.subject:
                    yield "panel", number, place

    def owner(self, number: int, grid: Grid) -> tuple[Tensor, dict[str, Box]]:
        """Owner bits of a panel's tokens (H * W,), and the boxes of the subjects in it."""
        key = ("owner", number, grid)
        if key not in self._cache:
            masks = torch.zeros(len(self.subjects), *grid, dtype=torch.bool)
            boxes: dict[str, Box] = {}
            for place in self.method.panels[number]:
                there = self.tokens("panel", number, place, grid) if place.subject else None
                if there is not None:
                    masks[self.subjects.index(place.subject)] |= there[0]
                    boxes[place.subject] = there[1]
            # names are in the order of first appearance, "first" means first in this panel
            order = [self.subjects.index(name) for name in boxes]
            bits = owners(masks[order], self.method.overlap)
            moved = torch.zeros_like(bits)
            for i, subject in enumerate(order):
                moved |= (bits >> i & 1) << subject
            self._cache[key] = moved, boxes
        return self._cache[key]

    def groups(
        self,
        number: int,
        call: LayerCall,
        isolate: bool,
        readers: Mapping[int, Sequence[Reader]],
        told: Sequence[int] = (),
    ) -> list[Group]:
        """The groups of a panel's sequence in this layer; `told`: subjects that read captions of their own in it."""
        random = self.method.strength < 1 and bool(readers)
        moment = self.step if random else None
        key = ("groups", number, call.layout, isolate, tuple(readers), tuple(told), moment, call.q.device)
        if key not in self._cache:
            layout = call.layout
            owner, _ = self.owner(number, layout.shape)
            whole = torch.zeros(layout.tokens, dtype=torch.int64)
            whole[layout.grid] = owner
            reading = None
            if random:
                reading = torch.zeros(layout.tokens, dtype=torch.bool)
                reading[layout.grid] = self._reading(owner, layout.shape)
            referred, heard = (sum(1 << subject for subject in each) for each in (readers, told))
            found = isolation_groups(whole, isolate=isolate, reading=reading, referred=referred, told=heard)
            self._cache[key] = [_moved(group, call.q.device) for group in found]
        return self._cache[key]

    def readers(self, number: int, call: LayerCall) -> Mapping[int, list[Reader]]:
        """By subject: what it reads from its references in this layer."""
        mode, sources = self.method.mode_of(call), self.sources(call)
        key = ("readers", number, call.layout.shape, mode, tuple(map(id, sources)), call.q.device)
        if key not in self._cache:
            _, boxes = self.owner(number, call.layout.shape)
            found = {
                self.subjects.index(name): self._readers(
                    box, [one for one in sources if self.method.references[one.number].subject == name], call, mode
                )
                for name, box in boxes.items()
            }
            self._cache[key] = {subject: several for subject, several in found.items() if several}
        return self._cache[key]

    def told_in(self, number: int, call: LayerCall) -> list[int]:
        """The subjects of a panel that read a caption of their own, where they are on the grid of this layer."""
        _, boxes = self.owner(number, call.layout.shape)
        told = [subject for panel, subject, _ in self.method.captions if panel == number]
        return [self.subjects.index(subject) for subject in told if subject in boxes]

    def sources(self, call: LayerCall) -> list[Source]:
        """The references that this layer can read now."""
        numbers = range(len(self.method.references))
        if self.method.source == "bank":
            bank, branches = self.bank, self.reference_branches()
            assert bank is not None, "checked before"
            if not branches or not bank.keeps(self.layers[call.name], 0):
                return []
            keys = [self.key(call, branches[-1], number) for number in numbers]
            kept = [bank.entries[key][1] for key in keys if key in bank.entries]
            bank.missing += not kept
            return kept
        return [one for number in numbers if (one := self.source(number, call.layout.shape)) is not None]

    def source(self, number: int, grid: Grid) -> Source | None:
        """The tokens of a reference row on a grid, or None if it is not found."""
        key = ("source", number, grid)
        if key not in self._cache:
            there = self.tokens("reference", number, self.method.references[number], grid)
            self._cache[key] = None if there is None else Source(number, *there)
        return self._cache[key]

    def key(self, call: LayerCall, branch: int, number: int) -> tuple:
        """Under which the bank keeps the tokens of a reference for this layer and step."""
        assert self.bank is not None
        return (self.bank.moment(self.step), self.call, branch - self.branches, call.name, number)

    def _readers(self, box: Box, sources: Sequence[Source], call: LayerCall, mode: str) -> list[Reader]:
        grid, device, fit = call.layout.shape, call.q.device, self.method.fit_of(mode)
        readers = []
        for one in sources:
            source_grid: Grid = (one.tokens.shape[0], one.tokens.shape[1])
            if mode == "resample":
                index, weight, places = sampling(box, grid, one.box, one.tokens, fit)
            else:
                target, on = (box, grid) if mode == "coords" else (one.box, source_grid)
                flat, places = rotary_places(target, on, one.box, one.tokens, fit)
                index, weight = flat[:, None], torch.ones(len(flat), 1, dtype=torch.float64)
            bias = self.method.mass_of(mode) * math.log(area_ratio(box, grid, one.box, source_grid))
            bias -= math.log(len(sources))
            readers.append(Reader(one.number, index.to(device), weight.to(device), places.to(device), bias))
        return readers

    def _reading(self, owner: Tensor, grid: Grid) -> Tensor:
        """Which tokens may read references in this step: a random share `strength` of every subject's, at least one.

        Depends on seed, step and grid alone: the same in all layers of a grid, branches and panels.
        """
        key = f"{self.method.seed}, {self.step}, {grid}"
        draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        chance = torch.rand(owner.numel(), generator=draw, dtype=torch.float64)
        reading = torch.zeros_like(owner, dtype=torch.bool)
        for code in owner.unique().tolist():
            mine = (owner == code).nonzero().flatten()
            count = max(1, round(self.method.strength * len(mine)))
            reading[mine[chance[mine].argsort()[:count]]] = True
        return reading


def _moved(group: Group, device: torch.device) -> Group:
    keys = None if group.keys is None else group.keys.to(device)
    return Group(group.queries.to(device), keys, group.subjects, group.told)
