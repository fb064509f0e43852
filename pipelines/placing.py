"""What a script leaves open, filled in: seeds and sizes, and who is where in its panels and references.

A place is a box or mask of the script, or what a rehearsal found, or the words that mean the subject, by which
attention maps find it on the way.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..attn_processors import Place
from .filling_in import filled_in
from .masks import as_place, text_tokens, words_of
from .script import Panel, Script, Subject

__all__ = ["filled_in_story", "panel_places", "reference_place"]


def filled_in_story(script: Script, pipe: Any) -> Script:
    """The script with sizes, seeds, guidance, places and versions as they will be used."""
    prompts = [
        *(subject.drawn for subject in script.subjects if subject.has_reference),
        *(panel.prompt for panel in script.panels),
    ]
    recipes = [filled_in(replace(script.recipe(prompt), seed=script.seed), pipe) for prompt in dict.fromkeys(prompts)]
    recipe = recipes[0]
    assert recipe.seed is not None
    side = getattr(pipe, "default_sample_size", None) or getattr(getattr(pipe, "unet", None), "config", None)
    if not isinstance(side, int):
        side = side.sample_size if side is not None else 128
    own = side * pipe.vae_scale_factor
    subjects = tuple(
        one if one.seed is not None else replace(one, seed=_seed(recipe.seed, 0, i))
        for i, one in enumerate(script.subjects)
    )
    panels = tuple(
        replace(
            panel,
            seed=_seed(recipe.seed, 1, i) if panel.seed is None else panel.seed,
            places=script.present(panel),
        )
        for i, panel in enumerate(script.panels)
    )
    return replace(
        script, subjects=subjects, panels=panels, seed=recipe.seed, model=recipe.model, guidance=recipe.guidance,
        dtype=recipe.dtype, width=script.width or own, height=script.height or own, made_with=recipe.made_with,
    )  # fmt: skip


def panel_places(pipe: Any, script: Script, number: int) -> tuple[tuple[Place, ...], list[str]]:
    """Who is where in a panel of a filled-in script, and a line for everybody whom a rehearsal did not find.

    Raises:
        ValueError, TypeError: a place that cannot be read, words that are not in the caption, or that two subjects share.
    """
    panel = script.panels[number]
    assert panel.places is not None, "filled in"
    places, lost = [], []
    for name, where in panel.places.items():
        where = (panel.found or {}).get(name) if where is None else where
        if where is not None:
            places.append(as_place(name, where))
        elif panel.found is not None:
            lost.append(f"not found: {name!r} in panel {number + 1} (nowhere in the rehearsal)")
        else:
            places.append(Place(subject=name, words=words_of(pipe, panel.prompt, script.subject(name).phrase)))
    for one, other in itertools.combinations([place for place in places if place.automatic], 2):
        if set(one.words) & set(other.words):
            phrases = [script.subject(place.subject).phrase for place in (one, other)]
            alike = (
                f"both {phrases[0]!r}" if len({phrase.lower() for phrase in phrases}) == 1 else "partly the same words"
            )
            raise ValueError(
                f"{one.subject!r} and {other.subject!r} are {alike} in panel {number + 1}, which attention maps cannot "
                "tell apart; give boxes or masks"
            )
    return (*places, *_background(pipe, panel, places)), lost


def reference_place(pipe: Any, subject: Subject) -> Place:
    """Where a subject is in its reference picture; it fills it if nothing tells. Raises ValueError or TypeError.

    What a rehearsal found was in a picture that the model drew, and says nothing of one's own.
    """
    where = subject.found if subject.place is None and subject.picture is None else subject.place
    if where is not None:
        return as_place(subject.name, where)
    with contextlib.suppress(ValueError):  # not in its own prompt: then it fills its picture
        return Place(subject=subject.name, words=words_of(pipe, subject.drawn, subject.phrase))
    return Place(subject=subject.name)


def _background(pipe: Any, panel: Panel, places: Sequence[Place]) -> tuple[Place, ...]:
    """For models whose text has no start token that takes the rest: all other words of the caption."""
    taken = {word for place in places for word in place.words}
    if not taken or "Flux" not in type(pipe).__name__:
        return ()
    others = tuple(word for word in range(text_tokens(pipe, panel.prompt)) if word not in taken)
    return (Place(subject="", words=others),) if others else ()


def _seed(seed: int, kind: int, number: int) -> int:
    """Seeds of their own for references (kind 0) and panels (1); adding one changes no other."""
    return int(np.random.SeedSequence((seed, kind, number)).generate_state(1, np.uint32)[0])
