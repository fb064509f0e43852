"""One page for all tests of the page, and the browser that looks at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (  # nothing but the page: no sandbox (root in a container), no graphics card, no services of its own
    "--no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="session")
def served(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running page that offers the tiny pipeline; its pictures go to `served.out`, trainings are found in `served.runs`."""
    from reattend.ui.page import start

    folder = tmp_path_factory.mktemp("page")
    out, runs = folder / "out", folder / "runs"
    page = start(model=str(sd_folder), out=out, runs=runs)
    page.out, page.runs = out, runs
    yield page
    page.close()


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict[str, Any]:
    """Debian's Chromium, or another that is there; read by pytest-playwright."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        reason = f"no browser: none of {', '.join(BROWSERS)} is on PATH; run `make browser`"
        if os.environ.get("REATTEND_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return {"executable_path": found, "args": QUIET.split(), "headless": True}
