"""What tests of the page in a real Chromium share."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page, expect

PATIENCE = 90_000  # milliseconds; machines that run the suite may be busy with other things
SCREENSHOTS = Path(__file__).parents[1] / "out" / "screenshots"

expect.set_options(timeout=PATIENCE)


def fill(page: Page, **fields: str) -> None:
    for name, value in fields.items():
        page.locator(f"#{name} textarea, #{name} input[type=number], #{name} input[type=text]").first.fill(value)


def choose(page: Page, name: str, label: str) -> None:
    page.locator(f"#{name} input").click()
    page.get_by_role("option", name=label).click()


def keep_screenshot(page: Page, name: str) -> None:
    """For people to look at; no test reads it."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
