"""The files of the story tab: pictures of one's own, and stories as they travel. Plain functions, no Gradio.

A picture that somebody sends is decoded and written anew, under a name of ours: the digest of its pixels, so that the same
picture is the same file. A story is a JSON file; with pictures it is a zip of story.json and the pictures beside it,
which `reattend story` makes once it is unpacked. Of what a loaded story names only what came with it is opened.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from PIL import Image, ImageOps

from ..pipelines.files import PICTURES, free_path, written_whole
from ..pipelines.recipe import FILE_SIZE
from ..pipelines.script import Script
from ..pipelines.told import beside
from .jobs import one_line
from .story_form import fill_story_form

__all__ = ["KEPT", "keep_picture", "load_story", "pack_story", "save_story", "upright"]

KEPT = 1536  # pixels; longest side of a picture that is kept, so that a story with several can still be uploaded
LARGEST = 50_000_000  # pixels of a picture that is read
PICTURE_BYTES = 50 * 2**20
STORY_BYTES = FILE_SIZE * 10
STORY = "story.json"


def keep_picture(source: Path | IO[bytes], who: str, folder: Path) -> str:
    """Write a picture anew into a folder, as PNG and at most KEPT pixels a side; gives the path.

    Raises:
        ValueError: in one sentence that names the character `who`, if it is no picture that can be read, or too large.
    """
    image = upright(source, f"picture for {who!r}")
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    path = folder / f"{digest}.png"
    if not path.exists():
        with written_whole(path) as (aside,):
            image.save(aside, format="PNG")
    return str(path)


def upright(source: Path | IO[bytes], what: str) -> Image.Image:
    """A picture as RGB, upright and at most KEPT pixels a side. Raises ValueError in one sentence that calls it `what`."""
    try:
        with Image.open(source, formats=PICTURES) as file:
            size = file.size
            image = ImageOps.exif_transpose(file).convert("RGB") if math.prod(size) <= LARGEST else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise ValueError(f"The {what} cannot be read; give a PNG, JPEG or WebP file that is whole.") from None
    if image is None:
        raise ValueError(
            f"The {what} is too large: {size[0]} × {size[1]} pixels; give one of at most {LARGEST:,} pixels."
        )
    image.thumbnail((KEPT, KEPT), Image.Resampling.LANCZOS)
    return image


def save_story(script: Script, folder: Path) -> Path:
    """Write a story that was not made yet into a new file, JSON or zip, named after its first caption."""
    caption = script.panels[0].prompt
    if any(one.picture is not None for one in script.subjects):
        pack_story(script, file := free_path(folder, caption, ".zip"))
        return file
    file = free_path(folder, caption, ".json")
    with written_whole(file) as (aside,):
        aside.write_text(script.to_json() + "\n", encoding="utf-8")
    return file


def pack_story(script: Script, file: Path) -> None:
    """Write a zip of the story and its pictures; the same story gives the same bytes."""
    named = beside(script)
    with written_whole(file) as (aside,), zipfile.ZipFile(aside, "w") as archive:
        archive.writestr(zipfile.ZipInfo(STORY), named.to_json() + "\n")
        for one, told in zip(script.subjects, named.subjects, strict=True):
            if one.picture is not None and told.picture is not None:
                archive.writestr(zipfile.ZipInfo(told.picture), Path(one.picture).read_bytes())


def load_story(files: Sequence[Path], models: Sequence[str], folder: Path) -> tuple[dict[str, Any], str]:
    """Read a story from what was sent: a zip, or a JSON file and the pictures it names.

    Args:
        files: where they lie now, under the names they were sent with.
        folder: where pictures are kept.

    Returns:
        The form's fields (none if it cannot be used), and what is wrong, or "".
    """
    try:
        content, other = _sent(files)
        script = Script.from_json(content.decode("utf-8"))
        return fill_story_form(_with_pictures(script, other, folder), models), ""
    except UnicodeDecodeError:
        return {}, "The file holds no story: it is no text; load the story.json of one that was made."
    except (ValueError, TypeError, OSError) as error:
        line = one_line(error)
        for file in files:
            line = line.replace(str(file), file.name)  # the server's own path is nobody's business
        return {}, line


def _with_pictures(script: Script, other: Callable[[str], bytes | None], folder: Path) -> Script:
    """The story with those of its pictures that were sent with it, kept in `folder`."""
    subjects = []
    for one in script.subjects:
        if one.picture is not None:
            content = other(one.picture)
            if content is None:
                raise ValueError(
                    f"The story has a picture for {one.name!r}, {PurePosixPath(one.picture).name}, which was not sent with "
                    "it; choose the .json and its pictures together, or the .zip that this page makes."
                )
            one = replace(one, picture=keep_picture(io.BytesIO(content), one.name, folder))
        subjects.append(one)
    return replace(script, subjects=tuple(subjects))


def _sent(files: Sequence[Path]) -> tuple[bytes, Callable[[str], bytes | None]]:
    """The story's JSON, and what gives the bytes of another file by the name the story has for it (None: not there)."""
    stories = [file for file in files if file.suffix.lower() in (".json", ".zip")]
    if len(stories) != 1:
        raise ValueError("Choose one story: a .zip, or a .json and with it the pictures that it names.")
    story = stories[0]
    if story.suffix.lower() == ".json":
        there = {file.name: file for file in files}

        def named(name: str) -> bytes | None:
            file = there.get(PurePosixPath(name).name)
            return None if file is None else _limited(file.open("rb"), file.name, PICTURE_BYTES)

        return _limited(story.open("rb"), story.name, STORY_BYTES), named
    return _unpacked(story)


def _unpacked(story: Path) -> tuple[bytes, Callable[[str], bytes | None]]:
    """As `_sent`, of a zip. Nothing is written, and no more is read than a story and its pictures may have."""

    def read(name: str, most: int) -> bytes | None:
        try:
            with zipfile.ZipFile(story) as archive:
                return _limited(archive.open(name), PurePosixPath(name).name, most)
        except KeyError:
            return None
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError):  # broken, or encrypted
            raise ValueError(
                f"The file {story.name} is no zip that can be read; choose one that this page made."
            ) from None

    try:
        with zipfile.ZipFile(story) as archive:
            if any(one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for one in archive.infolist()):
                raise zipfile.BadZipFile("ours are stored; other ways to pack bring decoders and errors of their own")
            found = [name for name in archive.namelist() if PurePosixPath(name).name == STORY]
    except zipfile.BadZipFile:
        raise ValueError(f"The file {story.name} is no zip that can be read; choose one that this page made.") from None
    if len(found) != 1:
        raise ValueError(
            f"The file {story.name} must hold one {STORY}, it holds {len(found)}; choose a zip that this page made."
        )
    content = read(found[0], STORY_BYTES)
    assert content is not None, "its name was in the list"
    return content, lambda name: read(str(PurePosixPath(found[0]).parent / name), PICTURE_BYTES)


def _limited(file: IO[bytes], what: str, most: int) -> bytes:
    """All of a file, which is closed. Raises ValueError if it is longer than `most` bytes."""
    with file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"The file {what} is too big: over {most:,} bytes.")
    return content
