"""The commands that make pictures: `reattend image` and `reattend upscale`."""

from __future__ import annotations

import json as json_text
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from ..pipelines.recipe import Recipe
from ..pipelines.stages import Upscale as Growth
from .options import FILE, NUMBER, OUT, TEXT, WHOLE, Bar, attention_entry, default, quiet_libraries, read_size
from .ranks import joined

DEFAULT_RECIPE = Recipe(prompt="-")
DEFAULT_GROWTH = Growth()


@dataclass(frozen=True, kw_only=True)
class Image:
    """Make a picture from a text, and write it as PNG with its recipe inside and beside it."""

    prompt: Annotated[str | None, Positional, TEXT, arg(metavar="PROMPT", help_behavior_hint="")] = None
    """What the picture shows. May be left out with --recipe."""
    recipe: Annotated[Path | None, FILE, default("none")] = None
    """PNG or JSON file that reattend wrote: make that picture again. Other options change single values of it."""
    model: Annotated[str | None, TEXT, default(DEFAULT_RECIPE.model)] = None
    """Bundled name, local diffusers folder, or hub id."""
    negative: Annotated[str | None, TEXT, default("none")] = None
    """What the picture should not show."""
    width: Annotated[int | None, WHOLE, default("the model's own")] = None
    """In pixels, a multiple of 8."""
    height: Annotated[int | None, WHOLE, default("the model's own")] = None
    """In pixels, a multiple of 8."""
    steps: Annotated[int | None, WHOLE, default(DEFAULT_RECIPE.steps)] = None
    """Denoising steps; more = slower and finer."""
    guidance: Annotated[float | None, NUMBER, default("the model's own")] = None
    """How strongly the prompt is followed."""
    seed: Annotated[int | None, WHOLE, default("drawn, and told")] = None
    """The only source of chance."""
    attention: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: stock; repeatable)"),
    ] = ()
    """Attention to use in place of the stock one, for example: --attention agent ratio=0.4"""
    linear: Annotated[Path | None, FILE, default("none")] = None
    """Folder of a trained linear student (`reattend distill run`) or a bundled name, in place of --attention."""
    out: Path = OUT
    """Folder, or name of a PNG file."""
    device: Annotated[str | None, TEXT, default("the first of cuda, mps, cpu")] = None
    """Where to compute."""
    dtype: Annotated[str | None, TEXT, default("float32 on a CPU, 16 bits on CUDA")] = None
    """Numbers to compute in: float32, float16 or bfloat16."""
    json: bool = False
    """Print one JSON object on stdout."""

    def run(self) -> None:
        """Make the picture, in one go or in stages. Raises ValueError or TypeError for bad input, as early as possible."""
        from ..pipelines.files import check_writable, free_path

        recipe = self.to_recipe()
        named = self.out.suffix != ""
        if named and self.out.suffix.lower() != ".png":
            raise ValueError(
                f"--out {self.out} is no PNG file: pictures are written as PNG; give a name ending in .png, or a folder"
            )
        check_writable(self.out)
        began = time.monotonic()
        quiet_libraries()  # before the imports: some of their notices come with those
        from ..pipelines import generate, load, upscale
        from ..pipelines.picture import size_endings

        make = generate if recipe.upscale is None else upscale
        with joined(self.device) as ranks:
            pipe = load(recipe.model, device=ranks.device(self.device), dtype=recipe.dtype)
            with Bar(silent=not ranks.speaks) as bar:
                picture = make(ranks.seeded(recipe), pipe=pipe, on_step=bar, split=ranks.split)
        if not ranks.speaks:
            return
        words = f"{recipe.prompt} {picture.recipe.seed}"
        path = self.out if named else free_path(self.out, words, ".png", size_endings(picture))
        *smaller, (image, sidecar) = picture.save(path)
        seconds = time.monotonic() - began
        if self.json:
            made = {"image": str(image), "recipe_file": str(sidecar), "seconds": round(seconds, 3)}
            made |= {"smaller": [str(file) for file, _ in smaller]} if recipe.upscale else {}
            print(json_text.dumps({**made, "recipe": json_text.loads(picture.recipe.to_json())}))
        else:
            for file, _ in smaller:
                print(file)
            print(f"{image}  (seed {picture.recipe.seed}, {seconds:.1f} s)")

    def to_recipe(self) -> Recipe:
        """The recipe of `--recipe` or the default one, with the options that were given."""
        return self._recipe({"attention": self._attention()} if self.attention else {})

    def _recipe(self, given: dict[str, Any]) -> Recipe:
        names = ("prompt", "negative", "model", "width", "height", "steps", "guidance", "seed", "dtype")
        given |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.linear is not None:
            from ..distill.linear_folder import bundled_students, find_student

            if not find_student(self.linear).exists():
                raise ValueError(
                    f"--linear {self.linear} is not there; give the folder of a student, its weight file, or a bundled name "
                    f"({', '.join(bundled_students()) or 'none in this install'})"
                )
            given["linear"] = str(self.linear)
        if self.recipe is not None:
            return replace(Recipe.read(self.recipe), **given)
        if "prompt" not in given:
            raise ValueError(
                "no prompt was given: say what the picture shows, as in "
                f'reattend {type(self).__name__.lower()} "a blue car on sand"'
            )
        return Recipe(**given)

    def _attention(self) -> tuple[dict[str, str], ...]:
        return tuple(attention_entry(*words) for words in self.attention)


@dataclass(frozen=True, kw_only=True)
class Upscale(Image):
    """Make a picture and enlarge it in stages, each of which adds detail; write every size as PNG with its recipe.

    Start from a text, from the recipe of a picture that reattend made, or from any picture file (--source). Width and
    height are those of the first picture.
    """

    scale: Annotated[float | None, NUMBER, default(f"{DEFAULT_GROWTH.scale:g}")] = None
    """How many times wider and higher, above 1 up to 16; in stages of at most 2."""
    size: Annotated[
        tuple[str, ...],
        UseAppendAction,
        arg(metavar="WIDTHxHEIGHT", help_behavior_hint="(default: what --scale says; repeatable)"),
    ] = ()
    """Size of a later stage in pixels, in place of --scale: --size 1024x768 --size 2048x1536"""
    strength: Annotated[float | None, NUMBER, default(DEFAULT_GROWTH.strength)] = None
    """How much a stage may change the picture, above 0 up to 1; less stays closer to it, more adds detail."""
    later_steps: Annotated[int | None, WHOLE, default("as --steps")] = None
    """Denoising steps of a later stage at strength 1."""
    attention: Annotated[
        tuple[tuple[str, ...], ...],
        UseAppendAction,
        arg(metavar="NAME [KEY=VALUE ...]", help_behavior_hint="(default: that of --recipe, or stock; repeatable)"),
    ] = ()
    """Attention of the later stages, for example: --attention agent ratio=0.4"""
    shift: Annotated[float | None, NUMBER, default("the model's own")] = None
    """Noise shift of the later stages, for models with a flow-matching scheduler; more changes the picture more."""
    rope_theta_scale: Annotated[float | None, NUMBER, default("10 from twice the model's own size on, else 1")] = None
    """Factor on the base of the rotary embedding in the later stages; more works against repeated motifs."""
    tile_from: Annotated[int | None, WHOLE, default(DEFAULT_GROWTH.tile_from)] = None
    """Pixels of the longer side from which the VAE works in tiles, which takes less memory."""
    source: Annotated[Path | None, FILE, default("none")] = None
    """Picture file to enlarge, in place of a first picture; the prompt says what it shows."""

    def to_recipe(self) -> Recipe:
        """The recipe of `--recipe` or the default one, with the options that were given, and how its picture grows."""
        recipe = self._recipe({})
        names = {"strength": "strength", "steps": "later_steps", "shift": "shift", "tile_from": "tile_from"}
        names |= {"rope_theta_scale": "rope_theta_scale"}
        given: dict[str, Any] = {
            name: getattr(self, option) for name, option in names.items() if getattr(self, option) is not None
        }
        if self.attention:
            given["attention"] = self._attention()
        if self.scale is not None or self.size:
            given |= {"scale": self.scale, "sizes": tuple(read_size(text) for text in self.size)}
        if self.source is not None:
            given["source"] = str(self.source)
            recipe = replace(recipe, width=self.width, height=self.height)  # those of --recipe are of its own picture
        return replace(recipe, upscale=replace(recipe.upscale or DEFAULT_GROWTH, **given))
