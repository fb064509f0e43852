"""Clips are read frame by frame: what they show, whether they move, and a run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from reattend.emoji_world.clips import clips, main, reach
from reattend.emoji_world.evaluate import Arm, evaluate
from reattend.emoji_world.read import Found, read
from reattend.emoji_world.world import Scene, Sprite, draw, moved, parse_caption, sample_captions
from reattend.pipelines import Recipe, Video, long_video
from reattend.pipelines.film import frames_of

FRAMES = 4


class Filmer:
    """Stands in for a video pipeline: paints what a caption tells, and moves it a lattice step a frame."""

    def __init__(self) -> None:
        self.stills: set[int] = set()  # seeds whose clip stands still
        self.forgotten: set[int] = set()  # seeds whose last frame shows nothing
        self.calls: list[tuple[str, int]] = []
        self.stop_after: int | None = None
        self.dtype, self.device, self.config, self.components = torch.float32, torch.device("cpu"), {}, {}
        self.scheduler = tiny.sd().scheduler

    def set_progress_bar_config(self, **_: Any) -> None: ...

    def __call__(self, caption: str, num_frames: int, generator: torch.Generator, **_: Any) -> Any:
        if self.stop_after == len(self.calls):
            raise KeyboardInterrupt
        seed = generator.initial_seed()
        self.calls.append((caption, seed))
        clauses, background = parse_caption(caption)
        sprites = [Sprite(one.kind, one.tint or "pink", 0.17 + 0.33 * k, 0.25, 0.3) for k, one in enumerate(clauses)]
        frames = []
        for k in range(num_frames):
            down = 0 if seed in self.stills else k / 16
            shown = () if seed in self.forgotten and k == num_frames - 1 else sprites
            frames.append(np.asarray(draw(Scene(background, tuple(moved(one, 0, down) for one in shown)))))
        return type("Output", (), {"frames": np.stack(frames)[None].astype(np.float32) / 255})


@pytest.fixture
def filmer() -> Filmer:
    return Filmer()


def test_every_frame_is_asked_and_what_moves_is_told(filmer: Filmer, tmp_path: Path, capsys: Any) -> None:
    filmer.stills, filmer.forgotten = {7}, {8}
    told: list[tuple[int, int]] = []
    found = clips(filmer, out=tmp_path, samples=3, seed=6, frames=FRAMES, on_progress=lambda *both: told.append(both))
    captions = sample_captions(np.random.default_rng(6), 3)
    assert filmer.calls == list(zip(captions, (6, 7, 8), strict=True)) and told[-1] == (3, 3)
    frames = found["rates"]["kinds and tints (frames)"]
    assert (frames["right"], frames["asked"]) == (3 * FRAMES - 1, 3 * FRAMES)
    sprites = [len(parse_caption(caption)[0]) for caption in captions]
    kinds = found["rates"]["kinds (sprites)"]
    assert (kinds["right"], kinds["asked"]) == (sum(sprites) * FRAMES - sprites[2], sum(sprites) * FRAMES)
    some = [rate for words, rate in found["rates"].items() if words.startswith("kinds and tints (frames), ")]
    assert [rate["asked"] for rate in some] == [FRAMES * sprites.count(count) for count in sorted(set(sprites))]
    assert sum(rate["right"] for rate in some) == frames["right"]
    assert found["rates"]["as in the first frame"]["asked"] == 3 * (FRAMES - 1)
    moving = found["rates"]["clips that move"]
    assert (moving["right"], moving["asked"]) == (2, 3)
    steps = (FRAMES - 1) + 0 + (FRAMES - 2)
    assert found["travelled"] == pytest.approx(steps / 16 / 3, abs=0.03)  # the reader is off by a pixel or two
    with Image.open(tmp_path / "contact.png") as sheet:
        assert sheet.size == (FRAMES * 128 + 4, 3 * 132)
    main(show=tmp_path / "summary.json")
    assert f"| kinds and tints (frames) | {100 * 11 / 12:.1f} % [" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_and_other_settings_do_not_mix(filmer: Filmer, tmp_path: Path) -> None:
    filmer.stop_after = 1
    with pytest.raises(KeyboardInterrupt):
        clips(filmer, out=tmp_path, samples=2, frames=2)
    filmer.stop_after = None
    found = clips(filmer, out=tmp_path, samples=2, frames=2)
    assert [seed for _, seed in filmer.calls] == [0, 1]  # none was made twice
    assert json.loads((tmp_path / "summary.json").read_text()) == found
    for more in ({"steps": 7}, {"frames": 3}):
        with pytest.raises(ValueError, match=f"other settings .{next(iter(more))} differ"):
            clips(filmer, out=tmp_path, samples=2, **{"frames": 2, **more})
    for bad in ({"samples": 0}, {"steps": 0}, {"frames": 1}):
        with pytest.raises(ValueError, match="give a larger number"):
            clips(filmer, out=tmp_path / "none", **bad)
    assert not (tmp_path / "none").exists()


def test_one_misread_frame_is_no_motion() -> None:
    def cat(x: float) -> list[Found]:
        return [Found("cat", "red", (x, 0.1, x + 0.4, 0.5), 0.9)]

    assert reach([cat(0.1)] * 15 + [cat(0.5)]) < 0.05
    assert reach([cat(0.1 + abs(8 - k) / 16) for k in range(16)]) > 0.25  # there and back
    assert reach([[]] * 3) == 0


def test_a_real_pipeline_makes_clips_and_pictures_are_asked_of_others(tmp_path: Path) -> None:
    pipe = tiny.fresh(tiny.animatediff())
    found = clips(pipe, out=tmp_path, samples=1, steps=1, frames=3)
    assert found["rates"]["kinds and tints (frames)"]["asked"] == 3
    with pytest.raises(ValueError, match=r"AnimateDiffPipeline makes clips, not pictures; .*emoji_world.clips"):
        evaluate(pipe, [Arm(name="stock")], out=tmp_path / "pictures", samples=1)


def test_the_bundled_model_shows_what_its_caption_says_in_most_frames(tmp_path: Path) -> None:
    kind, tint, background, out = "balloon", "red", "sea", tmp_path / "balloon.mp4"
    recipe = Recipe(
        prompt=f"a {tint} {kind} on {background}", model="tiny-video", steps=6, seed=8, video=Video(frames=16)
    )
    long_video(recipe, out)
    found = [read(frame) for frame in frames_of(out)]
    assert len(found) == 16
    assert sum(reading.background == background for reading in found) >= 12
    assert sum([(one.kind, one.tint) for one in reading.sprites] == [(kind, tint)] for reading in found) >= 12
