"""The caption of a panel as each of its subjects reads it: with this subject alone in its own words.

From "a cat and a dog on sea", of a cat that looks like a "red cat" and a dog like a "blue dog", the cat's part of the
picture reads "a red cat and a dog on sea", the dog's "a cat and a blue dog on sea". So every word has one subject that it
can belong to, and the caption itself names none of it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attn_processors import Place
from .filling_in import check_length
from .script import Script, Subject

__all__ = ["captioned_places", "check_captions", "encoded", "own_caption"]


def own_caption(script: Script, number: int, subject: Subject) -> str:
    """The caption of a panel, counted from 0, with the subject's phrase replaced by how it looks; "" if that is not said.

    Of several subjects with one phrase, the first has the first of its occurrences, and so on. Where the phrase is not in
    the caption (the subject has a box), how it looks stands before it. What is part of another subject's longer phrase
    does not count.
    """
    if not subject.looks:
        return ""
    panel = script.panels[number]
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
        return f"{subject.looks}, {panel.prompt}"
    mine = found[min(alike.index(subject.name), len(found) - 1)] if subject.name in alike else found[0]
    return (
        panel.prompt[: mine.start()] + _with_article(mine.group("article"), subject.looks) + panel.prompt[mine.end() :]
    )


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
    kind, accepts = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
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


@torch.no_grad()
def encoded(pipe: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    """The text (T, C) that the denoiser reads for each caption."""
    return {
        caption: pipe.encode_prompt(
            caption, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0][0]
        for caption in dict.fromkeys(captions)
    }
