"""Pictures that a film is made from: a list of them, a folder of picture files, or another film.

They are read one after another, as RGB, when they are needed. A film's recipe holds their digest in place of them, so that a
film that goes on, and every rank, is known to have been given the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from .events import CancelToken
from .files import ENDINGS, opened
from .film import frame_count, frames_of

__all__ = ["Pictures", "count_of", "digest_of", "picture_files", "pictures_of"]

Pictures = Sequence[Image.Image] | str | Path


def pictures_of(name: str, given: Pictures, span: tuple[int, int | None] | None = None) -> Iterator[Image.Image]:
    """The pictures, or those from `span[0]` to before `span[1]`, one after another.

    Args:
        name: what they were given as, for messages.
        given: pictures, the path of an MP4, or that of a folder of PNG, JPEG or WebP files, taken in the order of names.
        span: which ones; None = all.

    Raises:
        ValueError: a file that is not there or cannot be read.
        TypeError: neither pictures nor a path.
    """
    first, end = span or (0, None)
    if isinstance(given, (str, Path)):
        path = _path(name, given)
        if path.is_dir():
            yield from (opened(file, "picture") for file in picture_files(path)[first:end])
        else:
            yield from (Image.fromarray(frame) for frame in islice(frames_of(path, end), first, None))
        return
    yield from (picture.convert("RGB") for picture in _listed(name, given)[first:end])


def count_of(name: str, given: Pictures) -> int:
    """How many pictures there are, without decoding any: of an MP4 what the file says. Raises what `pictures_of` raises."""
    if not isinstance(given, (str, Path)):
        return len(_listed(name, given))
    path = _path(name, given)
    if path.is_dir():
        return len(picture_files(path))
    if not (count := frame_count(path)):
        raise ValueError(f"{path} does not play; give an MP4")
    return count


def _path(name: str, given: str | Path) -> Path:
    path = Path(given).expanduser()
    if not path.exists():
        raise ValueError(f"{name} {path} is not there; give an MP4 or a folder of pictures")
    return path


def _listed(name: str, given: Sequence[Image.Image]) -> Sequence[Image.Image]:
    others = [x for x in given if not isinstance(x, Image.Image)] if isinstance(given, (list, tuple)) else [given]
    if others:
        raise TypeError(
            f"{name} must be a list of PIL pictures, an MP4 or a folder of pictures, got {type(others[0]).__name__}"
        )
    return given


def picture_files(folder: Path) -> list[Path]:
    """The picture files of a folder, in the order of their names. Raises ValueError if there are none."""
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
    if not found:
        raise ValueError(f"the folder {folder} holds no pictures; put PNG, JPEG or WebP files into it, or give an MP4")
    return found


def digest_of(
    name: str, given: Pictures, most: int | None = None, cancel: CancelToken | None = None
) -> tuple[int, str]:
    """How many pictures there are, and the SHA-256 of what they show. Raises what `pictures_of` raises.

    most: after so many, none is read.
    cancel: asked before every picture; raises Cancelled.
    """
    total, count = hashlib.sha256(), 0
    for picture in pictures_of(name, given, (0, most)):
        if cancel is not None:
            cancel.check()
        total.update(f"{picture.width} {picture.height} ".encode())
        total.update(picture.tobytes())
        count += 1
    return count, total.hexdigest()
