"""The caption of a panel as each of its subjects reads it: with this subject alone in its own words.

From "a cat and a dog on sea", of a cat that looks like a "red cat" and a dog like a "blue dog", the cat's part of the
picture reads "a red cat and a dog on sea", the dog's "a cat and a blue dog on sea". So every word has one subject that it
can belong to, and the caption itself names none of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .script import Script, Subject

__all__ = ["encoded", "own_caption"]


def own_caption(script: Script, number: int, subject: Subject) -> str:
    """The caption of a panel, counted from 0, with the subject's phrase replaced by how it looks; "" if that is not said.

    Of several subjects with one phrase, the first has the first of its occurrences, and so on. Where the phrase is not in
    the caption (the subject has a box), how it looks stands before it.
    """
    if not subject.looks:
        return ""
    panel = script.panels[number]
    there = script.present(panel)
    alike = [one.name for one in script.subjects if one.name in there and one.phrase.lower() == subject.phrase.lower()]
    found = list(re.finditer(rf"(?<!\w)(?:(an?)\s+)?{re.escape(subject.phrase)}(?!\w)", panel.prompt, re.IGNORECASE))
    if not found:
        return f"{subject.looks}, {panel.prompt}"
    mine = found[min(alike.index(subject.name), len(found) - 1)] if subject.name in alike else found[0]
    return panel.prompt[: mine.start()] + _with_article(mine.group(1), subject.looks) + panel.prompt[mine.end() :]


def _with_article(article: str | None, looks: str) -> str:
    if not article:
        return looks
    right = "an" if looks[0].lower() in "aeiou" else "a"
    return f"{right.capitalize() if article[0].isupper() else right} {looks}"


@torch.no_grad()
def encoded(pipe: Any, captions: Sequence[str]) -> dict[str, Tensor]:
    """The text (T, C) that the denoiser reads for each caption."""
    return {
        caption: pipe.encode_prompt(
            caption, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0][0]
        for caption in dict.fromkeys(captions)
    }
