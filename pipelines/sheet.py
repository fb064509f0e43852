"""A contact sheet: frames from all over a film in a grid, each with its number, so that one look tells how the film goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from .files import written_whole
from .film import frames_of

if TYPE_CHECKING:
    import numpy as np

__all__ = ["contact_sheet", "film_sheet", "save_sheet", "sheet_frames"]

COUNT = 12  # frames on a sheet
COLUMNS = 4
SIDE = 192  # longest side of a frame on the sheet, in pixels; smaller frames are enlarged in whole steps
GAP, LETTERS = 8, 14  # pixels between frames, and of the numbers under them
PAPER, INK, MISSING = "white", (70, 70, 70), (228, 230, 235)


def sheet_frames(frames: int, count: int = COUNT) -> tuple[int, ...]:
    """`count` frames of a film at even distances, the first and the last among them; all of a shorter film.

    Raises ValueError for counts below 1.
    """
    if frames < 1 or count < 1:
        raise ValueError(f"a sheet shows at least one frame of at least one: got {count} of {frames}")
    if count >= frames:
        return tuple(range(frames))
    return tuple(round(i * (frames - 1) / max(1, count - 1)) for i in range(count))


def contact_sheet(
    pictures: Mapping[int, Image.Image], shown: Sequence[int], size: tuple[int, int] | None = None
) -> Image.Image:
    """The frames of a film in a grid, row by row, each with its number below.

    Args:
        pictures: by number of the frame; where one is missing, its place is grey.
        shown: the numbers of the frames to show, from `sheet_frames`.
        size: width and height of the film's frames, in pixels; None: as the pictures.

    Raises ValueError if there is nothing that tells the size.
    """
    if size is None:
        if not pictures:
            raise ValueError("a sheet without pictures needs the size of the frames")
        size = next(iter(pictures.values())).size
    scale = SIDE / max(size)
    scale = max(1, int(scale)) if scale >= 1 else scale  # whole steps keep small pictures crisp
    width, height = (max(1, round(side * scale)) for side in size)
    columns = min(COLUMNS, len(shown))
    cell = (width + GAP, height + LETTERS + 2 * GAP)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, -(-len(shown) // columns) * cell[1] + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LETTERS)
    for i, frame in enumerate(shown):
        left, top = GAP + i % columns * cell[0], GAP + i // columns * cell[1]
        if frame in pictures:
            kind = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
            sheet.paste(pictures[frame].convert("RGB").resize((width, height), kind), (left, top))
        else:
            draw.rectangle((left, top, left + width - 1, top + height - 1), fill=MISSING)
        draw.text((left + width / 2, top + height + GAP / 2), f"frame {frame:,}", fill=INK, font=font, anchor="ma")
    return sheet


def film_sheet(frames: Path | Iterable[np.ndarray], total: int, count: int = COUNT) -> Image.Image:
    """The contact sheet of a film: of an MP4, or of its frames (uint8, each (H, W, 3)) in order.

    total: frames of the film.

    Raises ValueError if the film does not play, or is shorter.
    """
    shown = sheet_frames(total, count)
    wanted = set(shown)
    source = frames_of(frames) if isinstance(frames, Path) else frames
    pictures = {i: Image.fromarray(frame) for i, frame in enumerate(source) if i in wanted}
    if len(pictures) < len(shown):
        raise ValueError(f"the film has fewer than {total} frames, so its sheet cannot be made")
    return contact_sheet(pictures, shown)


def save_sheet(film: Path, total: int, path: Path, count: int = COUNT) -> None:
    """Write the contact sheet of an MP4 as PNG. Raises as `film_sheet` and `written_whole`."""
    sheet = film_sheet(film, total, count)
    with written_whole(path) as (aside,):
        sheet.save(aside, "PNG")
