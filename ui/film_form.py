"""The form of the tab for long videos: which models it offers, what each takes, and form <-> recipe. No Gradio."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import AnimateDiffPAGPipeline
from huggingface_hub import try_to_load_from_cache

from ..attn_processors import DualScopeAttnProcessor
from ..pipelines.filming import DUAL_SCOPE
from ..pipelines.load import bundled
from ..pipelines.recipe import Recipe
from ..pipelines.videos import NUMBERS, Video
from .attention_form import STOCK, as_text, settings_of
from .image_job import fill_form, number, read_form, whole

TAKES: dict[str, tuple[str, ...]] = {  # what the pipelines that this tab offers take besides text, by their classes
    "AnimateDiffPipeline": (),
    "AnimateDiffSDXLPipeline": (),
    "AnimateDiffPAGPipeline": ("pag_scale",),
    "AnimateDiffVideoToVideoPipeline": ("video", "strength"),
    "AnimateDiffControlNetPipeline": ("conditioning_frames", "controlnet_conditioning_scale"),
    "AnimateDiffVideoToVideoControlNetPipeline": (
        "video", "strength", "conditioning_frames", "controlnet_conditioning_scale",
    ),
}  # fmt: skip
EVERYTHING = tuple(dict.fromkeys(word for words in TAKES.values() for word in words))
SCALES = {  # numbers that count for some models, and what they are called in messages
    "strength": "share of the film that may change",
    "controlnet_conditioning_scale": "weight of the ControlNet",
    "pag_scale": "weight of perturbed-attention guidance",
}
FIELDS = ("frames", "fps", "later", "blend", "given", *SCALES)  # beside those of a picture
SETTINGS = settings_of(DualScopeAttnProcessor)

NO_MODEL = (
    "There is no model for films here: `tiny-video` is not part of this installation, and no folder of an AnimateDiff "
    "pipeline was named when the page was started; start it again with `reattend ui --model FOLDER`."
)


def film_models(models: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models that may make pictures and those that may make films here; one that is not here yet may do either."""
    kinds = {model: _pipeline_class(model) for model in models}
    films = [model for model, kind in kinds.items() if kind is None or kind in TAKES]
    return [model for model, kind in kinds.items() if kind is None or not kind.startswith("AnimateDiff")], films


def takes(model: str) -> tuple[str, ...]:
    """What a model takes besides text, by argument of its pipeline; one that is not here yet may take anything."""
    kind = _pipeline_class(model)
    return EVERYTHING if kind is None else TAKES.get(kind, ())


def _pipeline_class(model: str) -> str | None:
    """The pipeline that a model folder or a hub id names; None for what is not on this machine yet."""
    file: Any = bundled().get(model, Path(model).expanduser()) / "model_index.json"
    try:
        if not file.is_file():
            file = try_to_load_from_cache(model, "model_index.json")
        return str(json.loads(Path(file).read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_film_form(form: Mapping[str, Any], models: Sequence[str]) -> Recipe:
    """The recipe the form asks for. What its model does not take is not read.

    Args:
        form: what `image_job.read_form` reads but the attention, FIELDS, and an entry "dual-scope.setting" for each of
            SETTINGS. "given" has the digests of films and pictures (`film_files`) by argument.
        models: the models this page offers for films.

    Raises:
        ValueError, TypeError: one sentence about the first field that cannot be used.
    """
    if not (form["prompt"] or "").strip():
        raise ValueError("The prompt is empty; say what the film should show.")
    recipe = read_form({**form, "attention": STOCK}, models)
    words = takes(recipe.model)
    numbers: dict[str, Any] = {name: number(what, form[name]) for name, what in SCALES.items() if name in words}
    video = Video(
        frames=_needed("number of frames", form["frames"]),
        fps=_needed("number of frames per second", form["fps"]),
        later=_read_later(form["later"] or ""),
        blend=whole("number of frames of a change", form["blend"]) or 0,
        pictures={word: digest for word, digest in form["given"].items() if word in words},
        **numbers,
    )
    attention = {"name": DUAL_SCOPE} | {s.name: s.read(form[f"{DUAL_SCOPE}.{s.name}"]) for s in SETTINGS}
    return replace(recipe, video=video, attention=(attention,))


def fill_film_form(recipe: Recipe, models: Sequence[str]) -> dict[str, Any]:
    """The form that asks for this recipe.

    Raises:
        ValueError, TypeError: the recipe asks for what this tab cannot do.
    """
    video = recipe.video
    if video is None:
        raise ValueError("The recipe makes a picture; load it on the tab Image or Upscale.")
    others = [entry["name"] for entry in recipe.attention if entry["name"] != DUAL_SCOPE]
    if others or len(recipe.attention) > 1:
        raise ValueError(
            f"The recipe combines {' and '.join(entry['name'] for entry in recipe.attention)} attention and this page can "
            "hold dual-scope alone; use it on the command line: reattend video --recipe."
        )
    form = fill_form(replace(recipe, attention=(), video=None), models)
    _check_shown(recipe.model, video)  # a model that the page offers, not any path a recipe may name
    del form["attention"]
    method: Any = DualScopeAttnProcessor()
    chosen = recipe.attention[0] if recipe.attention else method.settings()
    form |= {f"{DUAL_SCOPE}.{s.name}": s.shown(chosen[s.name]) for s in SETTINGS}
    form |= {name: getattr(video, name) for name in ("frames", "fps", "blend")}
    form |= {name: as_text(getattr(video, name)) for name in SCALES}
    form["later"] = "\n".join(f"{frame}: {prompt}" for frame, prompt in video.later)
    return form | {"given": dict(video.pictures)}


def _check_shown(model: str, video: Video) -> None:
    """Raise ValueError if the recipe has something that no field shows, or not for this model."""
    inputs = [*video.pictures, *(name for name in NUMBERS if getattr(video, name) is not None)]
    usual = inspect.signature(AnimateDiffPAGPipeline.__init__).parameters["pag_applied_layers"].default
    inputs += ["controlnet_frame_indices"] if video.controlnet_frame_indices else []
    inputs += ["pag_applied_layers"] if video.pag_applied_layers not in ((), (usual,)) else []
    words = takes(model)
    foreign = [word for word in inputs if word not in words]
    foreign.sort(key=lambda word: not word.startswith("ip_adapter"))
    if not foreign:
        return
    if foreign[0] in EVERYTHING:
        raise ValueError(
            f"The recipe has {foreign[0]}, which its model {model} does not take; leave it out of the recipe."
        )
    where = (
        "from Python: long_video"
        if foreign[0].startswith("ip_adapter")
        else "on the command line: reattend video --recipe"
    )
    raise ValueError(f"The recipe has {foreign[0]}, which this page cannot show; use it {where}.")


def _read_later(text: str) -> tuple[tuple[int, str], ...]:
    """Later prompts, one a line: "64: a blue car on sand". Raises ValueError."""
    later = []
    for line in filter(None, map(str.strip, text.splitlines())):
        frame, colon, prompt = line.partition(":")
        if not colon or not frame.strip().isdecimal():
            raise ValueError(
                f"A later prompt cannot be read: {line[:60]!r}; write the frame it begins at, a colon and the prompt, such as "
                "64: a blue car on sand."
            )
        later.append((int(frame), prompt.strip()))
    return tuple(later)


def _needed(what: str, value: Any) -> int:
    number = whole(what, value)
    if number is None:
        raise ValueError(f"The {what} is empty; give a whole number.")
    return number
