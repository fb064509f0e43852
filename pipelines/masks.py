"""Masks as people see and edit them: words that mean a subject, mask files, and pictures with masks laid over them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..attn_processors.ops.regions import LARGEST_MASK, Box, pack_mask, unpack_mask
from ..attn_processors.places import Place
from .files import PICTURES, inside

__all__ = ["mask_picture", "overlay", "read_mask", "text_tokens", "words_of"]

COLOURS = ((230, 60, 60), (50, 120, 230), (60, 180, 75), (240, 170, 30), (150, 70, 200), (40, 190, 190))
STORED = 256  # longest side of a mask that is kept in a recipe


def words_of(pipe: Any, prompt: str, phrase: str) -> tuple[int, ...]:
    """Places of a phrase among the text tokens the denoiser sees: every occurrence, whole words, any case.

    Raises:
        ValueError: the phrase is not in the prompt, or beyond what the model reads; names the words there are.
    """
    encoded, length = _encoded(pipe, prompt)
    spans = [found.span() for found in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", prompt, re.IGNORECASE)]
    if not spans or not phrase.strip():
        raise ValueError(
            f"{phrase!r} is not in the prompt {prompt!r}; its words are {', '.join(dict.fromkeys(prompt.split()))}. Use "
            "them in the phrase, or give a box or mask, which need no phrase."
        )
    tokens = tuple(
        i
        for i, (start, end) in enumerate(encoded)
        if i < length and end > start and any(start < last and end > first for first, last in spans)
    )
    if not tokens:
        raise ValueError(f"{phrase!r} lies beyond the {length} tokens this model reads of {prompt!r}; shorten it.")
    return tokens


def text_tokens(pipe: Any, prompt: str) -> int:
    """How many text tokens of the prompt are real and not padding, with those the tokenizer puts around it."""
    encoded, length = _encoded(pipe, prompt)
    return min(len(encoded), length)


def _encoded(pipe: Any, prompt: str) -> tuple[list[tuple[int, int]], int]:
    """(start, end) in the prompt of every token, and how many tokens there may be.

    FLUX reads T5 (tokenizer_2) in its joint layers; Stable Diffusion 3 reads CLIP's tokens first, T5's after them.
    """
    flux = "Flux" in type(pipe).__name__
    tokenizer = pipe.tokenizer_2 if flux else pipe.tokenizer
    found = tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False)["offset_mapping"]
    return [(int(start), int(end)) for start, end in found], 512 if flux else tokenizer.model_max_length


def read_mask(path: Path) -> str:
    """A mask from a picture file: white, or opaque where it has transparency, is the subject. Packed as in recipes.

    Raises:
        ValueError: the file cannot be read as a picture.
    """
    try:
        with Image.open(path, formats=PICTURES) as file:
            image = file.getchannel("A") if "A" in file.getbands() else file.convert("L")
            image.thumbnail((STORED, STORED), Image.Resampling.BOX)
            return pack_mask(torch.from_numpy(np.asarray(image) >= 128))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is no picture that can be read"
        raise ValueError(f"cannot read the mask {path}: {reason}; give a black and white PNG file.") from None


def mask_picture(packed: str, size: tuple[int, int]) -> Image.Image:
    """A mask as a black and white picture of (width, height) pixels, to look at and to edit; `read_mask` reads it."""
    mask = Image.fromarray(unpack_mask(packed).numpy().astype(np.uint8) * 255, "L")
    return mask.resize(size, Image.Resampling.NEAREST)


def overlay(image: Image.Image, places: Sequence[Place], names: Sequence[str] = ()) -> Image.Image:
    """A picture with the box or mask of every subject laid over it, in a colour of its own.

    names: order of all subjects, which decides the colours; default: in the order of `places`.
    """
    shown = image.convert("RGB")
    order = list(names) or [place.subject for place in places]
    for place in places:
        colour = COLOURS[order.index(place.subject) % len(COLOURS)]
        if place.mask is not None:
            mask = mask_picture(place.mask, shown.size)
            tinted = Image.blend(shown, Image.new("RGB", shown.size, colour), 0.45)
            shown = Image.composite(tinted, shown, mask)
            corner = mask.getbbox()
            box: Box | None = None
        else:
            box, corner = place.box, None
        draw = ImageDraw.Draw(shown)
        if box is not None:
            corner = tuple(round(edge * side) for edge, side in zip(box, shown.size * 2, strict=True))  # type: ignore[assignment]
            draw.rectangle(corner, outline=colour, width=max(1, shown.width // 100))  # type: ignore[arg-type]
        if corner is not None:
            size = max(9, shown.height // 18)
            pad = size // 4
            at = (corner[0] + pad, corner[1])
            _, _, right, bottom = draw.textbbox(at, place.subject, font_size=size)
            draw.rectangle((*corner[:2], right + pad, bottom + pad), fill=colour)
            draw.text(at, place.subject, fill="white", font_size=size)
    return shown


def as_place(name: str, where: Any, folder: Path | None = None) -> Place:
    """A place as JSON says it: a box [x0, y0, x1, y1], {"mask": file or packed mask}, or null for attention maps.

    folder: where mask files are; None: only packed masks are taken.

    Raises:
        ValueError, TypeError: one sentence about what cannot be read.
    """
    if isinstance(where, Mapping) and set(where) == {"mask"} and isinstance(where["mask"], str):
        text = where["mask"]
        packed = text if re.match(r"\d+x\d+:", text) else None
        if packed is None and folder is None:
            raise ValueError(f"the mask of {name!r} is no packed mask: got {text[:40]!r}; give a story file beside it.")
        return Place(subject=name, mask=packed or read_mask(inside(folder or Path(), text)))
    numbers = isinstance(where, (list, tuple)) and len(where) == 4
    if numbers and all(isinstance(edge, (int, float)) and not isinstance(edge, bool) for edge in where):
        if any(abs(edge) > 2 for edge in where):  # first: whole numbers may be too large for a float
            raise ValueError(
                f"the box of {name!r} is in pixels: got {list(where)}; boxes are fractions of width and height from 0 to "
                "1, so divide by them."
            )
        x0, y0, x1, y1 = (float(edge) for edge in where)
        return Place(subject=name, box=(x0, y0, x1, y1))
    raise TypeError(
        f'the place of {name!r} must be a box [x0, y0, x1, y1], {{"mask": "file.png"}} or null, got {where!r}.'
    )


assert LARGEST_MASK >= STORED
