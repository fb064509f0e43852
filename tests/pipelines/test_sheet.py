"""A contact sheet shows the frames it says, in order, from pictures, from frames and from a file."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from reattend.pipelines.film import film_file
from reattend.pipelines.recipe import Recipe
from reattend.pipelines.sheet import GAP, LETTERS, MISSING, SIDE, contact_sheet, film_sheet, save_sheet, sheet_frames
from reattend.pipelines.videos import Video


def frame(i: int, side: tuple[int, int] = (24, 32)) -> np.ndarray:
    return np.full((*side, 3), (10 * i) % 250, dtype=np.uint8)


def tones(sheet: Image.Image, size: tuple[int, int], count: int) -> list[int]:
    """The value in the middle of each frame on the sheet."""
    columns = (sheet.width - GAP) // (size[0] + GAP)
    places = [(i % columns, i // columns) for i in range(count)]
    cell = (size[0] + GAP, size[1] + LETTERS + 2 * GAP)
    return [sheet.getpixel((GAP + x * cell[0] + size[0] // 2, GAP + y * cell[1] + size[1] // 2))[0] for x, y in places]


def test_frames_are_spread_evenly_from_the_first_to_the_last():
    assert sheet_frames(2304, 5) == (0, 576, 1152, 1727, 2303)
    assert sheet_frames(3) == (0, 1, 2) and sheet_frames(100, 1) == (0,)
    for total in (13, 64, 2304):
        shown = sheet_frames(total)
        assert len(shown) == 12 and shown[0] == 0 and shown[-1] == total - 1
        gaps = np.diff(shown)
        assert gaps.max() - gaps.min() <= 1
    with pytest.raises(ValueError, match="at least one frame of at least one: got 12 of 0"):
        sheet_frames(0)


def test_a_sheet_has_every_frame_in_its_place_with_its_number():
    sheet = film_sheet((frame(i) for i in range(23)), 23)
    size = (32 * (SIDE // 32), 24 * (SIDE // 32))  # enlarged in whole steps
    assert tones(sheet, size, 12) == [10 * i for i in sheet_frames(23)]
    other = contact_sheet({i: Image.fromarray(frame(i)) for i in range(12)}, range(12))
    apart = np.asarray(sheet, int) != np.asarray(other, int)
    under = apart[GAP + size[1] : GAP + size[1] + LETTERS + GAP]
    assert under.any()  # other numbers below other frames


def test_a_frame_that_is_not_there_yet_is_grey_and_large_ones_shrink():
    sheet = contact_sheet({1: Image.fromarray(frame(9, (480, 960)))}, (0, 1))
    assert sheet.size == (2 * (SIDE + GAP) + GAP, SIDE // 2 + LETTERS + 2 * GAP + GAP)
    assert tones(sheet, (SIDE, SIDE // 2), 2) == [MISSING[0], 90]
    assert contact_sheet({}, (0, 1), (960, 480)).size == sheet.size
    with pytest.raises(ValueError, match="needs the size of the frames"):
        contact_sheet({}, (0,))


def test_a_file_gives_its_sheet(tmp_path):
    film, path = tmp_path / "cat.mp4", tmp_path / "new" / "sheet.png"
    with film_file(film, 32, 24, Recipe(prompt="a cat", video=Video(frames=20))) as file:
        for i in range(20):
            file.write(frame(i))
    save_sheet(film, 20, path, count=5)
    with Image.open(path) as sheet:
        found = tones(sheet, (192, 144), 5)
    assert np.abs(np.array(found) - 10 * np.array(sheet_frames(20, 5))).max() <= 4  # the codec is lossy
    with pytest.raises(ValueError, match="fewer than 21 frames"):
        save_sheet(film, 21, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()
