"""The form of the upscale tab: form -> recipe and back. The rest of the job is that of the image tab (`image_job`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..pipelines.recipe import Recipe
from ..pipelines.stages import Upscale
from .attention_form import as_text
from .image_job import attention_words, fill_form, number, read_form, whole

MORE_FIELDS = ("scale", "strength", "later_steps", "attention_first", "shift", "rope_theta_scale", "tile_from")
COMMAND_LINE = "use it on the command line: reattend upscale --recipe."


def read_upscale_form(form: Mapping[str, Any], models: Sequence[str]) -> Recipe:
    """The recipe the form asks for: that of the image form, and how its picture grows.

    Args:
        form: what `image_job.read_form` reads, and MORE_FIELDS. The chosen attention is that of the later sizes;
            `attention_first` says whether it is that of the first one too.
        models: the models this page offers.

    Raises:
        ValueError, TypeError: one sentence about the first field that cannot be used.
    """
    recipe = read_form(form, models)
    tile_from = whole("size to tile from", form["tile_from"])
    growth = Upscale(
        scale=number("scale", form["scale"]),
        strength=number("strength", form["strength"]),  # type: ignore[arg-type]  # Upscale refuses None
        steps=whole("number of steps of the later sizes", form["later_steps"]),
        attention=None if form["attention_first"] else recipe.attention,
        shift=number("shift", form["shift"]),
        rope_theta_scale=number("factor on the rotary base", form["rope_theta_scale"]),
        tile_from=Upscale().tile_from if tile_from is None else tile_from,
    )
    return replace(recipe, attention=recipe.attention if form["attention_first"] else (), upscale=growth)


def fill_upscale_form(recipe: Recipe, models: Sequence[str]) -> dict[str, Any]:
    """The form that asks for this recipe. One that does not enlarge its picture gets the usual settings.

    Raises:
        ValueError, TypeError: the recipe asks for what this page cannot do.
    """
    growth = recipe.upscale or Upscale(attention=() if not recipe.attention else None)
    if growth.source is not None:
        raise ValueError(f"The recipe starts from a picture file, which this page does not open; {COMMAND_LINE}")
    if growth.scale is None:
        raise ValueError(f"The recipe lists {len(growth.sizes)} sizes and this page can hold a scale; {COMMAND_LINE}")
    later = recipe.attention if growth.attention is None else growth.attention
    if recipe.attention not in ((), later):
        raise ValueError(
            f"The recipe changes from {attention_words(recipe.attention)} to {attention_words(later)} attention after "
            f"the first size and this page can only add one; {COMMAND_LINE}"
        )
    form = fill_form(replace(recipe, attention=later, upscale=None), models)
    return form | {
        "scale": str(growth.scale).removesuffix(".0"),
        "strength": growth.strength,
        "later_steps": as_text(growth.steps),
        "attention_first": recipe.attention == later and bool(later),
        "shift": as_text(growth.shift),
        "rope_theta_scale": as_text(growth.rope_theta_scale),
        "tile_from": str(growth.tile_from),
    }
