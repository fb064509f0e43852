"""A film grows, is whole or says it is not, and carries its recipe."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from reattend.pipelines.film import (
    LONGEST,
    FilmFile,
    check_fits,
    film_file,
    frame_count,
    frames_of,
    partial,
    read_comment,
    require_ffmpeg,
)
from reattend.pipelines.recipe import Recipe
from reattend.pipelines.videos import Video

WORDS = 'a "red" cat = 1; 2 # 3 \\ 4\nand a dög'


def recipe(frames: int, **more) -> Recipe:
    return Recipe(prompt=WORDS, video=Video(frames=frames, fps=4, **more))


def frame(i: int) -> np.ndarray:
    return np.full((24, 32, 3), 20 * i, dtype=np.uint8)


def decoded(path) -> np.ndarray:
    reader = imageio_ffmpeg.read_frames(str(path))
    next(reader)
    return np.stack([np.frombuffer(data, np.uint8).reshape(24, 32, 3) for data in reader])


def test_a_film_has_its_frames_in_order_and_its_recipe(tmp_path):
    path, made = tmp_path / "new" / "cat.mp4", recipe(11, later=((4, "a dog"),), blend=2)
    with film_file(path, 32, 24, made) as film:
        for i in range(11):
            film.write(frame(i))
    found = decoded(path).astype(int)
    assert found.shape == (11, 24, 32, 3)
    assert np.abs(found.mean((1, 2, 3)) - 20 * np.arange(11)).max() < 4  # lossy, but in order
    assert Recipe.read(path) == made == Recipe.read(tmp_path / "new" / "cat.mp4.json")
    assert not partial(path).exists()


def test_a_film_that_was_not_finished_keeps_what_it_has(tmp_path):
    path = tmp_path / "cat.mp4"
    path.write_bytes(b"an older film")

    def write(count: int, stop: bool = False) -> None:
        with film_file(path, 32, 24, recipe(11)) as film:
            for i in range(count):
                film.write(frame(i))
            if stop:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(5, stop=True)
    assert len(decoded(partial(path))) == 5
    assert path.read_bytes() == b"an older film"
    with pytest.raises(OSError, match="3 of 11 frames"):
        write(3)


@pytest.mark.parametrize("name", ["-cat.mp4", "cat: the film.mp4"])
def test_odd_names_are_no_options_or_protocols(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    with film_file(path, 32, 24, recipe(3)) as film:
        for i in range(3):
            film.write(frame(i))
    assert len(decoded(path.absolute())) == 3 and Recipe.read(path) == recipe(3)
    assert len(list(frames_of(path))) == 3


def test_frames_are_counted_without_decoding_and_only_films_are_read(tmp_path):
    path = tmp_path / "cat.mp4"
    with film_file(path, 32, 24, recipe(11)) as film:
        for i in range(11):
            film.write(frame(i))
    assert frame_count(path) == 11 == imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    path.write_bytes(path.read_bytes()[:-300])  # cut off in the last fragment
    assert frame_count(path) <= 11
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{path}\n#EXT-X-ENDLIST\n")
    assert frame_count(playlist) == 0
    with pytest.raises(ValueError, match="does not play"):
        list(frames_of(playlist))
    with pytest.raises(ValueError, match="holds no recipe"):
        Recipe.read(playlist)


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from test_film import film_file, recipe
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # FFmpeg inherits it and sees a write that fails
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
draw = np.random.default_rng(0)
with film_file(Path(sys.argv[1]), 64, 64, recipe(2000)) as film:
    for i in range(2000):
        film.write(draw.integers(0, 255, (64, 64, 3), np.uint8))
"""


def test_a_full_disk_is_told_and_leaves_a_film_that_plays(tmp_path):
    path = tmp_path / "cat.mp4"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)],
        timeout=120,
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
    )
    assert done.returncode == 1 and not path.exists()
    assert "FFmpeg stopped after" in done.stderr and "make room and start again" in done.stderr
    assert 20 < frame_count(partial(path)) < 2000


def test_the_longest_recipe_fits_into_a_film(tmp_path):
    path, later = tmp_path / "cat.mp4", [[frame, "a blue car"] for frame in range(1, 2350)]
    longest = replace(recipe(2350), video=Video(frames=2350, later=later))
    longest = replace(longest, negative="x" * (LONGEST - len(longest.to_json())))
    check_fits(longest)
    film = FilmFile(path, 32, 24, 8, longest.to_json())
    film.write(frame(0))
    film.close()
    assert read_comment(path) == longest.to_json()
    with pytest.raises(ValueError, match="too long to be kept"):
        check_fits(replace(longest, negative=longest.negative + "x"))


def test_without_ffmpeg_it_says_what_to_install(monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(ValueError, match="is not installed; run: pip install"):
        require_ffmpeg()


def test_a_film_whose_ffmpeg_died_is_not_whole(tmp_path):
    path = tmp_path / "cat.mp4"

    def write() -> None:
        with film_file(path, 32, 24, recipe(100)) as film:
            for i in range(100):
                film.write(frame(i % 12))
            ffmpeg = film._sink.gi_frame.f_locals["p"]
            for _ in range(200):
                if partial(path).exists() and partial(path).stat().st_size:
                    break
                time.sleep(0.05)
            ffmpeg.kill()  # the end of the film is still with it
            ffmpeg.wait()

    with pytest.raises(OSError, match=r"has \d+ of 100 frames; look for what FFmpeg said"):
        write()
    assert not path.exists() and partial(path).exists()


def test_a_killed_process_leaves_a_playable_prefix(tmp_path):
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_film import film_file, frame, recipe
from pathlib import Path
with film_file(Path(sys.argv[1]), 32, 24, recipe(100)) as film:
    for i in range(60):
        film.write(frame(i % 12))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "cat.mp4"
    done = subprocess.run([sys.executable, "-c", code, str(path)], timeout=120)
    assert done.returncode == -signal.SIGKILL and not path.exists()
    found = 0
    for _ in range(50):  # FFmpeg outlives it for a moment and writes what it was given
        time.sleep(0.1)
        with contextlib.suppress(StopIteration, OSError):
            found = len(decoded(partial(path)))
        if found >= 56:
            break
    assert 56 <= found <= 60  # a few of these small frames were still on their way to FFmpeg


def test_bad_names_frames_and_files_get_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="ends in .mp4"), film_file(tmp_path / "cat.gif", 32, 24, recipe(3)):
        pass
    with pytest.raises(ValueError, match="uint8 of shape"), film_file(tmp_path / "cat.mp4", 32, 24, recipe(3)) as film:
        film.write(frame(0)[:3])
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="it is a folder"), film_file(tmp_path / "folder.mp4", 32, 24, recipe(3)):
        pass
    (tmp_path / "file").write_text("x")
    problem = pytest.raises(ValueError, match="choose another output path")
    with problem, film_file(tmp_path / "file" / "cat.mp4", 32, 24, recipe(3)):
        pass
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="holds no recipe"):
        Recipe.read(tmp_path / "broken.mp4")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"frames": 0}, "frames is out of range"),
        ({"fps": 0}, "fps is out of range"),
        ({"blend": -1}, "blend is out of range"),
        ({"later": ((0, "a dog"),)}, "frame of a later prompt is out of range"),
        ({"later": ((5, "a dog"), (5, "a cat"))}, "need frames that grow"),
        ({"later": ((64, "a dog"),)}, "need frames that grow, from 1 to 63"),
        ({"later": ((5, " "),)}, "is empty"),
        ({"later": ((5, "a dog"), (8, "a cow")), "blend": 4}, "blend is 4 frames, .* from frames 5 and 8 are 3 apart"),
        ({"later": ((5, "a"), (20, "b"), (22, "c")), "blend": 15}, "blend is 15 frames, .* 20 and 22 are 2 apart"),
    ],
)
def test_bad_videos_get_one_sentence(settings, problem):
    with pytest.raises(ValueError, match=problem):
        Video(**settings)
    with pytest.raises(TypeError, match="list of"):
        Video(later="a dog")
    with pytest.raises(ValueError, match="unknown entries: got length"):
        Video.from_settings({"length": 3})


def test_prompts_take_over_at_once_or_little_by_little():
    video = Video(frames=20, later=((4, "b"), (10, "c")), blend=3)
    assert video.weights(3) == ((0, 1.0),)
    assert [round(video.weights(i)[-1][1], 2) for i in range(4, 8)] == [0.25, 0.5, 0.75, 1.0]
    assert video.weights(4) == ((0, 0.75), (1, 0.25)) and video.weights(10)[0] == (1, 0.75)
    assert Video(frames=20, later=((4, "b"),)).weights(4) == ((1, 1.0),)


def test_no_change_that_is_as_long_as_allowed_makes_a_prompt_jump():
    video = Video(frames=12, later=((2, "b"), (5, "c"), (10, "d")), blend=3)  # more than before 2 or after 10
    for frame in range(1, 12):
        now, before = dict(video.weights(frame)), dict(video.weights(frame - 1))
        assert all(abs(now.get(i, 0) - before.get(i, 0)) < 0.25 + 1e-9 for i in range(4))


def test_a_video_survives_json():
    made = recipe(30, later=((4, "a dog"), (9, "a cow")))
    assert Recipe.from_json(made.to_json()) == made
    assert "Frames: 30" in made.parameters and "FPS: 4" in made.parameters
    with pytest.raises(TypeError, match="video must be an object"):
        Recipe.from_json(made.to_json().replace('"video": {', '"video": 3, "x": {').replace('"x"', '"made_with"'))
