"""The file a film grows in: one frame after another, a playable prefix at every moment.

Frames go to FFmpeg (imageio-ffmpeg brings it along) as they come; nothing keeps them. The MP4 is written in fragments of a
second or two beside its final name, and renamed when it is whole: a run that dies leaves `name.partial.mp4`, which plays up
to the last fragment. The recipe is in the file's comment, and beside it as JSON. `frames_of` reads a film back.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import written_whole

if TYPE_CHECKING:
    import numpy as np

    from .recipe import Recipe

__all__ = [
    "FilmFile", "check_film_path", "check_fits", "film_file", "frame_count", "frames_of", "partial", "read_comment",
    "require_ffmpeg",
]  # fmt: skip

FRAGMENT = 2  # seconds
SECONDS = 20  # to read a comment
LONGEST = 2**17 - 16  # bytes of a comment: it is an argument of FFmpeg, and Linux allows 128 KiB for one
# Nobody knows where a film comes from: it is read as MP4 whatever it holds, and names no other files or addresses.
AS_MP4 = ("-protocol_whitelist", "file", "-f", "mp4")


def require_ffmpeg() -> Any:
    """The module imageio_ffmpeg. Raises ValueError if it or its FFmpeg is not there."""
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise ValueError(
            "films are written with imageio-ffmpeg and its FFmpeg, which is not installed; run: pip install "
            "'reattend[video]'"
        ) from None
    return imageio_ffmpeg


def check_film_path(path: Path) -> None:
    """Raise ValueError if `path` names no MP4, or a folder."""
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"a film is written as MP4: got {str(path)!r}; give a name that ends in .mp4")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; give the name of a file")


def check_fits(recipe: Recipe) -> None:
    """Raise ValueError if the recipe is too long for the comment of a film."""
    if (length := len(recipe.to_json())) > LONGEST:
        raise ValueError(
            f"the recipe is too long to be kept in the film: got {length:,} bytes, at most {LONGEST:,} are allowed; give "
            "fewer or shorter later prompts, or fewer controlnet_frame_indices"
        )


def partial(path: Path) -> Path:
    """Where the film is while it is not whole."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


class FilmFile:
    """An open film; `write` takes frames in order."""

    def __init__(self, path: Path, width: int, height: int, fps: int, comment: str):
        self.frames = 0
        self._path = path
        self._shape = (height, width, 3)
        self._sink = require_ffmpeg().write_frames(
            str(path.absolute()),  # a name may look like an option or a protocol
            (width, height),
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=2,  # of yuv420p; sides are multiples of 8 anyway
            ffmpeg_log_level="error",
            output_params=[
                *("-crf", "17", "-preset", "medium", "-g", str(fps * FRAGMENT)),
                *("-movflags", "frag_keyframe+empty_moov+default_base_moof", "-flush_packets", "1"),
                *("-metadata", f"comment={comment}"),
            ],
        )
        self._sink.send(None)

    def write(self, frame: np.ndarray) -> None:
        """Add a frame: uint8, shape (H, W, 3). Raises OSError if FFmpeg takes no more, as when the disk is full."""
        import numpy as np

        if frame.shape != self._shape or frame.dtype != np.uint8:
            raise ValueError(f"a frame of this film is uint8 of shape {self._shape}, got {frame.dtype} {frame.shape}.")
        try:
            self._sink.send(np.ascontiguousarray(frame))
        except (OSError, StopIteration) as problem:  # the latter if it is tried once more
            raise OSError(
                f"cannot write {self._path}: FFmpeg stopped after {self.frames} frames, mostly because the disk is full "
                f"({shutil.disk_usage(self._path.parent).free // 2**20:,} MiB are free); make room and start again, which "
                "goes on where it was; what was written until then plays"
            ) from problem
        self.frames += 1

    def close(self) -> None:
        self._sink.close()


@contextmanager
def film_file(path: Path, width: int, height: int, recipe: Recipe) -> Iterator[FilmFile]:
    """Write a film of recipe.video.fps; whole at its path when the block ends well, else left as `partial(path)`.

    Raises:
        ValueError: if the folder cannot be made, the name is no MP4 or FFmpeg is missing.
        OSError: if the disk is full or FFmpeg failed.
    """
    check_film_path(path)
    video = recipe.video
    if video is None:
        raise ValueError("the recipe has no video; say how many frames")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose another output path") from error
    unfinished = partial(path)
    film = FilmFile(unfinished, width, height, video.fps, recipe.to_json())
    try:
        yield film
    finally:
        film.close()
    found = frame_count(unfinished)  # FFmpeg may have failed after it took all of them
    if found != video.frames:
        raise OSError(
            f"the film {path} has {found} of {video.frames} frames; look for what FFmpeg said, most often that the disk is "
            "full"
        )
    with written_whole(path.with_name(path.name + ".json")) as (aside,):
        aside.write_text(recipe.to_json() + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def frame_count(path: Path) -> int:
    """Frames of an MP4, counted without decoding them, so that nobody waits for long; 0 if it does not play."""
    command = [require_ffmpeg().get_ffmpeg_exe(), *("-v", "error", "-nostats", "-progress", "-"), *AS_MP4]
    command += ["-i", str(path.absolute()), *("-map", "0:v:0", "-c", "copy", "-f", "null", os.devnull)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    counts = [line.partition(b"=")[2] for line in done.stdout.splitlines() if line.startswith(b"frame=")]
    return int(counts[-1]) if counts and not done.returncode else 0


def frames_of(path: Path, most: int | None = None) -> Iterator[np.ndarray]:
    """The frames of a film one after another, at most so many: uint8, (H, W, 3). Raises ValueError if it does not play."""
    import numpy as np

    reader = require_ffmpeg().read_frames(str(path.absolute()), input_params=list(AS_MP4))
    try:
        width, height = next(reader)["size"]
    except (OSError, StopIteration) as error:
        raise ValueError(f"{path} does not play: {' '.join(str(error).split())[:160]}; give an MP4") from None
    for i, data in enumerate(reader):
        if most is not None and i >= most:
            break
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
    reader.close()


def read_comment(path: Path) -> str:
    """The comment of an MP4. Raises ValueError if it cannot be read or has none."""
    command = [require_ffmpeg().get_ffmpeg_exe(), "-v", "error", *AS_MP4]
    command += ["-i", str(path.absolute()), "-f", "ffmetadata", "-"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path} cannot be read as MP4 in {SECONDS} s; give a file that reattend wrote") from None
    found = _comment(done.stdout.decode("utf-8", errors="replace"))
    if done.returncode or found is None:
        raise ValueError(f"{path} holds no recipe: it is no MP4 that reattend wrote, or its comment was removed")
    return found


def _comment(text: str) -> str | None:
    """The value of `comment` in FFmpeg's metadata text, where a backslash hides =, ;, #, itself and line ends."""
    values: dict[str, str] = {}
    word, name = "", None
    hidden = False
    for letter in text:
        if hidden:
            word, hidden = word + letter, False
        elif letter == "\\":
            hidden = True
        elif letter == "=" and name is None:
            word, name = "", word
        elif letter == "\n":
            if name is not None:
                values[name] = word
            word, name = "", None
        else:
            word += letter
    return values.get("comment")
