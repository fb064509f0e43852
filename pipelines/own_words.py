"""The caption of a panel as each of its subjects reads it: with this subject alone in its own words.

From "a cat and a dog on sea", of a cat that looks like a "red cat" and a dog like a "blue dog", the cat's part of the
picture reads "a red cat and a dog on sea", the dog's "a cat and a blue dog on sea". So every word has one subject that it
can belong to, and the caption itself names none of it, except of those who have no place: they are told to all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attn_processors import Place
from .filling_in import check_length
from .script import Panel, Script, Subject

__all__ = ["captioned_places", "check_captions", "encoded", "own_caption", "panel_prompt"]


def own_caption(script: Script, number: int, subject: Subject) -> str:
    """The caption of a panel, counted from 0, with the subject's phrase replaced by how it looks; "" if that is not said.

    Of several subjects with one phrase, the first has the first of its occurrences, and so on. Where the phrase is not in
    the caption (the subject has a box), how it looks stands before it. What is part of another subject's longer phrase
    does not count.
    """
    return _told(script, number, [subject]) if subject.looks else ""


def panel_prompt(pipe: Any, script: Script, number: int, places: Sequence[Place]) -> str:
    """What a panel as a whole reads: its caption, with those in their own words who have no place of their own to read them.

    Raises:
        ValueError: with these words it is too long for the model.
    """
    panel = script.panels[number]
    placed = {place.subject for place in places}
    lost = [one for name in script.present(panel) if name not in placed and (one := script.subject(name)).looks]
    if not lost:
        return panel.prompt
    caption = _told(script, number, lost)
    check_length(f"panel {number + 1} as it tells of those not found", caption, pipe, _accepted(pipe))
    return caption


def _told(script: Script, number: int, subjects: Sequence[Subject]) -> str:
    """The caption of a panel with the phrases of `subjects` replaced by how they look."""
    panel = script.panels[number]
    spans: list[tuple[int, int, str]] = []
    before = ""
    for subject in subjects:
        one = _mention(script, panel, subject)
        if one is None or any(one.start() < end and start < one.end() for start, end, _ in spans):
            before += f"{subject.looks}, "
        else:
            spans.append((*one.span(), _with_article(one.group("article"), subject.looks)))
    caption = panel.prompt
    for start, end, words in sorted(spans, reverse=True):
        caption = caption[:start] + words + caption[end:]
    return before + caption


def _mention(script: Script, panel: Panel, subject: Subject) -> re.Match[str] | None:
    """Where the caption means a subject, if anywhere."""
    there = script.present(panel)
    alike = [one.name for one in script.subjects if one.name in there and one.phrase.lower() == subject.phrase.lower()]
    longer = [other for one in script.subjects for other in _occurrences(one.phrase, panel.prompt)
              if one.name in there and len(one.phrase) > len(subject.phrase)]  # fmt: skip
    found = [
        one
        for one in _occurrences(subject.phrase, panel.prompt)
        if not any(other.start("phrase") <= one.start("phrase") and one.end() <= other.end() for other in longer)
    ]
    if not found:
        return None
    return found[min(alike.index(subject.name), len(found) - 1)] if subject.name in alike else found[0]


def _occurrences(phrase: str, caption: str) -> list[re.Match[str]]:
    """Where a phrase stands as whole words, with the article before it."""
    words = rf"(?<!\w)(?:(?P<article>an?|the)\s+)?(?P<phrase>{re.escape(phrase)})(?!\w)"
    return list(re.finditer(words, caption, re.IGNORECASE))


def _with_article(article: str | None, looks: str) -> str:
    """How it looks, with the article that stood in the caption in place of its own."""
    if not article:
        return looks
    looks = re.sub(r"^(an?|the)\s+", "", looks, flags=re.IGNORECASE)
    if article.lower() == "the":
        return f"{article} {looks}"
    right = "an" if looks[0].lower() in "aeiou" else "a"
    return f"{right.capitalize() if article[0].isupper() else right} {looks}"


def captioned_places(script: Script, number: int, places: Sequence[Place]) -> tuple[Place, ...]:
    """The places of a panel, each with the caption as its subject reads it."""
    return tuple(
        replace(place, caption=own_caption(script, number, script.subject(place.subject))) if place.subject else place
        for place in places
    )


def check_captions(pipe: Any, script: Script, numbers: Sequence[int]) -> None:
    """Raise ValueError if the model cannot read the captions of these panels for each subject, or not to their ends."""
    kind, accepts = type(pipe).__name__, _accepted(pipe)
    present = [(number, script.subject(name)) for number in numbers for name in script.present(script.panels[number])]
    told = [(number, one) for number, one in present if one.looks]
    if (
        told
        and getattr(pipe, "unet", None) is None
        and not any(family in kind for family in ("Flux", "StableDiffusion3"))
    ):
        # the others mask padded text, whose places differ from row to row
        raise ValueError(f"{kind} cannot read a caption for each subject; leave out how {told[0][1].name!r} looks")
    for number, one in told:
        caption = own_caption(script, number, one)
        check_length(f"panel {number + 1} as {one.name!r} reads it", caption, pipe, accepts)


def _accepted(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipe.__call__).parameters


@torch.no_grad()
def encoded(pipe: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    """The text (T, C) that the denoiser reads for each caption."""
    return {
        caption: pipe.encode_prompt(
            caption, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0][0]
        for caption in dict.fromkeys(captions)
    }
