"""Files appear whole or not at all: write aside in the same folder, then rename. Pictures are read from a few formats.

A folder that long work goes on in can be held, so that the same work is not begun in it twice.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ENDINGS", "PICTURES", "check_writable", "free_path", "held", "hold", "inside", "opened", "written_whole"]

log = logging.getLogger(__name__)

PICTURES = ["PNG", "JPEG", "WEBP"]  # formats that are read; of others Pillow starts programs
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")  # of their files
LOCK = ".lock"


@contextlib.contextmanager
def written_whole(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Give one temporary path for each of `paths`; at the end rename them all, after an error (or Ctrl-C) delete them.

    The folders are made if need be. Existing files are replaced only at the end.

    Raises:
        ValueError: if a folder cannot be made or a path is a folder.
    """
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cannot write {path}: {error.strerror}: {path.parent}; choose another output path"
            ) from error
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder; give the name of a file")
    mark = secrets.token_hex(4)
    asides = tuple(path.with_name(f".{path.name}.{mark}.part") for path in paths)
    try:
        yield asides
        for aside, path in zip(asides, paths, strict=True):
            os.replace(aside, path)
    except PermissionError as error:
        raise ValueError(f"cannot write {error.filename}: {error.strerror}; choose another output path") from error
    finally:
        for aside in asides:
            aside.unlink(missing_ok=True)


def free_path(folder: Path, text: str, suffix: str, others: Sequence[str] = ()) -> Path:
    """A path in `folder` that does not exist yet, named after `text`: letters and digits, at most 48 of them.

    others: in place of `suffix` they give names that must not exist either.
    """
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower())[:48].strip("-") or "picture"
    names = (f"{stem}-{i}" if i > 1 else stem for i in range(1, 10**9))
    free = (name for name in names if not any((folder / (name + end)).exists() for end in (suffix, *others)))
    return folder / (next(free) + suffix)


def inside(folder: Path, name: str) -> Path:
    """The file that another file in `folder` names. Raises ValueError if it lies elsewhere."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} lies outside {folder}; put it beside the file that names it, and give its name alone")
    return path


def check_writable(path: Path) -> None:
    """Raise ValueError if `path` could not be written, so that this shows before long work and not after it."""
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if there != path and not there.is_dir():
        raise ValueError(f"cannot write {path}: {there} is a file, not a folder; choose another output path")
    if not os.access(there, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission to write {there}; choose another output path")


def hold(folder: Path) -> IO[str]:
    """Keep other processes out of a folder until the file given is closed, or this process has ended, in whatever way.

    The folder is made if need be. Where there are no such locks nobody is kept out: without `fcntl`, as on Windows, and,
    with a warning, on some network file systems.

    Raises:
        ValueError: if another process holds the folder, or it cannot be written.
    """
    check_writable(folder)
    busy = ValueError(f"another process works in {folder}; wait for its end, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except FileNotFoundError:  # the one that `held` it has just taken the folder away
        raise busy from None
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}; choose another folder") from None
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: that would live on in children
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise busy from None
        log.warning("%s cannot be locked (%s): start nothing else that writes there", folder, error.strerror)
    if not os.fstat(file.fileno()).st_nlink:  # the same, between our opening and our locking
        file.close()
        raise busy
    return file


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """`hold` a folder for the length of a with block, in which it may be removed; nothing but what was put there is left.

    Raises:
        ValueError: as `hold` does.
    """
    file = hold(folder)
    try:
        yield
    finally:
        ours = os.fstat(file.fileno()).st_nlink > 0  # else it went with the folder, and what is there now is another's
        if fcntl is None:
            file.close()  # Windows removes no open file
        if ours:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()  # before the lock is given back: else it could be another's
                folder.rmdir()  # fails if anything else is there
        file.close()


def opened(path: str | Path, what: str = "reference picture") -> Image.Image:
    """A picture from a file, upright and as RGB. Raises ValueError in one sentence that calls it `what`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=PICTURES) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is no picture that can be read"
        raise ValueError(f"cannot read the {what} {path}: {reason}; give a PNG, JPEG or WebP file.") from None
