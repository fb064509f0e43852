"""The story job: subjects that stay themselves over any number of panels.

Each call of the stock pipeline makes a few panels (one, unless told otherwise) with the references of their subjects as
rows in front of them, or after a first call that fills a bank. What a call makes depends on its own panels alone, so a
panel can be made again, or added, and all others keep their pixels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..attn_processors import IsolationRepositionAttnProcessor, Place, install
from ..attn_processors.bank import Bank
from ..attn_processors.context import Context
from ..attn_processors.ops.regions import Box, pack_mask
from .events import CancelToken, StepEvent
from .files import opened
from .image import attention_of, stock_rows
from .load import load
from .masks import as_place
from .own_words import captioned_places, check_captions, encoded, panel_prompt
from .placing import filled_in_story, panel_places, reference_place
from .references import Pinned, fitted, plan_for
from .script import Panel, Script, Subject
from .told import Story

__all__ = ["USUAL", "story"]

# What works best on the bundled models; a story's `consistency` changes single settings.
USUAL = {"branches": "cond", "text_mix": 1.0}
USUAL_UNET = {"reference_layers": "up_blocks"}
Find = Callable[[Image.Image, list[str]], Sequence["Box | str | None"]]


def story(
    script: Script,
    *,
    pipe: Any = None,
    only: Sequence[int] | None = None,
    find: Find | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    cancel: CancelToken | None = None,
) -> Story:
    """Make the panels of a story. The same script gives the same pixels on a CPU, panel by panel.

    Args:
        script: what to make; what it leaves open is filled in and comes back in `Story.script`.
        pipe: a loaded text-to-image pipeline, used in place of `script.model`; it is left as it was found.
        only: the panels to make, counted from 0; None = all.
        find: finds the subjects without a place in a rehearsal, which is a call of the stock model with the same seeds,
            from (picture, phrases): a box, a packed mask or None for each. None: attention maps find them on the way, at
            no further call and less surely.
        on_step: called in this thread after every denoising step; steps count over all calls, `clip` is the call.
        cancel: asked before the work, and after every step.

    Raises:
        Cancelled: if `cancel` was requested; `pipe` can be used again.
        ValueError: as `generate`; for a subject whose words are not in the prompt, two subjects that share words and have
            no boxes, a panel that does not exist, a picture or mask that cannot be read.
        MemoryError: not enough memory, or a bank that does not fit its budget, told before the first step.
        RuntimeError: as `generate`.
    """
    cancel = cancel or CancelToken()
    cancel.check()
    wanted = range(len(script.panels)) if only is None else sorted(set(only))
    if outside := [number for number in wanted if not 0 <= number < len(script.panels)]:
        raise ValueError(f"there is no panel {outside[0] + 1}; the story has {len(script.panels)}")
    if not wanted:
        raise ValueError("no panel was asked for; name at least one")
    if pipe is None:
        pipe = load(script.model, dtype=script.dtype)
    script = filled_in_story(script, pipe)
    job = _Job(script, pipe, find, on_step, cancel)
    made = Story(script=script)
    groups = list(dict.fromkeys(script.group(number) for number in wanted))
    job.check(groups)
    job.calls = len(groups) * ((1 if script.bank is None else 2) + (find is not None))
    for group in groups:
        cancel.check()
        job.make(group, made)
    made.script, made.pictures = job.script, job.pictures
    made.panels = {number: picture for number, picture in made.panels.items() if number in wanted}
    made.places = {number: places for number, places in made.places.items() if number in wanted}
    made.report = list(dict.fromkeys(made.report))
    return made


class _Job:
    """The calls of one story on one pipeline."""

    def __init__(
        self,
        script: Script,
        pipe: Any,
        find: Find | None,
        on_step: Callable[[StepEvent], None] | None,
        cancel: CancelToken,
    ) -> None:
        self.script, self.pipe, self.find, self.on_step, self.cancel = script, pipe, find, on_step, cancel
        self.began = time.monotonic()
        self.calls, self.call = 1, 0
        self.pictures: dict[str, Image.Image] = {}  # of one's own, by subject
        self.cut: dict[str, tuple[Image.Image, Place]] = {}  # the same in the story's size, and where the subject is
        self.unet = getattr(pipe, "unet", None) is not None
        usual = {**USUAL, **USUAL_UNET} if self.unet else USUAL
        self.settings = {**usual, **script.consistency, "strength": script.strength}

    def check(self, groups: Sequence[range]) -> None:
        """Read every place and picture, and find the words of the panels to make, before any work. Raises as `story`."""
        for subject in self.script.subjects:
            place = reference_place(self.pipe, subject)
            if subject.picture is not None:
                picture = self.pictures[subject.name] = opened(subject.picture)
                assert self.script.width is not None and self.script.height is not None, "filled in"
                self.cut[subject.name] = fitted(picture, place, (self.script.width, self.script.height))
        for panel in self.script.panels:
            for name, where in [*(panel.places or {}).items(), *(panel.found or {}).items()]:
                if where is not None:
                    as_place(name, where)
        if self.settings["text_mix"]:
            check_captions(self.pipe, self.script, [number for group in groups for number in group])
        if self.find is None:
            for number in (number for group in groups for number in group):
                self._prompt(number, panel_places(self.pipe, self.script, number)[0])

    def make(self, group: range, made: Story) -> None:
        """The panels of one call, into `made`."""
        if self.find is not None:
            self._rehearse(group, made)
        panels, shown = [], []
        for number in group:
            places, lost = panel_places(self.pipe, self.script, number)
            shown.append(self._prompt(number, places))
            panels.append(captioned_places(self.script, number, places))
            made.report += lost
        names = [name for name in _names(self.script) if any(place.subject == name for row in panels for place in row)]
        subjects = [one for name in names if (one := self.script.subject(name)).has_reference]
        names = [one.name for one in subjects]
        if not self.script.strength or self.settings.get("refer", ()) is None:
            subjects = []
        captioned = any(place.caption for row in panels for place in row)
        mix = self.settings["text_mix"]
        if not self.unet and not captioned and "text_mix" not in self.script.consistency:
            mix = 0.0  # text of one's own would be that of references, which a bank does not keep
        method = IsolationRepositionAttnProcessor.from_settings(
            {
                **self.settings,
                "text_mix": mix,
                "caption_rows": captioned and not self.unet,
                "panels": tuple(panels),
                "references": tuple(self._reference(subject) for subject in subjects),
                "source": "rows" if self.script.bank is None or not subjects else "bank",
            }
        )
        if not subjects and not method.captions:
            method = replace(method, text_mix=0.0)
        captions = method.captions if method.caption_rows else []
        texts = {} if captions else encoded(self.pipe, [caption for *_, caption in method.captions])
        bank = None
        if method.source == "bank":
            bank, pictures = self._fill(method, subjects, made)
            made.references |= dict(zip(names, pictures, strict=False))
        elif self.script.bank is not None:
            self.call += 1
        rows = subjects if method.source == "rows" else []
        noise = [self.script.panels[number].seed for number in group]
        prompts = [*(one.drawn for one in rows), *(caption for *_, caption in captions), *shown]
        seeds = [*(one.seed for one in rows), *(noise[panel] for panel, *_ in captions), *noise]
        with self._inside(method, bank, group.start, texts) as contexts:
            pictures = self._run(prompts, seeds, rows)
            for number, panel in zip(group, panels, strict=True):
                made.places[number] = self._found(method, contexts, number - group.start, panel)
            made.report += [line for context in contexts for line in method.cast(context).told()]
        made.references |= dict(zip(names, pictures[: len(rows)], strict=False))
        made.panels |= dict(zip(group, pictures[method.rows_in_front :], strict=True))

    def _prompt(self, number: int, places: Sequence[Place]) -> str:
        """What a panel as a whole reads."""
        told = self.settings["text_mix"]
        return panel_prompt(self.pipe, self.script, number, places) if told else self.script.panels[number].prompt

    def _reference(self, subject: Subject) -> Place:
        """Where a subject is in the picture of its row."""
        return self.cut[subject.name][1] if subject.name in self.cut else reference_place(self.pipe, subject)

    def _rehearse(self, group: range, made: Story) -> None:
        """Find who has no place, in what the stock model makes of the same prompts and seeds."""
        assert self.find is not None
        script = self.script
        missing = {
            number: [name for name, where in (panel.places or {}).items() if where is None]
            for number in group
            if (panel := script.panels[number]).found is None
        }
        there = {name for number in group for name in script.panels[number].places or {}}
        alone = [one for one in script.subjects if one.name in there and one.place is None and one.found is None]
        alone = [one for one in alone if one.picture is None and one.has_reference]
        missing = {number: names for number, names in missing.items() if names}
        if not missing and not alone:
            self.call += 1
            return
        rows: list[Subject | Panel] = [*alone, *(script.panels[number] for number in missing)]
        with attention_of(script.recipe("-"), self.pipe):
            prompts = [row.drawn if isinstance(row, Subject) else row.prompt for row in rows]
            pictures = self._run(prompts, [row.seed for row in rows], [])
        subjects, panels = list(script.subjects), list(script.panels)
        for one, picture in zip(alone, pictures, strict=False):
            (where,) = self._located(picture, [one.phrase])
            subjects[subjects.index(one)] = replace(one, found=where)
        for (number, names), picture in zip(missing.items(), pictures[len(alone) :], strict=True):
            where = self._located(picture, [script.subject(name).phrase for name in names])
            found = dict(zip(names, where, strict=True))
            panels[number] = replace(panels[number], found=found)
        self.script = replace(script, subjects=tuple(subjects), panels=tuple(panels))

    def _located(self, picture: Image.Image, phrases: list[str]) -> list[Any]:
        """What `find` says, as a script writes it."""
        assert self.find is not None
        where = list(self.find(picture, phrases))
        if len(where) != len(phrases):
            raise ValueError(
                f"find was asked for {len(phrases)} subjects and told of {len(where)}; return one for each"
            )
        return [one if one is None else {"mask": one} if isinstance(one, str) else list(one) for one in where]

    def _fill(
        self, method: IsolationRepositionAttnProcessor, subjects: Sequence[Subject], made: Story
    ) -> tuple[Bank, list[Image.Image]]:
        """A bank of these references, and their pictures. Raises MemoryError before the first step if it cannot fit."""
        recorder = replace(method, panels=(), caption_rows=False, source="record")
        if not self.unet:
            recorder = replace(recorder, text_mix=0.0)
        with self._inside(recorder, None) as contexts:  # other attention leaves us fewer layers
            plan = plan_for(self.pipe, self.script, recorder, contexts[0])
        bank = plan.bank(self.script.bank)
        made.report.append(str(plan))
        with self._inside(recorder, bank):
            return bank, self._run([one.drawn for one in subjects], [one.seed for one in subjects], subjects)

    @contextlib.contextmanager
    def _inside(
        self,
        method: IsolationRepositionAttnProcessor,
        bank: Bank | None,
        first_panel: int = 0,
        captions: Mapping[str, Tensor] | None = None,
    ) -> Iterator[list[Context]]:
        """The pipeline with the story's attention in it: other attention on its layers, ours on those that are left.

        first_panel: number of the call's first panel in the story, from 0.
        captions: the text of the captions in the panels' places.
        """
        with attention_of(self.script.recipe("-"), self.pipe):
            taken = _taken(self.pipe)
            if method.neutral:
                yield []
                return
            try:
                handle = install(self.pipe, method, layers=(lambda name: name not in taken) if taken else None)
            except ValueError as error:
                if taken and "no layer for" in str(error):
                    names = ", ".join(entry["name"] for entry in self.script.attention)
                    raise ValueError(
                        f"{names} takes all layers and leaves none for the subjects; narrow it, for example agent levels=1"
                    ) from None
                raise
            try:
                contexts = [context for context, _ in handle.parts]
                for context in contexts:
                    method.cast(context).first_panel = first_panel
                    method.cast(context).captions.update(captions or {})
                    if bank is not None:
                        method.cast(context).bank = bank
                yield contexts
            finally:
                handle.remove()
                for context in contexts:
                    context.reset()

    def _run(self, prompts: list[str], seeds: list[Any], rows: Sequence[Subject]) -> list[Image.Image]:
        script = self.script
        recipe = script.recipe(prompts[0])
        pictures = {row: self.cut[one.name][0] for row, one in enumerate(rows) if one.picture is not None}
        assert script.width is not None and script.height is not None
        pinned = None
        if pictures:
            own_seeds = {row: int(seeds[row]) for row in pictures}
            pinned = Pinned(self.pipe, pictures, own_seeds, (script.width, script.height))
        more: dict[str, Any] = {"prompt": prompts}
        if script.negative:
            more["negative_prompt"] = [script.negative] * len(prompts)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        made = stock_rows(
            self.pipe, recipe, generators, on_step=self._tell, cancel=self.cancel, began=time.monotonic(),
            change=pinned, **more,
        )  # fmt: skip
        self.call += 1
        return made

    def _tell(self, event: StepEvent) -> None:
        if self.on_step is None:
            return
        seconds = time.monotonic() - self.began
        done = (self.call + event.step / event.steps) / self.calls
        self.on_step(
            replace(
                event,
                step=self.call * event.steps + event.step,
                steps=self.calls * event.steps,
                clip=self.call,
                clips=self.calls,
                seconds=seconds,
                eta=seconds / done * (1 - done),
            )
        )

    def _found(
        self, method: IsolationRepositionAttnProcessor, contexts: list[Context], number: int, panel: tuple[Place, ...]
    ) -> tuple[Place, ...]:
        found = []
        for place in panel:
            if place.automatic and place.subject:
                masks = [method.cast(context).found.get(("panel", number, place.subject)) for context in contexts]
                mask = next((mask for mask in masks if mask is not None), None)
                if mask is not None:
                    found.append(Place(subject=place.subject, mask=pack_mask(mask)))
            elif place.subject:
                found.append(place)
        return tuple(found)


def _names(script: Script) -> list[str]:
    return [subject.name for subject in script.subjects]


def _taken(pipe: Any) -> set[str]:
    """Layers that carry other attention of ours."""
    from ..attn_processors.context import context_of
    from ..attn_processors.planning import denoisers

    contexts = [context for model in denoisers(pipe) if (context := context_of(model)) is not None]
    return {swap.info.name for context in contexts for item in context.installations for swap in item.swaps}
