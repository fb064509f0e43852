"""The image job behind the page: form -> recipe -> picture -> what the page shows. Plain functions, no Gradio.

`read_form` and `fill_form` are the two directions between the form and a `Recipe`; `ImageJob` is the work of the worker
thread; `make_image` is what happens after Generate: it yields one `View` after another until the run has ended.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from ..attn_processors import ATTN_PROCESSORS
from ..pipelines.events import CancelToken, StepEvent
from ..pipelines.files import free_path
from ..pipelines.image import generate, preview
from ..pipelines.load import load
from ..pipelines.picture import size_endings
from ..pipelines.recipe import Recipe
from ..pipelines.upscaling import upscale
from .attention_form import STOCK, as_text, settings_of
from .jobs import Made, Progress, Session, one_line

FIELDS = ("prompt", "negative", "model", "width", "height", "steps", "guidance", "seed", "dtype", "attention")
PICTURE_METHODS = {name: method for name, method in ATTN_PROCESSORS.items() if set(method.roles) & {"spatial", "joint"}}
PREVIEW_SHARE = 0.2  # previews may take this share of the time
UPDATE_EVERY = 0.5  # seconds between two updates of the page while nothing new happens


@dataclass(frozen=True)
class View:
    """What the page shows at one moment. `picture` is a file or a preview, `film` a file; None leaves what is there.

    `over` tells that a run has ended, `made` what it made.
    """

    message: str
    tone: Literal["info", "good", "bad"] = "info"
    busy: bool = False
    fraction: float | None = None
    picture: Path | Image.Image | None = None
    made: Any = None
    film: Path | None = None
    over: bool = False


class Previewer:
    """Previews that take at most PREVIEW_SHARE of a run: after one of t seconds, none for t / PREVIEW_SHARE."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._next = 0.0

    def __call__(self, latents: Tensor | None) -> Image.Image | None:
        start = time.monotonic()
        if latents is None or latents.ndim != 4 or start < self._next:  # packed latents (B, tokens, C) cannot be shown
            return None
        image = preview(latents, self._pipe)
        end = time.monotonic()
        self._next = end + (end - start) / PREVIEW_SHARE
        return image


class ImageJob:
    """Makes pictures, in one go or in stages, into one folder and keeps the model it used last.

    Only the worker thread may call it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._loaded: tuple[tuple[str, str | None], Any] | None = None  # (model, number format), pipeline

    def __call__(self, recipe: Recipe, token: CancelToken, report: Callable[[Progress], None]) -> Made:
        start = time.monotonic()
        pipe = self.pipe(recipe.model, recipe.dtype, report)
        token.check()
        show = Previewer(pipe)

        def on_step(event: StepEvent) -> None:
            image = show(event.latents) if event.step < event.steps else None
            part = f"Size {event.stage + 1} of {event.stages}" if event.stages > 1 else None
            report(Progress("Drawing", event.step, event.steps, event.eta, image, part))

        report(Progress("Working on the first step"))
        make = generate if recipe.upscale is None else upscale
        picture = make(recipe, pipe=pipe, on_step=on_step, cancel=token)
        path = free_path(self.out, recipe.prompt, ".png", size_endings(picture))
        *smaller, (file, recipe_file) = picture.save(path)
        return Made(file, recipe_file, picture.recipe, time.monotonic() - start, tuple(file for file, _ in smaller))

    def pipe(self, model: str, dtype: str | None, report: Callable[[Progress], None]) -> Any:
        """The loaded pipeline, that of the last picture if it is the same."""
        if self._loaded is not None:
            (name, asked), pipe = self._loaded
            if name == model and dtype in (asked, str(pipe.dtype).removeprefix("torch.")):
                return pipe
        report(Progress(f"Loading the model {model}"))
        self._loaded = None  # frees the last one first: two large models may not fit
        self._loaded = ((model, dtype), load(model, dtype=dtype))
        return self._loaded[1]


def make_image(
    session: Session,
    form: Mapping[str, Any],
    models: Sequence[str],
    read: Callable[[Mapping[str, Any], Sequence[str]], Recipe] | None = None,
) -> Iterator[View]:
    """After Generate: submit the form's recipe, yield views until the run has ended. Closing the iterator stops it.

    `read` reads the form of another tab; None is `read_form`.
    """
    with contextlib.closing(followed(session, lambda: (read or read_form)(form, models))) as views:
        for view in views:
            if view.made is not None:
                made = view.made
                line = f"{view.message} Seed {made.recipe.seed}."
                yield replace(view, message=line, picture=made.picture, film=made.film)
            elif view.over and session.shown:
                yield replace(view, picture=session.shown.picture, film=session.shown.film)  # in place of the preview
            else:
                yield view


def followed(session: Session, order: Callable[[], Any]) -> Generator[View, None, None]:
    """Submit an order and yield views until its run has ended. Closing the iterator stops it.

    order: makes it; what it raises is told, and nothing is submitted.
    """
    try:
        run = session.start(order())
    except (ValueError, TypeError, OSError) as error:
        yield View(one_line(error), "bad", busy=session.busy)
        return
    try:
        yield View("Starting", busy=True)
        shown: Image.Image | None = None
        played: tuple[Path, int] | None = None
        for progress, age in run.updates(UPDATE_EVERY):
            if progress is None:
                yield View(waiting_line(session.worker.ahead(run)), busy=True)
                continue
            line = "Stopping" if run.token.requested else progress.line(age)
            picture = progress.preview if progress.preview is not shown else None  # once: it may still be on its way
            film = progress.film if progress.film != played else None  # once: showing it starts it again
            shown, played = progress.preview or shown, progress.film
            yield View(line, busy=True, fraction=progress.fraction, picture=picture, film=film[0] if film else None)
    finally:
        session.worker.stop(run)  # does nothing to a run that has ended
    outcome = run.outcome
    assert outcome is not None, "updates end with the outcome"
    if outcome.kept is not None:  # the last preview shows it
        session.kept = outcome.kept
        yield View(outcome.text, film=outcome.kept.film)
        return
    if outcome.made is None:
        yield View(outcome.text, "info" if outcome.state == "stopped" else "bad", over=True)
        return
    session.keep(outcome.made)
    if session.kept is not None and session.kept.recipe == outcome.made.recipe:
        session.kept = None  # it is finished
    yield View(outcome.text, "good", made=outcome.made, over=True)


def waiting_line(ahead: int) -> str:
    if ahead == 0:
        return "Starting"
    return f"Waiting: {ahead} other {'job comes' if ahead == 1 else 'jobs come'} first"


def read_form(form: Mapping[str, Any], models: Sequence[str]) -> Recipe:
    """The recipe the form asks for. Empty size, guidance and seed mean: the model's own, and a seed drawn now.

    Args:
        form: FIELDS, and for each setting of the chosen attention an entry "name.setting".
        models: the models this page offers.

    Raises:
        ValueError, TypeError: one sentence about the first field that cannot be used.
    """
    prompt = (form["prompt"] or "").strip()
    if not prompt:
        raise ValueError("The prompt is empty; say what the picture should show.")
    check_model(form["model"], models)
    return Recipe(
        prompt=prompt,
        negative=(form["negative"] or "").strip(),
        model=form["model"],
        width=whole("width", form["width"]),
        height=whole("height", form["height"]),
        steps=whole("number of steps", form["steps"]),  # type: ignore[arg-type]  # Recipe refuses None
        guidance=number("guidance", form["guidance"]),
        seed=whole("seed", form["seed"]),
        dtype=form["dtype"] or None,
        attention=read_attention(form),
    )


def read_attention(form: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The chosen attention with its settings as a recipe holds it; empty for the stock one. Raises ValueError."""
    name = form["attention"]
    if name == STOCK:
        return ()
    if name not in PICTURE_METHODS:
        raise ValueError(f"There is no attention called {name!r}; choose one of {', '.join(PICTURE_METHODS)}.")
    return ({"name": name} | {s.name: s.read(form[f"{name}.{s.name}"]) for s in settings_of(PICTURE_METHODS[name])},)


def fill_form(recipe: Recipe, models: Sequence[str]) -> dict[str, Any]:
    """The form that asks for this recipe: every field of FIELDS and of the recipe's attention.

    Raises:
        ValueError, TypeError: the recipe asks for what this page cannot do.
    """
    check_model(recipe.model, models)
    if recipe.video is not None:
        raise ValueError("The recipe makes a film; load it on the tab Long video.")
    if recipe.linear is not None:
        raise ValueError(
            "The recipe draws with a linear student, which this page does not open from a file; "
            "use it on the command line: reattend image --recipe."
        )
    if recipe.upscale is not None:
        raise ValueError("The recipe enlarges its picture; load it on the tab Upscale.")
    if len(recipe.attention) > 1:
        raise ValueError(
            f"The recipe combines {len(recipe.attention)} attentions and this page can hold one; "
            "use it on the command line: reattend image --recipe."
        )
    form = {name: getattr(recipe, name) for name in ("prompt", "negative", "model", "steps")}
    form |= {name: as_text(getattr(recipe, name)) for name in ("width", "height", "guidance", "seed", "dtype")}
    form["attention"] = STOCK
    for entry in recipe.attention:
        if entry["name"] not in PICTURE_METHODS:
            raise ValueError(f"The recipe's attention {entry['name']!r} is for films; use the tab Long video.")
        name = form["attention"] = entry["name"]
        form |= {f"{name}.{s.name}": s.shown(entry[s.name]) for s in settings_of(ATTN_PROCESSORS[name])}
    return form


def load_recipe(
    path: Path,
    models: Sequence[str],
    fill: Callable[[Recipe, Sequence[str]], dict[str, Any]] | None = None,
) -> tuple[dict[str, Any], View]:
    """Read a recipe from a picture or JSON file; the form's fields (none if it cannot be used) and what to say.

    `fill` fills the form of another tab; None is `fill_form`.
    """
    try:
        form = (fill or fill_form)(Recipe.read(path), models)
    except (ValueError, TypeError, OSError) as error:
        return {}, View(
            one_line(error).replace(str(path), path.name), "bad"
        )  # the server's own path is nobody's business
    return form, View("Recipe loaded. Press Generate to make it again.", "good")


def check_model(model: Any, models: Sequence[str]) -> None:
    if model not in models:
        raise ValueError(
            f"This page does not offer the model {model!r}, only {', '.join(models)}; "
            f"to use it, start the page with --model {model}."
        )


def number(what: str, value: Any) -> float | None:
    """A form field as a number; None when it is empty. Raises ValueError."""
    text = "" if value is None else str(value).strip()
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(
            f"The {what} must be a number, got {text[:40]!r}; type one such as 7.5, or leave the field empty."
        ) from None


def whole(what: str, value: Any) -> int | None:
    """A form field as a whole number; None when it is empty. Raises ValueError."""
    text = "" if value is None else str(value).strip()
    try:
        return int(text) if text else None
    except ValueError:
        raise ValueError(
            f"The {what} must be a whole number, got {text[:40]!r}; type digits, or leave the field empty."
        ) from None


def summary(recipe: Recipe) -> str:
    """A recipe's facts in one line."""
    size = f"{recipe.width} × {recipe.height}" if recipe.width and recipe.height else "model's own size"
    if recipe.video is not None:
        size += f", {recipe.video.frames} frames, {recipe.video.fps} a second"
        if recipe.video.strength is not None:
            size += f", from another film at strength {recipe.video.strength:g}"
        if "conditioning_frames" in recipe.video.pictures:
            size += ", along pictures that were given"
    attention = attention_words(recipe.attention)
    if (growth := recipe.upscale) is not None:
        size += (
            f", then {growth.scale:g} times as large" if growth.scale else f", then {len(growth.sizes)} larger sizes"
        )
        size += f" at strength {growth.strength:g}"
        if growth.attention is not None and growth.attention != recipe.attention:
            attention += f", later {attention_words(growth.attention)}"
    guidance = "" if recipe.guidance is None else f", guidance {recipe.guidance:g}"
    return f"{recipe.model}, {size}, {recipe.steps} steps{guidance}, {attention} attention, seed {recipe.seed}"


def attention_words(attention: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(entry["name"] for entry in attention) or STOCK
