"""The page in a real Chromium: what people do with it, on a tiny random pipeline."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browsing import PATIENCE, choose, fill, keep_screenshot
from PIL import Image
from playwright.sync_api import Page, expect

from reattend.pipelines.recipe import Recipe
from reattend.ui import image_job

pytestmark = pytest.mark.browser


@pytest.fixture
def page(served: Any, page: Page) -> Page:
    """The page, open and ready."""
    page.set_default_timeout(PATIENCE)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.fetched = []
    page.on("request", lambda request: page.fetched.append(request.url))
    page.goto(served.url)
    expect(status(page)).to_have_text("Ready.")
    return page


def status(page: Page):
    return page.locator("#status [role=status]")


def generate(page: Page, **fields: str) -> Recipe:
    """Fill in fields, make a picture, wait for it; the recipe inside the picture that the page shows."""
    fill(page, **fields)
    before = status(page).inner_text()
    page.locator("#generate").click()
    expect(status(page)).not_to_have_text(before)  # the last one may say Done too, with another file name
    expect(status(page)).to_contain_text("Done in")
    expect(page.locator("#generate")).to_be_enabled()
    return recipe_in(picture(page))


def load_recipe(page: Page, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#load-recipe").click()
    chooser.value.set_files(file)


def picture(page: Page) -> bytes:
    source = page.locator("#picture img").get_attribute("src")
    answer = page.request.get(source)
    assert answer.ok
    return answer.body()


def recipe_in(png: bytes) -> Recipe:
    return Recipe.from_json(Image.open(io.BytesIO(png)).text["reattend"])


def test_generate_shows_a_picture_with_its_recipe_and_a_seed_to_use_again(page, served):
    keep_screenshot(page, "opened")
    first = generate(page, prompt="a blue car on sand", steps="3")
    assert first.prompt == "a blue car on sand"
    assert first.steps == 3
    expect(page.locator("#facts textarea")).to_have_value(re.compile(f"seed {first.seed}"))
    page.locator("#use-seed").click()
    expect(page.locator("#seed textarea, #seed input")).to_have_value(str(first.seed))
    before = picture(page)
    again = generate(page)
    assert again == first
    assert Image.open(io.BytesIO(picture(page))).tobytes() == Image.open(io.BytesIO(before)).tobytes()
    keep_screenshot(page, "done")
    here = (served.url, "data:", "blob:")
    assert [url for url in page.fetched if not url.startswith(here)] == []


def test_earlier_pictures_can_be_seen_again_by_this_session_only(page, served, new_context):
    first = generate(page, prompt="a cat", steps="2", seed="11")
    generate(page, prompt="a dog", seed="12")
    images = page.locator("#history button img")
    expect(images).to_have_count(2)
    images.nth(1).click()
    expect(page.locator("#facts textarea")).to_have_value(re.compile("seed 11"))
    page.locator("#use-settings").click()
    expect(page.locator("#prompt textarea")).to_have_value("a cat")
    assert recipe_in(picture(page)) == first

    other = new_context().new_page()
    other.goto(served.url)
    expect(status(other)).to_have_text("Ready.")
    expect(other.locator("#history")).to_be_hidden()


class Gate:
    """Stands in for `Previewer`: a preview at every step, and the run is held at step 3 until the gate is opened."""

    def __init__(self) -> None:
        self.steps = 0
        self.opened = threading.Event()

    def __call__(self, pipe: Any) -> Callable[[Any], Image.Image]:
        return lambda latents: self.show(latents, pipe)

    def show(self, latents: Any, pipe: Any) -> Image.Image:
        self.steps += 1
        if self.steps == 3:
            assert self.opened.wait(PATIENCE / 1000)
        return image_job.preview(latents, pipe)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(image_job, "Previewer", gate)
    yield gate
    gate.opened.set()


def test_progress_and_preview_show_and_stop_ends_within_two_steps(page, gate):
    fill(page, prompt="a blue car on sand", steps="50")
    page.locator("#generate").click()
    expect(status(page)).to_contain_text("Step 2 of 50")
    expect(status(page)).to_contain_text("left")
    expect(page.locator("#picture img")).to_be_visible()
    expect(page.locator("#generate")).to_be_disabled()
    keep_screenshot(page, "running")
    page.locator("#stop").click()
    expect(status(page)).to_contain_text("Stopping")
    gate.opened.set()
    expect(status(page)).to_contain_text("Stopped at step")
    assert gate.steps <= 4
    expect(page.locator("#stop")).to_be_disabled()
    generate(page, steps="2")  # the controls came back


def test_leaving_the_page_stops_its_work(page, served, gate, monkeypatch):
    runs = []
    submit = served.worker.submit
    monkeypatch.setattr(served.worker, "submit", lambda recipe: runs.append(submit(recipe)) or runs[-1])
    fill(page, prompt="a cat", steps="50")
    page.locator("#generate").click()
    expect(status(page)).to_contain_text("Step 2 of 50")
    page.goto("about:blank")
    end = time.monotonic() + PATIENCE / 1000
    while not runs[0].token.requested and time.monotonic() < end:
        page.wait_for_timeout(100)
    gate.opened.set()
    for _ in runs[0].updates():
        pass
    assert runs[0].outcome.state == "stopped"
    assert gate.steps <= 4


def test_settings_of_an_attention_show_when_it_is_chosen_and_are_used(page):
    expect(page.locator("#settings-agent")).to_be_hidden()
    choose(page, "attention", "Agent attention")
    expect(page.locator("#agent-ratio")).to_be_visible()
    page.locator("#more-agent button").first.click()
    expect(page.locator("#agent-p")).to_be_visible()
    fill(page, **{"agent-ratio": "0.25"})
    recipe = generate(page, prompt="a cat", steps="2")
    keep_screenshot(page, "attention")
    assert [(entry["name"], entry["ratio"]) for entry in recipe.attention] == [("agent", 0.25)]


def test_a_recipe_can_be_downloaded_and_fills_the_controls_again(page, served, tmp_path):
    choose(page, "attention", "Agent attention")
    fill(page, **{"agent-ratio": "0.25"})
    made = generate(page, prompt="a red cat", steps="2", width="48", height="32", seed="9007199254740993")
    with page.expect_download() as download:
        page.locator("#save-recipe").click()
    download.value.save_as(tmp_path / "recipe.json")
    assert Recipe.read(tmp_path / "recipe.json") == made
    (tmp_path / "picture.png").write_bytes(picture(page))
    count = len(list(served.out.iterdir()))
    for name in ("recipe.json", "picture.png"):
        page.reload()
        expect(page.locator("#seed textarea, #seed input")).to_have_value("")
        load_recipe(page, tmp_path / name)
        expect(status(page)).to_contain_text("Recipe loaded")
        expect(page.locator("#prompt textarea")).to_have_value("a red cat")
        expect(page.locator("#width textarea, #width input")).to_have_value("48")
        expect(page.locator("#seed textarea, #seed input")).to_have_value("9007199254740993")
        expect(page.locator("#agent-ratio textarea, #agent-ratio input")).to_have_value("0.25")
    assert len(list(served.out.iterdir())) == count  # loading runs nothing
    assert generate(page) == made


def test_bad_input_is_answered_with_a_sentence_and_foreign_files_stay_closed(page, served, tmp_path):
    for fields, words in (({"prompt": ""}, "prompt is empty"), ({"prompt": "a cat", "width": "33"}, "multiple of 8")):
        fill(page, **fields)
        page.locator("#generate").click()
        expect(page.locator("#status .bad")).to_contain_text(words)
        expect(page.locator("#generate")).to_be_enabled()
    keep_screenshot(page, "refused")
    (tmp_path / "other.json").write_text(json.dumps({"prompt": "a cat"}))
    load_recipe(page, tmp_path / "other.json")
    expect(page.locator("#status .bad")).to_contain_text("not a recipe")
    assert page.request.get(f"{served.url}gradio_api/file={Path(__file__)}").status == 403


def test_the_upscale_tab_enlarges_a_picture_and_a_recipe_of_the_other_tab_fills_it(page, tmp_path):
    made = generate(page, prompt="a red cat", steps="2", width="24", height="16")
    (tmp_path / "small.png").write_bytes(picture(page))
    page.get_by_role("tab", name="Upscale").click()
    with page.expect_file_chooser() as chooser:
        page.locator("#upscale-load-recipe").click()
    chooser.value.set_files(tmp_path / "small.png")
    line = page.locator("#upscale-status [role=status]")
    expect(line).to_contain_text("Recipe loaded")
    expect(page.locator("#upscale-prompt textarea")).to_have_value("a red cat")
    choose(page, "upscale-attention", "Agent attention")
    expect(page.locator("#upscale-settings-agent")).to_be_visible()
    expect(page.locator("#settings-agent")).to_be_hidden()
    fill(page, **{"upscale-scale": "1.5"})
    page.locator("#upscale-generate").click()
    expect(line).to_contain_text("Done in")
    keep_screenshot(page, "upscaled")
    answer = page.request.get(page.locator("#upscale-picture img").get_attribute("src")).body()
    assert Image.open(io.BytesIO(answer)).size == (40, 24)
    large = recipe_in(answer)
    assert (large.seed, large.prompt, large.attention) == (made.seed, "a red cat", ())
    assert (large.upscale.scale, large.upscale.attention[0]["name"]) == (1.5, "agent")
    with page.expect_download() as download:
        page.locator("#upscale-save-recipe").click()
    download.value.save_as(tmp_path / "recipe.json")
    assert Recipe.read(tmp_path / "recipe.json") == large


def test_stop_ends_enlarging_and_the_line_tells_the_size(page, gate):
    page.get_by_role("tab", name="Upscale").click()
    fill(page, **{"upscale-prompt": "a cat", "upscale-steps": "2", "upscale-width": "24", "upscale-height": "16"})
    page.locator("#upscale-more button").first.click()
    fill(page, **{"upscale-later-steps": "50"})
    page.locator("#upscale-generate").click()
    line = page.locator("#upscale-status [role=status]")
    expect(line).to_contain_text("Size 1 of 2, step 2 of 37")
    page.locator("#upscale-stop").click()
    gate.opened.set()
    expect(line).to_contain_text("Stopped at step")
    expect(page.locator("#upscale-generate")).to_be_enabled()


def test_the_distill_tab_watches_a_training_and_tries_its_student(page, served, tmp_path):
    import tiny

    from reattend.distill import DistillConfig, distill, make_dataset

    page.get_by_role("tab", name="Distill").click()
    line = page.locator("#distill-state [role=status]")
    expect(page.locator("#distill-none")).to_contain_text("reattend distill run")
    expect(line).to_be_hidden()
    keep_screenshot(page, "distill-empty")

    pipe = tiny.fresh(tiny.flux_pipeline())
    pipe.save_pretrained(tmp_path / "model")
    data = make_dataset(
        pipe, tmp_path / "data", prompts=["a cat"], samples=8, steps=1, sizes=[(32, 32)], text_length=16
    )
    config = DistillConfig(
        model=str(tmp_path / "model"), data=data, out=served.runs / "clear", steps=20, batch=4, lr=1e-3, log_every=1,
        attention={"name": "clear", "radius": 2}, validate_every=10, validation_prompts=("a cat on sand", "a blue car"),
        validation_steps=2,
    )  # fmt: skip
    distill(config, pipe=pipe)
    expect(line).to_have_text("Finished: step 20 of 20.")  # it appeared by itself
    expect(page.locator("#distill-none")).to_be_hidden()
    expect(page.locator("#distill-run input")).to_have_value("clear")
    facts = page.locator("#distill-facts")
    expect(facts).to_contain_text("clear, radius 2, pattern disc")
    expect(facts).to_contain_text("samples a second")
    for curve in ("loss", "output", "attention", "validation_latent_error"):
        expect(page.locator(f"#distill-curve-{curve} canvas, #distill-curve-{curve} svg").first).to_be_visible()
    expect(page.locator("#distill-pictures img")).to_have_count(2)
    expect(page.locator("#distill-pictures")).to_contain_text("a cat on sand")
    choose(page, "distill-step", "10")
    expect(page.locator("#distill-pictures")).to_contain_text("student, step 10")

    fill(page, **{"distill-prompt": "a red cat", "distill-steps": "2", "distill-seed": "5"})
    page.locator("#distill-draw").click()
    status_line = page.locator("#distill-status [role=status]")
    expect(status_line).to_contain_text("Done in")
    answers = [
        page.request.get(page.locator(f"#distill-{who} img").get_attribute("src")).body()
        for who in ("teacher", "student")
    ]
    recipes = [recipe_in(png) for png in answers]
    assert [recipe.seed for recipe in recipes] == [5, 5] and recipes[0].linear is None
    copy, student = Path(recipes[1].linear), served.runs / "clear" / "student"
    assert copy.parent == served.out and copy != student
    assert (copy / "student.safetensors").read_bytes() == (student / "student.safetensors").read_bytes()
    assert Image.open(io.BytesIO(answers[0])).size == (32, 32)
    keep_screenshot(page, "distill")

    distill(replace(config, steps=24), pipe=pipe)
    expect(line).to_have_text("Finished: step 24 of 24.")
    expect(facts).to_contain_text("after step 24")
    page.locator("#distill-prompt textarea").fill("")
    page.locator("#distill-draw").click()
    expect(page.locator("#distill-status .bad")).to_contain_text("prompt is empty")
    secret = served.runs / "clear" / "config.json"
    assert page.request.get(f"{served.url}gradio_api/file={secret}").status == 403
