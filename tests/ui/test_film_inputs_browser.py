"""What a film is made from besides text, in a real Chromium: another film, pictures for a ControlNet, and who takes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from browsing import PATIENCE, choose, fill, keep_screenshot
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect

from reattend.pipelines.film import film_file
from reattend.pipelines.recipe import Recipe
from reattend.pipelines.videos import Video
from reattend.ui import page as pages

pytestmark = pytest.mark.browser

FRAMES = 7


@pytest.fixture(scope="module")
def films(animatediff_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running page that offers a model which starts from a film and has a ControlNet, and one that needs text alone."""
    folder = tmp_path_factory.mktemp("models") / "from-films"
    tiny.animatediff_inputs("VideoToVideoControlNet").save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "bundled", lambda: {str(animatediff_folder): animatediff_folder})
        page = pages.start(model=str(folder), out=tmp_path_factory.mktemp("page") / "out")
    page.plain, page.first = animatediff_folder, folder
    yield page
    page.close()


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a film of a ball that crosses the picture, and pictures of it for a ControlNet."""
    folder = tmp_path_factory.mktemp("sent")
    with film_file(folder / "ball.mp4", 96, 64, Recipe(prompt="a ball", video=Video(frames=FRAMES))) as film:
        for i in range(FRAMES):
            frame, edges = Image.new("RGB", (96, 64), (30, 90, 160)), Image.new("RGB", (96, 64))
            where = (8 + 10 * i, 20, 32 + 10 * i, 44)
            ImageDraw.Draw(frame).ellipse(where, fill=(220, 60, 40))
            ImageDraw.Draw(edges).ellipse(where, outline="white")
            edges.save(folder / f"edges-{i}.png")
            film.write(np.asarray(frame))
    (folder / "broken.mp4").write_bytes(b"no film")
    return folder


@pytest.fixture
def tab(films: Any, page: Page) -> Page:
    page.set_default_timeout(PATIENCE)
    page.set_viewport_size({"width": 1280, "height": 900})
    opened(page, films)
    return page


def opened(page: Page, films: Any) -> None:
    page.goto(films.url)
    page.get_by_role("tab", name="Long video").click()
    expect(page.locator("#film-status [role=status]")).to_have_text("Ready.")


def send(page: Page, button: str, *files: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator(f"#film-{button}").click()
    chooser.value.set_files(list(files))


def test_a_film_is_made_from_another_and_its_recipe_finds_that_again(tab, films, sent, tmp_path):
    film, control = (tab.locator(f"#film-{word}-hint [role=status]") for word in ("video", "conditioning_frames"))
    expect(film).to_have_text("Choose the film to start from.")
    expect(tab.locator("#film-video-take")).to_be_hidden()
    send(tab, "video-give", sent / "broken.mp4")
    expect(film).to_have_text("The film broken.mp4 does not play; give an MP4 that is whole.")
    send(tab, "video-give", sent / "ball.mp4")
    expect(film).to_have_text(f"{FRAMES} frames, one for each of the new film.")
    expect(tab.locator("#film-frames input")).to_have_value(str(FRAMES))
    expect(tab.locator("#film-video-sheet img")).to_be_visible()
    send(tab, "conditioning_frames-give", *sent.glob("edges-*.png"))
    expect(control).to_have_text(f"{FRAMES} frames, one for each of the new film.")
    fields = {"prompt": "a red balloon on sea", "strength": "0.7", "controlnet_conditioning_scale": "0.9"}
    fields |= {"steps": "3", "width": "48", "height": "32", "seed": "5"}
    fill(tab, **{f"film-{name}": value for name, value in fields.items()})
    tab.locator("#film-generate").click()
    expect(tab.locator("#film-status [role=status]")).to_contain_text("Done in")
    expect(tab.locator("#film-facts textarea")).to_have_value(re.compile("from another film at strength 0.7, along"))
    keep_screenshot(tab, "film-from-film")
    with tab.expect_download() as download:
        tab.locator("#film-save-film").click()
    download.value.save_as(tmp_path / "film.mp4")
    made = Recipe.read(tmp_path / "film.mp4").video
    assert (made.frames, made.strength, made.controlnet_conditioning_scale) == (FRAMES, 0.7, 0.9)
    assert set(made.pictures) == {"video", "conditioning_frames"}
    tab.locator("#film-video-take").click()
    expect(film).to_have_text("Choose the film to start from.")
    expect(tab.locator("#film-video-sheet")).to_be_hidden()
    tab.locator("#film-use-settings").click()
    expect(film).to_have_text(f"{FRAMES} frames, one for each of the new film.")
    opened(tab, films)
    send(tab, "load-recipe", tmp_path / "film.mp4")
    expect(film).to_have_text(f"{FRAMES} frames, one for each of the new film.")
    expect(tab.locator("#film-strength input, #film-strength textarea")).to_have_value("0.7")


def test_only_models_that_take_them_show_the_fields(tab, films):
    expect(tab.locator("#film-video-give")).to_be_visible()
    expect(tab.locator("#film-strength")).to_be_visible()
    tab.locator("#film-more button").first.click()
    choose(tab, "film-model", str(films.plain))
    for name in ("video-give", "strength", "conditioning_frames-give", "controlnet_conditioning_scale", "pag_scale"):
        expect(tab.locator(f"#film-{name}")).to_be_hidden()


def test_a_recipe_whose_film_is_not_here_asks_for_it(tab, films, tmp_path):
    video = Video(frames=FRAMES, pictures={"video": 64 * "0"})
    (tmp_path / "film.json").write_text(Recipe(prompt="a cat", model=str(films.first), video=video).to_json())
    send(tab, "load-recipe", tmp_path / "film.json")
    expect(tab.locator("#film-video-hint .bad")).to_have_text(
        "A recipe does not hold the film to start from; choose it once more, or another."
    )
