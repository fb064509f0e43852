"""A film's identity is read frame by frame, from arrays and from files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from reattend.emoji_world import world
from reattend.emoji_world.identity import identity, judge, main
from reattend.emoji_world.read import Found
from reattend.emoji_world.train_video import moving
from reattend.pipelines.film import film_file, frames_of
from reattend.pipelines.recipe import Recipe
from reattend.pipelines.videos import Video

FRAMES = 6


@pytest.fixture(scope="module")
def clip() -> list[np.ndarray]:
    scene = world.Scene("sand", (world.Sprite("car", "blue", 0.25, 0.25, 0.5),))
    rng = np.random.default_rng(3)
    return [np.asarray(world.draw(one)) for one in moving(scene, FRAMES, rng)]


def test_a_moving_thing_keeps_its_identity_and_another_does_not(clip):
    found = identity(clip)
    assert found.first == ("blue car",) and found.kept.right == found.kept.asked == FRAMES - 1
    assert found.travelled > 0
    still = identity([clip[0]] * 3)
    assert still.travelled == 0 and "kept in 100.0 %" in str(still)
    other = world.Scene("sand", (world.Sprite("car", "red", 0.25, 0.25, 0.5),))
    changed = identity([*clip[:2], np.asarray(world.draw(other)), np.asarray(world.draw(replace(other, sprites=())))])
    assert (changed.kept.right, changed.kept.asked) == (1, 3) and (changed.alike.right, changed.alike.asked) == (2, 4)
    with pytest.raises(ValueError, match="no frame to look at"):
        identity([])


def test_a_jump_is_no_movement():
    def cat(x):
        return [Found("cat", "red", (x, 0.1, x + 0.3, 0.4), 0.9)]

    assert judge([cat(0.1), cat(0.2)]).travelled == pytest.approx(0.1)
    assert judge([cat(0.1), cat(0.3)]).travelled == 0  # more than two lattice cells in a frame: a cut
    assert judge([cat(0.1), [], cat(0.3)]).travelled == pytest.approx(
        0.2
    )  # in two frames, in one of which it was not seen


def test_what_cannot_be_told_is_not_kept():
    blob, cat = Found(None, None, (0.1, 0.1, 0.4, 0.4), 0.0), Found("cat", "red", (0.5, 0.5, 0.9, 0.9), 0.9)
    assert judge([[blob]] * 3).kept.right == judge([[cat, blob]] * 3).kept.right == 0
    assert judge([[cat], [cat, blob], [cat]]).kept.right == 1


def test_a_file_is_read_as_its_frames(clip, tmp_path, capsys):
    path = tmp_path / "car.mp4"
    with film_file(path, 128, 128, Recipe(prompt="a blue car on sand", video=Video(frames=FRAMES))) as film:
        for frame in clip:
            film.write(frame)
    assert len(list(frames_of(path))) == FRAMES and len(list(frames_of(path, 2))) == 2
    main(path)
    assert "blue car: kept in 100.0 %" in capsys.readouterr().out
    main(path, frames=3, json=True)
    assert '"asked": 2' in capsys.readouterr().out
    (tmp_path / "broken.mp4").write_bytes(b"x" * 50)
    with pytest.raises(ValueError, match="does not play"):
        list(frames_of(tmp_path / "broken.mp4"))
