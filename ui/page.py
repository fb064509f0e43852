"""The page: one `gr.Blocks` with a tab per job, and a server with careful defaults.

Only this machine can reach it, unless a password is set; only the output folder and the page's own temporary files can
be read through it; it calls no other server (system fonts, no analytics).
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import os
import tempfile
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipelines.load import bundled
from .jobs import Worker

if TYPE_CHECKING:
    import gradio as gr

UPLOAD_LIMIT = "20mb"  # a recipe travels in a picture; a 2048 x 2048 PNG has about 8 MB
RUNS = Path("runs")
WAITING_LIMIT = 32  # requests that may wait for the server

CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.gradio-container > main { width: 100% !important; max-width: none !important; }
#title h1 { font-size: 1.75rem; letter-spacing: -0.02em; margin: 0.5rem 0 0; }
#title p { color: var(--body-text-color-subdued); margin: 0.1rem 0 0.4rem; }
.status-line, .status-line .html-container { padding: 0 !important; }
.shown-picture img { width: 100%; height: 100%; object-fit: contain; }
.clicked-picture img { cursor: crosshair; }
.shown-strips .thumbnail-item { aspect-ratio: 3 / 1 !important; height: auto !important; }
.status-line .status {
  display: flex; flex-direction: column; justify-content: center; gap: 0.5rem;
  min-height: 2.9rem; padding: 0.65rem 0.85rem;
  border: 1px solid var(--block-border-color); border-left: 4px solid var(--color-accent);
  border-radius: var(--radius-lg); background: var(--block-background-fill);
  color: var(--body-text-color); font-variant-numeric: tabular-nums;
}
.status-line .status.good { border-left-color: #16a34a; }
.status-line .status.bad { border-left-color: #dc2626; }
.status .bar { height: 0.45rem; border-radius: 1rem; overflow: hidden; background: var(--border-color-primary); }
.status .bar div { height: 100%; border-radius: 1rem; background: var(--color-accent); transition: width 0.3s; }
.status .bar.unknown div { width: 30% !important; animation: to-and-fro 1.6s ease-in-out infinite alternate; }
table.facts { width: 100%; border: 0 !important; border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.facts :is(tr, th, td) { border: 0 !important; background: none !important; }
table.facts th { width: 9rem; text-align: left; font-weight: 400; color: var(--body-text-color-subdued); }
table.facts :is(th, td) { padding: 0.15rem 0.5rem 0.15rem 0 !important; vertical-align: top; overflow-wrap: anywhere; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 0.9rem; }
.pairs figure { margin: 0; }
.pairs figcaption { font-weight: 600; margin-bottom: 0.25rem; }
.pairs img { width: 100%; border-radius: var(--radius-md); }
.pairs figure div { display: flex; color: var(--body-text-color-subdued); font-size: 0.85em; }
.pairs figure span { flex: 1; text-align: center; }
@keyframes to-and-fro { from { margin-left: 0; } to { margin-left: 70%; } }
"""


class Page:
    """A running page: its address, and how to end it."""

    def __init__(
        self, worker: Worker, blocks: gr.Blocks, url: str, share_url: str | None, undo: contextlib.ExitStack
    ) -> None:
        self.worker = worker
        self.blocks = blocks
        self.url = url
        self.share_url = share_url
        self._undo = undo

    def close(self) -> None:
        """Stop running work and the server, and delete the page's temporary files. A second call does nothing."""
        self._undo.close()


def build(worker: Worker, models: Sequence[str], out: Path = Path("out"), runs: Path = RUNS) -> gr.Blocks:
    """The page without a server.

    Args:
        worker: does the work of all browser sessions, one after another.
        models: the models to offer; at least one.
        out: the folder for what is saved.
        runs: folder under which trainings are found.
    """
    import gradio as gr

    from .film_form import film_models
    from .tabs.distill import distill_tab
    from .tabs.film import film_tab
    from .tabs.image import image_tab
    from .tabs.story import story_tab
    from .tabs.upscale import upscale_tab

    pictures, films = film_models(models)
    pictures = pictures or list(models)  # which then say that they make none

    with gr.Blocks(title="Reattend", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(
            "# Reattend\nPictures and films from stock diffusers models, with the attention inside them exchanged.",
            elem_id="title",
        )
        with gr.Tabs():
            with gr.Tab("Image", id="image"):
                image_tab(worker, pictures)
            with gr.Tab("Upscale", id="upscale"):
                upscale_tab(worker, pictures)
            with gr.Tab("Story", id="story"):
                story_tab(worker, pictures, out)
            with gr.Tab("Long video", id="film"):
                film_tab(worker, films)
            with gr.Tab("Distill", id="distill"):
                distill_tab(worker, runs, blocks)
    return blocks.queue(max_size=WAITING_LIMIT, api_open=False)


def start(
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    password: str | None = None,
    out: Path = Path("out"),
    runs: Path = RUNS,
) -> Page:
    """Start the page's server in the background.

    Args:
        model: a folder or hub id to offer, chosen at first, besides the bundled models.
        host: the address to listen at; other machines can reach anything but loopback, so that needs a password.
        port: the port; None takes the first free one from 7860.
        share: also open a public gradio.live address; needs a password.
        password: what people must type first, with any user name.
        out: the folder for pictures; the only one whose files can be read through the page.
        runs: the folder under which trainings are found, to be watched; of these only what the page shows can be seen.

    Raises:
        ValueError: one sentence on what cannot be done.
    """
    from ..pipelines.recipe import Recipe
    from .film_files import folder_in
    from .film_job import FilmJob
    from .jobs import by_class
    from .story_job import Order, StoryJob
    from .student_job import StudentJob

    check_access(host, share, password)
    out = output_folder(out)
    usual = sorted(bundled(), key=lambda name: name != Recipe.model)  # the default of all commands first
    models = tuple(dict.fromkeys([*([model] if model else []), *usual]))
    if not models:
        raise ValueError("There is no bundled model in this installation; name a folder or hub id with --model.")
    with contextlib.ExitStack() as undo:
        temporary = undo.enter_context(own_temporary_folder())
        pictures = StudentJob(out)
        films = FilmJob(out, pictures.pipe, folder_in(temporary))  # one model in memory at a time

        def drawn(recipe: Recipe, *how: Any) -> Any:
            return (films if recipe.video is not None else pictures)(recipe, *how)

        worker = Worker(by_class({Recipe: drawn, Order: StoryJob(out, pictures.pipe)}))
        undo.callback(worker.close)
        blocks = build(worker, models, out=out, runs=Path(runs).expanduser().resolve())
        undo.callback(blocks.close, verbose=False)
        with _server_errors(host, port):
            _, url, share_url = blocks.launch(
                server_name=host,
                server_port=port,
                share=share,
                auth=_only_with(password) if password else None,
                auth_message="Type any name, and the password that was set when the page was started.",
                allowed_paths=[str(out)],
                max_file_size=UPLOAD_LIMIT,
                prevent_thread_lock=True,
                quiet=True,
                inbrowser=False,
                inline=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                theme=_theme(),
                css=CSS,
            )
        kept = undo.pop_all()
    return Page(worker, blocks, url, share_url, kept)


def launch(
    *,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    password: str | None = None,
    out: Path = Path("out"),
    runs: Path = RUNS,
    open_browser: bool = False,
) -> None:
    """Start the page, say where it is, and serve until Ctrl-C. Arguments and errors as for `start`."""
    page = start(model=model, host=host, port=port, share=share, password=password, out=out, runs=runs)
    try:
        print(f"Reattend is at {page.url} (stop with Ctrl-C). Pictures go to {out}.")
        if share:
            print(
                f"Anyone with the password can reach it at {page.share_url}."
                if page.share_url
                else "No public address could be opened."
            )
        if open_browser:
            webbrowser.open(page.url)
        page.blocks.block_thread()
    finally:
        page.close()


def check_access(host: str, share: bool, password: str | None) -> None:
    """Refuse to be reachable from elsewhere without a password. Raises ValueError."""
    if password is not None and not password.strip():
        raise ValueError("The password is empty; give one with at least one letter, or none to stay on this machine.")
    if password is None and share:
        raise ValueError(
            "A shared page can be used by anyone who has its address; set a password too, with --password."
        )
    if password is None and not is_loopback(host):
        raise ValueError(
            f"Other machines can reach the page at {host}; set a password with --password, or use --host 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def output_folder(out: Path) -> Path:
    """Make the folder and return its absolute path.

    Raises:
        ValueError: it cannot be made, or it holds the current folder or the home folder, which would then be readable.
    """
    full = Path(out).expanduser().resolve()
    for private, name in ((Path.cwd(), "the folder you are in"), (Path.home(), "your home folder")):
        if private.resolve().is_relative_to(full):
            raise ValueError(
                f"The output folder {out} would open {name} to everyone who can reach the page; "
                "name a folder of its own, such as --out out."
            )
    try:
        full.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"Cannot make the output folder {out} ({error.strerror}); name another with --out.") from None
    return full


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Give Gradio a folder for uploads and previews that is deleted at the end, not the one all Gradio pages share."""
    name = "GRADIO_TEMP_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="reattend-page-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextlib.contextmanager
def _server_errors(host: str, port: int | None) -> Iterator[None]:
    """Turn "no free port" and "no such address" into one sentence."""
    try:
        yield
    except OSError as error:
        if port is None:
            raise ValueError(
                f"The page cannot listen at {host}: {error}; check --host or name a free port with --port."
            ) from None
        raise ValueError(
            f"The page cannot listen at {host} port {port}: it is in use or not allowed; "
            "name another, or leave --port out."
        ) from None


def _only_with(password: str) -> Callable[[str, str], bool]:
    return lambda _name, given: hmac.compare_digest(given.encode(), password.encode())


def _theme() -> gr.Theme:
    """System fonts, so that the page fetches none, and labels that do not shout."""
    import gradio as gr

    theme = gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    labels = {f"block_{part}_background_fill{mode}": "none" for part in ("title", "label") for mode in ("", "_dark")}
    colours = {f"block_{part}_text_color": "*neutral_700" for part in ("title", "label")}
    dark = {f"block_{part}_text_color_dark": "*neutral_200" for part in ("title", "label")}
    return theme.set(
        **labels,
        **colours,
        **dark,
        block_title_padding="0",
        block_border_width="1px",
        block_shadow="none",
        button_large_padding="*spacing_md *spacing_lg",
        input_border_width="1px",
        input_border_color="*neutral_200",
        input_shadow="none",
    )
