"""Films and pictures that a film is made from, on their way into the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reattend.pipelines import Recipe, Video
from reattend.pipelines.film import film_file
from reattend.pipelines.film_pictures import digest_of, pictures_of
from reattend.ui import film_files
from reattend.ui.film_files import frames_kept, keep_film, kept_films, kept_sheet


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sent") / "..; cat.mp4"
    with film_file(path, 32, 16, Recipe(prompt="a cat", video=Video(frames=6))) as file:
        for i in range(6):
            file.write(np.full((16, 32, 3), 40 * i, np.uint8))
    return path


def pictures(folder: Path, count: int, kind: str = "png") -> list[Path]:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (6, 4), (40 * i, 0, 0)).save(folder / f"{i}.{kind}")
    return sorted(folder.iterdir())


def test_a_film_is_kept_as_it_is_under_the_digest_that_recipes_hold(film, tmp_path):
    digest, count = keep_film([film], tmp_path / "kept")
    assert (count, digest) == digest_of("video", film) and count == 6
    found = kept_films(tmp_path / "kept", {"video": digest, "conditioning_frames": 64 * "0"})
    assert found == {"video": tmp_path / "kept" / f"{digest}.mp4"}
    assert found["video"].read_bytes() == film.read_bytes()
    assert frames_kept(tmp_path / "kept", digest) == 6 and frames_kept(tmp_path / "kept", 64 * "0") == 0
    assert kept_sheet(tmp_path / "kept", digest).exists()
    assert keep_film([film], tmp_path / "kept") == (digest, count)
    assert len(list((tmp_path / "kept").iterdir())) == 2  # nothing is left aside


def test_pictures_are_written_anew_in_the_order_of_their_names(tmp_path):
    files = pictures(tmp_path / "sent", 3)
    digest, count = keep_film(files[::-1], tmp_path / "kept")
    (kept,) = kept_films(tmp_path / "kept", {"video": digest}).values()
    assert count == 3 and (3, digest) == digest_of("video", tmp_path / "sent") == digest_of("video", kept)
    assert [file.name for file in sorted(kept.iterdir())] == ["000000.png", "000001.png", "000002.png"]
    assert [picture.getpixel((0, 0))[0] for picture in pictures_of("video", kept)] == [0, 40, 80]


def test_what_cannot_be_used_is_one_sentence_and_keeps_nothing(film, tmp_path, monkeypatch):
    files, kept = pictures(tmp_path / "sent", 3), tmp_path / "kept"
    (broken := tmp_path / "broken.mp4").write_bytes(b"no film")
    (cut := tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:40])
    (text := tmp_path / "text.png").write_text("<svg/>")
    for sent, words in (
        ([broken], "The film broken.mp4 does not play; give an MP4 that is whole."),
        ([cut], "The film cut.mp4 does not play; give an MP4 that is whole."),
        ([text], "The picture 'text.png' cannot be read; give a PNG, JPEG or WebP file that is whole."),
        ([film, *files], "Choose one film"),
        ([], "Choose one film"),
    ):
        with pytest.raises(ValueError) as error:
            keep_film(sent, kept)
        assert str(error.value).startswith(words) and str(tmp_path) not in str(error.value)
    monkeypatch.setattr(film_files, "LARGEST", 32 * 16 * 5)
    with pytest.raises(ValueError, match="is too large: more than 5 frames of 32 × 16 pixels"):
        keep_film([film], kept)
    monkeypatch.setattr(film_files, "LARGEST", 50)
    with pytest.raises(ValueError, match="too many pictures; give fewer, of at most 50 pixels in all"):
        keep_film(files, kept)
    assert not list(kept.iterdir())
