"""The page as a server: who can reach it, what it gives away, and how it refuses."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import httpx
import pytest
from PIL import Image

from reattend.ui.page import Page, check_access, is_loopback, launch, output_folder, own_temporary_folder, start


@pytest.mark.parametrize(
    ("host", "share", "password", "words"),
    [
        ("127.0.0.1", True, None, "set a password"),
        ("0.0.0.0", False, None, "set a password"),
        ("example.org", False, None, "set a password"),
        ("127.0.0.1", True, " ", "password is empty"),
    ],
)
def test_nobody_else_gets_in_without_a_password(host, share, password, words):
    with pytest.raises(ValueError, match=words):
        check_access(host, share, password)


def test_a_password_opens_the_page_to_others_and_this_machine_needs_none():
    check_access("0.0.0.0", True, "secret")
    check_access("localhost", False, None)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "192.168.1.4")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_sharing_without_a_password_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="set a password"):
        launch(share=True)
    assert list(tmp_path.iterdir()) == []


def test_the_output_folder_must_not_hold_the_current_or_the_home_folder(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    for folder in (".", "..", "/", tmp_path / "home"):
        with pytest.raises(ValueError, match="folder of its own"):
            output_folder(Path(folder))
    assert output_folder(Path("out/pictures")) == work / "out" / "pictures"


def test_an_output_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot make the output folder"):
        output_folder(tmp_path / "file" / "out")


def test_temporary_files_are_gone_afterwards(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "as it was")
    with own_temporary_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "upload.png").write_text("x")
    assert os.environ["GRADIO_TEMP_DIR"] == "as it was"
    assert not folder.exists()


@pytest.fixture(scope="module")
def http(served: Page):
    with httpx.Client(base_url=served.url, trust_env=False, timeout=60) as client:
        yield client


def test_the_page_listens_on_loopback_only(served):
    assert served.url.startswith("http://127.0.0.1:")
    assert served.share_url is None


def test_files_in_the_output_folder_can_be_read_and_no_others(served, http):
    Image.new("RGB", (8, 8)).save(served.out / "mine.png")
    neighbour = served.out.parent / "outside.txt"
    neighbour.write_text("private")
    assert http.get(f"gradio_api/file={served.out / 'mine.png'}").status_code == 200
    for path in (neighbour, served.out / ".." / "outside.txt", Path("pyproject.toml").resolve(), Path("/etc/passwd")):
        answer = http.get(f"gradio_api/file={path}")
        assert answer.status_code == 403, path
        assert "private" not in answer.text


def test_too_large_an_upload_is_refused(http):
    assert http.post("gradio_api/upload", files={"files": ("small.png", b"x" * 1000)}).status_code == 200
    assert http.post("gradio_api/upload", files={"files": ("big.png", b"x" * 25_000_000)}).status_code == 413


def test_the_served_page_loads_nothing_from_elsewhere(http):
    """Addresses in loading tags and styles only; the text may name any. The browser tests watch what is really fetched."""
    html = http.get("").text
    theme = http.get("theme.css").text
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](https?:)?//([^"'/]+)""", html)
    assert [host for _, host in loaded if not host.startswith("127.0.0.1")] == []
    assert re.findall(r"url\(['\"]?https?://[^)]*|@import[^;]*", theme) == []
    assert '"analytics_enabled":false' in html.replace(" ", "")


def test_scripts_from_elsewhere_cannot_call_the_handlers(http):
    names = http.get("gradio_api/info").json()
    assert names["named_endpoints"] == {}
    assert names["unnamed_endpoints"] == {}


def test_a_port_in_use_is_one_sentence(sd_folder, tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ValueError, match=r"port \d+: it is in use.*--port"),
    ):
        start(model=str(sd_folder), out=tmp_path / "out", port=taken.getsockname()[1])


def test_a_password_is_asked_for_and_any_name_goes_with_it(sd_folder, tmp_path):
    page = start(model=str(sd_folder), out=tmp_path / "out", password="open sesame")
    try:
        with httpx.Client(base_url=page.url, trust_env=False, timeout=60) as client:
            assert client.get("config").status_code == 401
            assert client.post("login", data={"username": "me", "password": "sesame"}).status_code == 400
            assert client.post("login", data={"username": "me", "password": "open sesame"}).status_code == 200
            assert client.get("config").status_code == 200
    finally:
        page.close()
