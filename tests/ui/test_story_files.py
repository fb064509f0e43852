"""Stories as files, on their way into the page and out of it: JSON, zips, and pictures of one's own."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from reattend.pipelines import Panel, Script, Subject
from reattend.ui import story_files
from reattend.ui.story_files import KEPT, keep_picture, load_story, pack_story, save_story
from reattend.ui.story_form import fill_story_form

MODEL = "tiny"


def made() -> Script:
    """A story as it comes back when it was made."""
    return Script(
        subjects=(Subject(name="Tom", phrase="cat", seed=1, found=[0, 0, 1, 1]), Subject(name="Rex", phrase="dog", seed=2)),
        panels=(Panel(prompt="a cat and a dog", seed=3, places={"Tom": [0, 0, 0.5, 1], "Rex": None}),),
        model=MODEL, steps=2, width=64, height=32, seed=4,
    )  # fmt: skip


def picture(size=(6, 4), kind="PNG", colour=(10, 200, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format=kind)
    return file.getvalue()


def with_picture(file: Path | str) -> Script:
    """A story whose first character has a picture."""
    script = made()
    return replace(script, subjects=(replace(script.subjects[0], picture=str(file), found=None), *script.subjects[1:]))


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_picture_is_written_anew_under_a_name_of_ours(tmp_path):
    folder = tmp_path / "kept"
    (tmp_path / "..;tom.png").write_bytes(picture())
    one = Path(keep_picture(tmp_path / "..;tom.png", "Tom", folder))
    assert one.parent == folder and len(one.stem) == 64 and one.suffix == ".png"
    with Image.open(one) as image:
        assert (image.format, image.size, image.getpixel((0, 0))) == ("PNG", (6, 4), (10, 200, 30))
    assert keep_picture(io.BytesIO(picture()), "Rex", folder) == str(one)
    assert keep_picture(io.BytesIO(picture((4, 6))), "Rex", folder) != str(one)
    large = keep_picture(io.BytesIO(picture((2 * KEPT, 10), "JPEG")), "Rex", folder)
    assert Image.open(large).size == (KEPT, 5)
    assert not list(folder.glob(".*"))


def turned() -> bytes:
    """A photo that was taken with the camera on its side."""
    image, file = Image.new("RGB", (6, 4)), io.BytesIO()
    exif = image.getexif()
    exif[274] = 6
    image.save(file, format="JPEG", exif=exif)
    return file.getvalue()


def test_a_photo_stands_upright(tmp_path):
    assert Image.open(keep_picture(io.BytesIO(turned()), "Tom", tmp_path)).size == (4, 6)


def test_what_is_no_picture_is_one_sentence(tmp_path, monkeypatch):
    for content in (b"", b"<svg/>", picture(kind="GIF"), picture((50, 50))[:-30], picture(kind="TIFF")):
        with pytest.raises(ValueError, match="picture for 'Tom' cannot be read; give a PNG, JPEG or WebP file"):
            keep_picture(io.BytesIO(content), "Tom", tmp_path / "kept")
    monkeypatch.setattr(story_files, "LARGEST", 20)
    with pytest.raises(ValueError, match="is too large: 6 × 4 pixels; give one of at most 20 pixels"):
        keep_picture(io.BytesIO(picture()), "Tom", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_story_with_a_picture_comes_back_from_its_zip_and_works_beside_it(tmp_path):
    script = with_picture(keep_picture(io.BytesIO(picture()), "Tom", tmp_path / "kept"))
    file = save_story(script, tmp_path / "out")
    assert file.name == "a-cat-and-a-dog.zip"
    assert load_story([file], [MODEL], tmp_path / "kept") == (fill_story_form(script, [MODEL]), "")
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["story.json", "picture-1.png"]
        assert str(tmp_path) not in archive.read("story.json").decode()
        archive.extractall(tmp_path / "unpacked")
    beside = Script.read(tmp_path / "unpacked" / "story.json")  # as the command line reads it
    assert replace(beside, subjects=script.subjects) == script
    assert Image.open(str(beside.subjects[0].picture)).size == (6, 4)
    apart = sorted((tmp_path / "unpacked").iterdir())
    assert load_story(apart, [MODEL], tmp_path / "again")[0]["pictures"]["Tom"].startswith(str(tmp_path / "again"))
    pack_story(script, tmp_path / "same.zip")
    assert (tmp_path / "same.zip").read_bytes() == file.read_bytes()


def test_a_story_without_pictures_is_saved_as_json(tmp_path):
    file = save_story(made(), tmp_path)
    assert file.suffix == ".json" and Script.read(file) == made()


def test_nothing_but_what_was_sent_is_opened(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    sent, kept = tmp_path / "sent", tmp_path / "kept"
    sent.mkdir()
    for name in (str(secret), "../secret.png", "none.png", "", ".", "a\\..\\secret.png"):
        words = "picture for 'Tom'"
        story = with_picture(name).to_json().encode()
        (sent / "story.json").write_bytes(story)
        zipped = packed(sent / "tale.zip", {"in/story.json": story, "secret.png": picture()})
        for file in (sent / "story.json", zipped):
            values, wrong = load_story([file], [MODEL], kept)
            assert values == {} and words in wrong and "was not sent with it" in wrong and str(tmp_path) not in wrong
    assert not kept.exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tale.zip": b"no zip"}, "tale.zip is no zip that can be read"),
        ({"a.json": b"{}", "b.json": b"{}"}, "Choose one story"),
        ({"tom.png": picture()}, "Choose one story"),
        (
            {"story.json": with_picture("tom.png").to_json().encode(), "tom.png": b"broken"},
            "picture for 'Tom' cannot be read",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "+".join(value),
)
def test_files_that_make_no_story_are_one_sentence(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    values, wrong = load_story([tmp_path / name for name in files], [MODEL], tmp_path / "kept")
    assert values == {} and words in wrong and "\n" not in wrong and str(tmp_path) not in wrong


def test_a_zip_that_holds_too_much_or_no_story_is_refused(tmp_path, monkeypatch):
    story = with_picture("tom.png").to_json().encode()
    for files, words in (
        ({"tom.png": picture()}, "must hold one story.json, it holds 0"),
        ({"a/story.json": story, "b/story.json": story}, "it holds 2"),
        ({"story.json": b" " * (story_files.STORY_BYTES + 1)}, "story.json is too big"),
        ({"story.json": story, "tom.png": picture() + b" " * 1000}, "tom.png is too big: over 1,000 bytes"),
    ):
        monkeypatch.setattr(story_files, "PICTURE_BYTES", 1000)
        values, wrong = load_story([packed(tmp_path / "tale.zip", files)], [MODEL], tmp_path / "kept")
        assert values == {} and words in wrong
    broken = packed(tmp_path / "broken.zip", {"story.json": story}).read_bytes().replace(b"Tom", b"Tim")
    (tmp_path / "broken.zip").write_bytes(broken)
    assert "no zip that can be read" in load_story([tmp_path / "broken.zip"], [MODEL], tmp_path)[1]


@pytest.mark.parametrize(
    ("story", "words"),
    [
        ({"model": "elsewhere"}, "does not offer the model 'elsewhere'"),
        ({"subjects": [{"name": "cat", "picture": "tom.png"}]}, "picture for 'cat', tom.png, which was not sent"),
        ({"subjects": [{"name": "cat", "place": {"mask": "/etc/passwd"}}]}, "is no packed mask"),
        ({"panels": [{"prompt": "a cat", "found": {"cat": 3}}]}, "place of 'cat' must be a box"),
        ({"subjects": [{"name": "cat", "found": 3}]}, "place of 'cat' must be a box"),
        ({"panels": []}, "1 to 1000 panels"),
        (None, "holds no story"),
    ],
)
def test_an_unusable_file_is_one_sentence_and_fills_nothing(tmp_path, story, words):
    file = tmp_path / "tale.json"
    usual = {"model": MODEL, "subjects": ["cat"], "panels": [{"prompt": "a cat"}]}
    usual["subjects"] = [{"name": "cat"}]
    file.write_bytes(b"\xff\xfe\x00" if story is None else json.dumps(usual | story).encode())
    values, wrong = load_story([file], [MODEL], tmp_path / "kept")
    assert values == {}
    assert words in wrong and "\n" not in wrong and str(tmp_path) not in wrong


def test_a_file_fills_the_form(tmp_path):
    file = tmp_path / "tale.json"
    file.write_text(made().to_json())
    values, wrong = load_story([file], [MODEL], tmp_path / "kept")
    assert wrong == "" and values == fill_story_form(made(), [MODEL])


def test_a_zip_packed_in_another_way_is_refused_in_one_sentence(tmp_path):
    file = tmp_path / "story.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("story.json", "{}" * 200)
    file.write_bytes(file.read_bytes()[:60] + b"broken" + file.read_bytes()[66:])
    form, wrong = load_story([file], [MODEL], tmp_path / "own")
    assert form == {} and wrong == "The file story.zip is no zip that can be read; choose one that this page made."
