from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace

import pytest
from PIL import Image, PngImagePlugin

from reattend.pipelines import Recipe

FULL = Recipe(
    prompt="ein blaues Auto: gelb, 猫",
    negative="rain, fog",
    width=64,
    height=40,
    steps=7,
    guidance=3.5,
    seed=2**40,
    attention=({"name": "agent", "ratio": 0.4},),
    dtype="float32",
    made_with={"reattend": "0.1.0", "scheduler": "DDIMScheduler"},
)
PICTURE = Image.new("RGB", (64, 40), "teal")


def test_json_round_trip_keeps_every_value():
    assert Recipe.from_json(FULL.to_json()) == FULL


def test_attention_is_completed_and_command_line_strings_are_read():
    agent = replace(FULL, attention=({"name": "agent", "ratio": "0.4"},)).attention[0]
    assert agent["ratio"] == 0.4
    assert set(agent) > {"name", "ratio"}


def test_png_and_sidecar_give_the_recipe_back(tmp_path):
    png, sidecar = FULL.save(PICTURE, tmp_path / "new" / "car.png")
    assert Recipe.read(png) == FULL
    assert Recipe.read(sidecar) == FULL
    assert sorted(path.name for path in png.parent.iterdir()) == ["car.png", "car.png.json"]


def test_png_text_is_what_usual_tools_read(tmp_path):
    png, _ = FULL.save(PICTURE, tmp_path / "car.png")
    with Image.open(png) as image:
        lines = image.text["parameters"].splitlines()
        assert image.size == PICTURE.size
    assert lines[:2] == ["ein blaues Auto: gelb, 猫", "Negative prompt: rain, fog"]
    assert (
        "Steps: 7, Sampler: DDIMScheduler, CFG scale: 3.5, Seed: 1099511627776, Size: 64x40, Model: tiny-sd" in lines[2]
    )
    assert "agent ratio=0.4" in lines[2]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prompt": "  "}, ValueError, "prompt is empty"),
        ({"prompt": 3}, TypeError, "prompt must be text, got 3"),
        ({"prompt": "a" * 10_001}, ValueError, "got 10001 characters, at most 10000"),
        ({"width": 0}, ValueError, "width does not work: got 0 pixels, need a multiple of 8 from 8 to 8192; try 8"),
        ({"height": 10**9}, ValueError, "height does not work: got 1000000000 .* try 8192"),
        ({"height": -64}, ValueError, "got -64"),
        ({"width": 100}, ValueError, "multiple of 8 .* try 96"),
        ({"width": "64"}, TypeError, "width must be a whole number of pixels, got '64'"),
        ({"width": True}, TypeError, "width must be a whole number"),
        ({"steps": 0}, ValueError, "steps is out of range: got 0, need 1 to 1000"),
        ({"steps": 2.0}, TypeError, "steps must be a whole number"),
        ({"guidance": float("nan")}, ValueError, "guidance is out of range: got nan"),
        ({"guidance": "strong"}, TypeError, "guidance must be a number"),
        ({"seed": -1}, ValueError, "seed is out of range: got -1"),
        ({"dtype": "int8"}, ValueError, "dtype is unknown: got 'int8'; choose one of float32"),
        ({"made_with": {"torch": 2}}, TypeError, "made_with must map names to texts"),
        ({"attention": "agent"}, TypeError, "attention must be a list"),
        ({"attention": ({"name": "nothing"},)}, ValueError, "unknown attention: got 'nothing', there are .*agent"),
        ({"attention": ({"ratio": 0.4},)}, ValueError, "unknown attention: got None"),
        ({"attention": ({"name": "agent", "speed": 3},)}, ValueError, "speed.*ratio"),
        ({"attention": ({"name": "agent", "ratio": 1.0},)}, ValueError, "ratio"),
        ({"attention": ({"name": "agent", "ratio": "lots"},)}, TypeError, "ratio"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_in_one_sentence(change, error, words):
    with pytest.raises(error, match=words) as caught:
        replace(FULL, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "this is not JSON"),
        ("{", "this is not JSON"),
        ("[" * 100_000, "this is not JSON"),
        ("[1]", 'has no "format"'),
        ('{"prompt": "a cat"}', 'has no "format"'),
        (
            json.dumps({"format": "reattend recipe", "version": 99, "prompt": "a"}),
            "version 99, this reattend reads version 1",
        ),
        (json.dumps({"format": "reattend recipe", "version": 1}), "no prompt"),
        (
            json.dumps({"format": "reattend recipe", "version": 1, "prompt": "a", "wings": 2}),
            "unknown entries: got wings",
        ),
        (json.dumps({"format": "reattend recipe", "version": 1, "prompt": "a", "steps": "9"}), "steps must be"),
        (
            json.dumps({"format": "reattend recipe", "version": 1, "prompt": "a", "attention": "agent"}),
            "must be a list",
        ),
    ],
)
def test_broken_and_foreign_json_is_refused_in_one_sentence(tmp_path, text, words):
    file = tmp_path / "recipe.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        Recipe.read(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_recipe_are_refused(tmp_path):
    png = tmp_path / "plain.png"
    PICTURE.save(png)
    with pytest.raises(ValueError, match="holds no recipe: this PNG was not made by reattend"):
        Recipe.read(png)
    png.write_bytes(png.read_bytes()[:20])
    with pytest.raises(ValueError, match="broken PNG"):
        Recipe.read(png)
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="neither PNG nor text"):
        Recipe.read(tmp_path / "noise")
    with pytest.raises(ValueError, match=r"cannot read the recipe .*No such file"):
        Recipe.read(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="cannot read the recipe"):
        Recipe.read(tmp_path)


def test_huge_json_is_refused_without_reading_it_whole(tmp_path):
    file = tmp_path / "huge.json"
    with file.open("wb") as sparse:
        sparse.truncate(10**12)
    with pytest.raises(ValueError, match="too big for a recipe"):
        Recipe.read(file)


def test_compressed_text_that_unpacks_to_very_much_is_refused(tmp_path):
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    bomb = zlib.compress(b" " * (20 * PngImagePlugin.MAX_TEXT_CHUNK), 9)
    file = tmp_path / "bomb.png"
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        + chunk(b"zTXt", b"reattend\0\0" + bomb)
        + chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(ValueError, match=r"broken PNG|holds no recipe"):
        Recipe.read(file)


def test_only_png_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"written as PNG: got .*car.jpg"):
        FULL.save(PICTURE, tmp_path / "car.jpg")
    assert not list(tmp_path.iterdir())


def test_a_failing_save_leaves_the_old_files_and_no_others(tmp_path, monkeypatch):
    png, sidecar = FULL.save(PICTURE, tmp_path / "car.png")
    before = png.read_bytes(), sidecar.read_bytes()

    def interrupted(self, file, **settings):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(FULL, seed=1).save(PICTURE, png)
    assert (png.read_bytes(), sidecar.read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2
