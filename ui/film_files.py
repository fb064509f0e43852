"""Films and pictures that a film is made from, as somebody sends them. Plain functions, no Gradio.

What is sent is kept under a name of ours: the digest of what it shows, which is what a film's recipe holds in place of it.
So a recipe alone finds it again. A film is copied, because to write it anew would change what it shows; pictures are
decoded and written anew, as those of the story tab are.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..pipelines.film import require_ffmpeg
from ..pipelines.film_pictures import digest_of, pictures_of
from ..pipelines.sheet import contact_sheet, sheet_frames
from .story_files import upright

__all__ = ["ENDING", "folder_in", "frames_kept", "keep_film", "kept_films", "kept_sheet"]

ENDING = ".mp4"
LARGEST = 2_000_000_000  # pixels of all frames together; they are read several times
SHOWN = 4  # frames on the sheet of what was sent


def folder_in(temporary: str | Path) -> Path:
    """Where a page keeps what was sent, in its own temporary folder; it is gone when the page ends."""
    return Path(temporary) / "own-films"


def keep_film(files: Sequence[Path], folder: Path) -> tuple[str, int]:
    """Keep a film, or pictures in the order of their names; gives the digest of what they show, and how many there are.

    Args:
        files: where they lie now, under the names they were sent with.
        folder: where they are kept.

    Raises:
        ValueError: in one sentence that says which file cannot be read, or is too large.
    """
    films = [file for file in files if file.suffix.lower() == ENDING]
    if not files or (films and len(files) > 1):
        raise ValueError("Choose one film (MP4), or pictures alone (PNG, JPEG or WebP), one for every frame.")
    require_ffmpeg()
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".", dir=folder))
    try:
        if films:
            kept = aside / "film.mp4"
            shutil.copyfile(films[0], kept)
            digest, count = _looked_at(kept, films[0].name)
        else:
            kept = _written(sorted(files, key=lambda file: file.name), aside / "pictures")
            count, digest = digest_of("film", kept)
        sheet = kept_sheet(folder, digest)
        if not sheet.exists():
            shown = sheet_frames(count, SHOWN)
            pictures = {i: one for i, one in enumerate(pictures_of("film", kept, (0, count))) if i in shown}
            told = PngInfo()
            told.add_text("frames", str(count))
            contact_sheet(pictures, shown).save(aside / "sheet.png", pnginfo=told)
            os.replace(kept, _home(folder, digest)[0 if films else 1])
            os.replace(aside / "sheet.png", sheet)
        return digest, count
    finally:
        shutil.rmtree(aside)


def kept_films(folder: Path, pictures: Mapping[str, str]) -> dict[str, Path]:
    """Of what a recipe was made from (digests by argument of `long_video`) the paths of all that is kept."""
    homes = {word: _home(folder, digest) for word, digest in pictures.items()}
    return {word: path for word, home in homes.items() for path in home if path.exists()}


def kept_sheet(folder: Path, digest: str) -> Path:
    """A picture with a few frames of something that is kept."""
    return folder / f"{digest}-sheet.png"


def frames_kept(folder: Path, digest: str) -> int:
    """How many frames something has that is kept; 0 if it is not there."""
    if not (sheet := kept_sheet(folder, digest)).exists():
        return 0
    with Image.open(sheet) as picture:
        return int(picture.info["frames"])


def _home(folder: Path, digest: str) -> tuple[Path, Path]:
    """Where a film of this digest is kept, and where pictures."""
    return folder / f"{digest}{ENDING}", folder / digest


def _looked_at(film: Path, name: str) -> tuple[str, int]:
    """The digest of what a film shows, and its frames. Raises ValueError, in which it is called by its name."""
    try:
        width, height = next(pictures_of("film", film, (0, 1))).size
        most = LARGEST // (width * height)
        count, digest = digest_of("film", film, most + 1)
    except (ValueError, OSError, RuntimeError, StopIteration):
        raise ValueError(f"The film {name} does not play; give an MP4 that is whole.") from None
    if count > most:
        raise ValueError(
            f"The film {name} is too large: more than {most:,} frames of {width} × {height} pixels; give a smaller or a "
            "shorter one."
        )
    return digest, count


def _written(pictures: Sequence[Path], to: Path) -> Path:
    """A folder of these pictures, written anew. Raises ValueError."""
    to.mkdir()
    left = LARGEST
    for i, file in enumerate(pictures):
        picture = upright(file, f"picture {file.name!r}")
        left -= picture.width * picture.height
        if left < 0:
            raise ValueError(f"These are too many pictures; give fewer, of at most {LARGEST:,} pixels in all.")
        picture.save(to / f"{i:06d}.png")
    return to
