"""The tab for long videos in a real Chromium, on a tiny random AnimateDiff pipeline."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browsing import PATIENCE, fill, keep_screenshot
from PIL import Image
from playwright.sync_api import Page, expect

from reattend.pipelines import filming, writing
from reattend.pipelines.film import frame_count
from reattend.pipelines.recipe import Recipe
from reattend.ui.film_form import NO_MODEL
from reattend.ui.jobs import Worker
from reattend.ui.page import build, start
from reattend.ui.tabs.status import copy_of

pytestmark = pytest.mark.browser

SMALL = {"frames": "7", "steps": "3", "width": "48", "height": "32", "seed": "5"}


@pytest.fixture(scope="module")
def films(animatediff_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running page that offers the tiny film pipeline."""
    out = tmp_path_factory.mktemp("page") / "out"
    page = start(model=str(animatediff_folder), out=out)
    page.out = out
    yield page
    page.close()


@pytest.fixture
def tab(films: Any, page: Page) -> Page:
    page.set_default_timeout(PATIENCE)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto(films.url)
    page.get_by_role("tab", name="Long video").click()
    expect(status(page)).to_have_text("Ready.")
    return page


def status(page: Page):
    return page.locator("#film-status [role=status]")


def fill_film(page: Page, **fields: str) -> None:
    fill(page, **{f"film-{name}": value for name, value in fields.items()})


def fetched(page: Page, selector: str, attribute: str) -> bytes:
    answer = page.request.get(page.locator(selector).get_attribute(attribute))
    assert answer.ok
    return answer.body()


def plays(page: Page) -> None:
    """The player knows size and length of its film."""
    page.wait_for_function(
        "() => { const v = document.querySelector('#film-film video'); return v && v.videoWidth > 0 && v.duration > 0 }"
    )


def test_a_film_is_made_played_downloaded_and_loaded_again(tab, films, tmp_path):
    keep_screenshot(tab, "film-opened")
    fill_film(tab, prompt="a red balloon on sea", **SMALL, later="4: a blue balloon on sea", blend="2")
    fill_film(tab, **{"dual-scope-window": "4", "dual-scope-anchors": "2"})
    tab.locator("#film-generate").click()
    expect(status(tab)).to_contain_text("Done in")
    plays(tab)
    assert tab.locator("#film-film video").evaluate("video => [video.videoWidth, video.videoHeight]") == [48, 32]
    with tab.expect_download() as download:
        tab.locator("#film-save-film").click()
    download.value.save_as(tmp_path / "film.mp4")
    made = Recipe.read(tmp_path / "film.mp4")
    assert frame_count(tmp_path / "film.mp4") == 7 and made.video.later == ((4, "a blue balloon on sea"),)
    assert made.attention[0]["window"] == 4 and made.seed == 5
    with Image.open(io.BytesIO(fetched(tab, "#film-picture img", "src"))) as sheet:
        assert sheet.size == Image.open(films.out / "a-red-balloon-on-sea-5-sheet.png").size
    expect(tab.locator("#film-facts textarea")).to_have_value(re.compile("7 frames, 8 a second"))
    expect(tab.locator("#film-history button img")).to_have_count(1)
    expect(tab.locator("#film-go-on")).to_be_hidden()
    keep_screenshot(tab, "film-done")
    tab.reload()
    tab.get_by_role("tab", name="Long video").click()
    with tab.expect_file_chooser() as chooser:
        tab.locator("#film-load-recipe").click()
    chooser.value.set_files(tmp_path / "film.mp4")
    expect(status(tab)).to_contain_text("Recipe loaded")
    expect(tab.locator("#film-later textarea")).to_have_value("4: a blue balloon on sea")
    expect(tab.locator("#film-frames input")).to_have_value("7")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Films are written two frames at a time and wait after the second clip, with a look at the growing file each time."""
    opened, plain = threading.Event(), filming._Making._told_clip

    def told(self, number, *more):
        plain(self, number, *more)
        if number == 1:
            assert opened.wait(PATIENCE / 1000)

    monkeypatch.setattr(filming._Making, "_told_clip", told)
    monkeypatch.setattr(writing, "DECODED", 2)
    yield opened
    opened.set()


def test_the_sheet_fills_while_the_film_is_written_and_stop_keeps_a_film_that_plays_and_goes_on(tab, held, films):
    fill_film(tab, prompt="a cat", **SMALL | {"seed": "6"})
    tab.locator("#film-generate").click()
    expect(status(tab)).to_contain_text("Writing the film, clip 2 of 4")
    expect(status(tab)).to_contain_text("left")
    expect(tab.locator("#film-picture img")).to_be_visible()
    keep_screenshot(tab, "film-writing")
    tab.locator("#film-stop").click()
    expect(status(tab)).to_contain_text("Stopping")
    held.set()
    expect(status(tab)).to_contain_text("of 7 frames were written; so much of the film plays")
    plays(tab)
    with tab.expect_download() as download:
        tab.locator("#film-save-film").click()
    assert download.value.suggested_filename == "a-cat-6.partial.mp4"
    keep_screenshot(tab, "film-stopped")
    tab.locator("#film-go-on").click()
    expect(status(tab)).to_contain_text("Done in")
    plays(tab)
    assert frame_count(films.out / "a-cat-6.mp4") == 7
    expect(tab.locator("#film-go-on")).to_be_hidden()


def test_a_look_at_a_growing_film_may_come_too_late(tmp_path):
    player, growing = SimpleNamespace(GRADIO_CACHE=str(tmp_path / "cache")), tmp_path / "cat.partial.mp4"
    assert copy_of(growing, player) is None  # it is whole by now, under its own name
    growing.write_bytes(b"a film")
    assert Path(copy_of(growing, player)).read_bytes() == b"a film"


def test_without_a_model_for_films_the_tab_says_so(sd_folder):
    blocks = build(Worker(lambda *_: None), [str(sd_folder)])
    texts = [part.value for part in blocks.blocks.values() if getattr(part, "elem_id", None) == "film-no-model"]
    assert texts == [NO_MODEL] and NO_MODEL.count(". ") == 0
    assert not [part for part in blocks.blocks.values() if getattr(part, "elem_id", None) == "film-generate"]
