"""The story tab in a real Chromium: a story, one panel of it again, and its file."""

from __future__ import annotations

import io
import shutil
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browsing import PATIENCE, fill, keep_screenshot
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from reattend.pipelines.script import Script
from reattend.ui import story_job

pytestmark = pytest.mark.browser


@pytest.fixture
def tab(served: Any, page: Page) -> Page:
    """The page, open at the tab, asking for something small."""
    page.set_default_timeout(PATIENCE)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(served.url)
    page.get_by_role("tab", name="Story").click()
    expect(status(page)).to_have_text("Ready.")
    fill(page, **{"story-steps": "2", "story-width": "32", "story-height": "32", "story-seed": "3"})
    return page


def status(page: Page) -> Locator:
    return page.locator("#story-status [role=status]")


def cell(page: Page, table: str, row: int, column: int) -> Locator:
    return page.locator(f"#story-{table} [data-row='{row}'][data-col='{column}']")


def write(page: Page, table: str, row: int, column: int, text: str) -> None:
    cell(page, table, row, column).dblclick()
    field = page.locator(f"#story-{table} textarea")
    field.fill(text)
    field.press("Enter")
    expect(cell(page, table, row, column)).to_contain_text(text)


def press(page: Page, button: str) -> None:
    """Press a button that makes something, and wait for it."""
    before = status(page).inner_text()
    page.locator(f"#story-{button}").click()
    expect(status(page)).not_to_have_text(before)  # the last one may say Done too, with another folder
    expect(status(page)).to_contain_text("Done in")
    expect(page.locator("#story-generate")).to_be_enabled()


def choose_panel(page: Page, index: int) -> None:
    """Look at another panel, and wait until its picture is there."""
    picture = page.locator("#story-panel-picture img")
    before = picture.get_attribute("src")
    page.locator("#story-number label").nth(index).click()
    expect(picture).not_to_have_attribute("src", before or "")


def click_in_panel(page: Page, x: float, y: float) -> None:
    """Click at fractions of the panel that is shown, which is as high as its frame, once it stands still."""
    picture = page.locator("#story-panel-picture img")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    assert box is not None
    side = min(box["width"], box["height"])
    left, top = (box["width"] - side) / 2, (box["height"] - side) / 2
    picture.click(position={"x": left + x * side, "y": top + y * side})


def downloaded(page: Page, button: str, to: Path) -> Path:
    with page.expect_download() as download:
        page.locator(f"#story-{button}").click()
    download.value.save_as(to)
    return to


def panels_of(strip: Path, count: int) -> list[bytes]:
    with Image.open(strip) as image:
        assert image.size == (count * 36 - 4, 32)
        return [image.crop((i * 36, 0, i * 36 + 32, 32)).tobytes() for i in range(count)]


def test_a_story_is_made_one_panel_of_it_again_and_its_file_makes_it_once_more(tab, tmp_path):
    tab.locator("#story-add-panel").click()
    write(tab, "panels", 3, 0, "a house on sea")
    press(tab, "generate")
    expect(tab.locator("#story-own img")).to_have_count(2)
    first = panels_of(downloaded(tab, "save-strip", tmp_path / "first.png"), 4)
    script = Script.read(downloaded(tab, "save-story", tmp_path / "first.json"))
    assert [panel.prompt for panel in script.panels][3] == "a house on sea" and script.seed == 3
    answer = tab.request.get(tab.locator("#story-picture img").get_attribute("src"))
    assert Image.open(io.BytesIO(answer.body())).size == (140, 32)

    choose_panel(tab, 1)
    expect(tab.locator("#story-hint")).to_contain_text("If Flora stands elsewhere")
    click_in_panel(tab, 0.25, 0.5)
    expect(tab.locator("#story-hint")).to_contain_text("opposite corner of Flora")
    click_in_panel(tab, 0.75, 0.9)
    expect(cell(tab, "places", 0, 1)).to_contain_text("Flora")
    press(tab, "again")
    expect(tab.locator("#story-history img")).to_have_count(2)
    keep_screenshot(tab, "story")
    second = panels_of(downloaded(tab, "save-strip", tmp_path / "second.png"), 4)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True, True]
    script = Script.read(downloaded(tab, "save-story", tmp_path / "second.json"))
    assert script.panels[1].places["Flora"] == pytest.approx([0.25, 0.5, 0.75, 0.9], abs=0.02)
    layers = {"reference_layers": "<i>a</i>|."}  # somebody else's file; all layers
    (tmp_path / "second.json").write_text(replace(script, consistency=layers).to_json())

    tab.reload()
    tab.get_by_role("tab", name="Story").click()
    with tab.expect_file_chooser() as chooser:
        tab.locator("#story-load").click()
    chooser.value.set_files(tmp_path / "second.json")
    expect(status(tab)).to_contain_text("Story loaded")
    expect(tab.locator("#story-kept")).to_contain_text("loaded: reference_layers = <i>a</i>|..")
    expect(cell(tab, "panels", 3, 0)).to_contain_text("a house on sea")
    press(tab, "generate")
    assert panels_of(downloaded(tab, "save-strip", tmp_path / "third.png"), 4) == second


def give(page: Page, button: str, *files: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator(f"#story-{button}").click()
    chooser.value.set_files(list(files))


def click_in_own_picture(page: Page, x: float, y: float) -> None:
    """Click at fractions of a picture twice as wide as high, which is shown as large as its frame allows."""
    picture = page.locator("#story-own-picture img")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    assert box is not None
    width, height = min(box["width"], 2 * box["height"]), min(box["height"], box["width"] / 2)
    left, top = (box["width"] - width) / 2, (box["height"] - height) / 2
    picture.click(position={"x": left + x * width, "y": top + y * height})


def test_a_character_is_given_a_picture_and_its_story_is_saved_loaded_and_made_again(tab, tmp_path):
    Image.linear_gradient("L").resize((80, 40)).convert("RGB").save(tmp_path / "hill.jpg")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    hint = tab.locator("#story-own-hint [role=status]")
    tab.locator("#story-own-fold button").first.click()
    expect(hint).to_have_text("Flora has no picture of yours; the model draws one.")
    tab.locator("#story-own-who label").nth(1).click()
    expect(hint).to_contain_text("Hill has no picture")
    give(tab, "own-give", tmp_path / "broken.png")
    expect(tab.locator("#story-own-hint .bad")).to_contain_text(
        "picture for 'Hill' cannot be read; give a PNG, JPEG or"
    )
    give(tab, "own-give", tmp_path / "hill.jpg")
    expect(hint).to_contain_text("Hill is drawn after this picture")
    expect(tab.locator("#story-own-who label").nth(1)).to_contain_text("Hill ✓")
    click_in_own_picture(tab, 0.5, 0.25)
    expect(hint).to_contain_text("opposite corner of Hill")
    click_in_own_picture(tab, 0.9, 0.75)
    expect(cell(tab, "places", 0, 0)).to_contain_text("own")
    expect(hint).to_contain_text("after what is in the frame")
    press(tab, "generate")
    expect(tab.locator("#story-own img")).to_have_count(2)
    expect(tab.locator("#story-panel-picture img")).to_be_visible()
    keep_screenshot(tab, "story-own-picture")
    first = panels_of(downloaded(tab, "save-strip", tmp_path / "first.png"), 3)
    with zipfile.ZipFile(downloaded(tab, "save-story", tmp_path / "story.zip")) as archive:
        archive.extractall(tmp_path / "unpacked")
    script = Script.read(tmp_path / "unpacked" / "story.json")
    assert script.subjects[1].picture == str(tmp_path / "unpacked" / "picture-2.png")
    assert script.subjects[1].place == pytest.approx([0.5, 0.25, 0.9, 0.75], abs=0.02)
    tab.locator("#story-again").click()
    expect(tab.locator("#story-history img")).to_have_count(2)
    assert panels_of(downloaded(tab, "save-strip", tmp_path / "again.png"), 3) == first

    tab.reload()
    tab.get_by_role("tab", name="Story").click()
    give(tab, "load", tmp_path / "unpacked" / "story.json")
    expect(tab.locator("#story-status .bad")).to_contain_text("picture-2.png, which was not sent with it")
    give(tab, "load", tmp_path / "story.zip")
    expect(status(tab)).to_contain_text("Story loaded")
    expect(tab.locator("#story-own-who label").nth(1)).to_contain_text("Hill ✓")
    press(tab, "generate")
    assert panels_of(downloaded(tab, "save-strip", tmp_path / "second.png"), 3) == first

    tab.locator("#story-own-who label").nth(1).click()
    expect(hint).to_contain_text("Hill is drawn after what is in the frame")
    tab.locator("#story-own-take").click()
    expect(hint).to_contain_text("Hill has no picture")
    expect(cell(tab, "places", 0, 0)).not_to_contain_text("own")
    tab.locator("#story-again").click()
    expect(tab.locator("#story-status .bad")).to_contain_text("(the characters changed)")
    tab.locator("#story-write").click()
    expect(status(tab)).to_contain_text(".json, which is for the command reattend story too")


def test_bad_input_is_answered_with_a_sentence_and_a_form_can_be_saved_before_it_is_made(tab, tmp_path):
    write(tab, "places", 0, 0, "7")
    write(tab, "places", 0, 1, "Flora")
    for button in ("generate", "write"):
        tab.locator(f"#story-{button}").click()
        expect(tab.locator("#story-status .bad")).to_contain_text("places name the panel '7'; there are panels 1 to 3")
        expect(tab.locator("#story-generate")).to_be_enabled()
    write(tab, "places", 0, 0, "2")
    tab.locator("#story-write").click()
    expect(status(tab)).to_contain_text("Saved as a-butterfly")
    script = Script.read(downloaded(tab, "written", tmp_path / "form.json"))
    assert (script.steps, script.seed, script.panels[1].places) == (2, 3, {"Flora": None, "Hill": None})


def test_what_is_chosen_meanwhile_stays_and_a_story_without_files_says_so(tab, served, monkeypatch):
    press(tab, "generate")
    expect(tab.locator("#story-own img")).to_have_count(2)
    go = threading.Event()

    class Held(story_job.Previewer):
        def __call__(self, latents):
            assert go.wait(PATIENCE / 1000)

    monkeypatch.setattr(story_job, "Previewer", Held)
    tab.locator("#story-again").click()
    expect(tab.locator("#story-stop")).to_be_enabled()
    tab.locator("#story-number label").nth(2).click()
    tab.locator("#story-over input").check()
    go.set()
    expect(tab.locator("#story-history img")).to_have_count(2)
    expect(tab.locator("#story-number input").nth(2)).to_be_checked()
    expect(tab.locator("#story-over input")).to_be_checked()
    answer = tab.request.get(tab.locator("#story-picture img").get_attribute("src"))
    assert Image.open(io.BytesIO(answer.body())).size == (3 * 320 + 8, 320)  # with places, large enough to see them

    for file in served.out.glob("*/story.json"):
        shutil.rmtree(file.parent)
    tab.locator("#story-again").click()
    expect(tab.locator("#story-status .bad")).to_have_text(story_job.GONE)
    for button in ("generate", "again", "reseeded"):
        expect(tab.locator(f"#story-{button}")).to_be_enabled()
    expect(tab.locator("#story-hint")).to_have_text(story_job.GONE)
    keep_screenshot(tab, "story-gone")
    press(tab, "generate")
    expect(tab.locator("#story-hint")).to_contain_text("If Flora stands elsewhere")
    expect(tab.locator("#story-history img")).to_have_count(0)
