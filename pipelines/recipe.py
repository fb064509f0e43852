"""One JSON-able value that reproduces a picture or a film.

The same `Recipe` drives Python, the command line and the page, and travels inside the PNG it made (text chunk
`reattend`) or the MP4 (its comment), and in a JSON file beside it. On a CPU the same recipe gives the same pixels. The chunk
`parameters` repeats the main values in the line that most picture tools show.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import STEPS, check_number, check_side, check_text, complete_attention
from .files import written_whole
from .film import read_comment
from .stages import Upscale
from .videos import Video

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["DTYPES", "Recipe", "save_pictures"]

FORMAT = "reattend recipe"
VERSION = 1
DTYPES = ("float32", "float16", "bfloat16")
GUIDANCE = (0.0, 100.0)
SEED = (0, 2**63 - 1)
PROMPT_LENGTH = 10_000  # characters
FILE_SIZE = 1_000_000  # bytes; a recipe has a few hundred
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a picture is made from. None means the model's own default; a finished picture has what was used.

    Attributes:
        prompt: what the picture shows.
        negative: what it should not show.
        model: a bundled name ("tiny-sd"), a local diffusers folder, or a hub id.
        width: in pixels, a multiple of 8.
        height: in pixels, a multiple of 8.
        steps: denoising steps; more = slower and finer.
        guidance: how strongly the prompt is followed (classifier-free guidance).
        seed: the only source of chance; None draws one.
        attention: what replaces the stock attention: settings with a name, ({"name": "agent", "ratio": 0.4},).
        linear: folder of a trained linear student (`reattend distill run`), which brings its own attention; None: none.
        dtype: numbers the model computes in: "float32", "float16" or "bfloat16".
        upscale: how `upscale` enlarges the picture after it was made at this width and height; None: it is not enlarged.
        video: what makes it a film for `long_video`; None: it is a picture.
        made_with: versions, device, pipeline and scheduler that made the picture; information only.

    Raises:
        ValueError: for a value out of range, an unknown name of an attention or one of its settings.
        TypeError: for a value of the wrong type.
    """

    prompt: str
    negative: str = ""
    model: str = "tiny-sd"
    width: int | None = None
    height: int | None = None
    steps: int = 20
    guidance: float | None = None
    seed: int | None = None
    attention: tuple[dict[str, Any], ...] = ()
    linear: str | None = None
    dtype: str | None = None
    upscale: Upscale | None = None
    video: Video | None = None
    made_with: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt", "negative"):
            check_text(name, getattr(self, name), PROMPT_LENGTH)
        check_text("model", self.model, 1_000)
        if not self.prompt.strip():
            raise ValueError(f"prompt is empty: got {self.prompt!r}; say what the picture shows")
        for name in ("width", "height"):
            check_side(name, getattr(self, name))
        check_number("steps", self.steps, int, *STEPS)
        if self.guidance is not None:
            check_number("guidance", self.guidance, float, *GUIDANCE)
            object.__setattr__(self, "guidance", float(self.guidance))
        if self.seed is not None:
            check_number("seed", self.seed, int, *SEED)
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype is unknown: got {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.upscale is not None and not isinstance(self.upscale, Upscale):
            raise TypeError(f"upscale must be an Upscale, got {self.upscale!r}; write Upscale(scale=2) or leave it out")
        if self.video is not None and not isinstance(self.video, Video):
            raise TypeError(f"video must be a Video, got {self.video!r}; write Video(frames=64) or leave it out")
        if not isinstance(self.made_with, Mapping) or not all(
            isinstance(v, str) for kv in self.made_with.items() for v in kv
        ):
            raise TypeError(
                f"made_with must map names to texts, got {self.made_with!r}; leave it out, it is only information"
            )
        object.__setattr__(self, "made_with", dict(self.made_with))
        object.__setattr__(self, "attention", complete_attention(self.attention))
        if self.linear is not None:
            check_text("linear", self.linear, 1_000)
            if self.attention:
                raise ValueError(
                    f"the linear student in {self.linear} brings its own attention, got {self.attention[0]['name']!r} "
                    "besides; leave one of them out"
                )

    def to_json(self) -> str:
        """The recipe as indented JSON (ASCII), with the version of its format."""
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote. Raises ValueError or TypeError, in one sentence, for anything else."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a recipe: this is not JSON ({error}); use a file that reattend wrote") from None
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise ValueError(f'not a recipe: this JSON has no "format": "{FORMAT}"; use a file that reattend wrote')
        version = values.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"recipe of format version {version!r}, this reattend reads version {VERSION}; use another reattend"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"recipe has unknown entries: got {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        if "prompt" not in values:
            raise ValueError("recipe has no prompt; add one")
        if not isinstance(values.get("attention", []), list):
            raise TypeError(f"recipe entry attention must be a list, got {values['attention']!r}")
        upscale = values.get("upscale")
        if upscale is not None:
            if not isinstance(upscale, dict):
                raise TypeError(f"recipe entry upscale must be an object with settings, got {upscale!r}")
            upscale = Upscale.from_settings(upscale)
        video = values.get("video")
        if video is not None:
            if not isinstance(video, dict):
                raise TypeError(f"recipe entry video must be an object with settings, got {video!r}")
            video = Video.from_settings(video)
        attention = tuple(values.get("attention", ()))
        return cls(**{**values, "attention": attention, "upscale": upscale, "video": video})

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """The recipe in a PNG that `save` wrote, in a film, or in a JSON file. Pixels are not decoded.

        Raises:
            ValueError: if the file cannot be read, is too big or holds no recipe.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                is_png = file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE
            if path.suffix.lower() == ".mp4":
                text = read_comment(path)
            else:
                text = _png_text(path) if is_png else _file_text(path)
        except OSError as error:
            raise ValueError(f"cannot read the recipe {path}: {error.strerror or error}; check the path") from error
        try:
            return cls.from_json(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, image: Image.Image, path: str | Path) -> tuple[Path, Path]:
        """Write the picture as PNG with this recipe inside, and the recipe beside it (`car.png`, `car.png.json`).

        Both files appear whole or not at all. Returns the two paths.
        """
        return save_pictures([(self, image, Path(path))])[0]

    @property
    def parameters(self) -> str:
        """The main values as most picture tools write and read them."""
        settings = {
            "Steps": self.steps,
            "Sampler": self.made_with.get("scheduler"),
            "CFG scale": self.guidance,
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}" if self.width and self.height else None,
            "Model": self.model,
            "Attention": " + ".join(_words(entry) for entry in self.attention) or None,
            "Linear": self.linear,
            **(_upscale_words(self.upscale) if self.upscale else {}),
            **({"Frames": self.video.frames, "FPS": self.video.fps} if self.video else {}),
            "Version": f"reattend {self.made_with['reattend']}" if "reattend" in self.made_with else None,
        }
        line = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in settings.items() if value is not None)
        return "\n".join([self.prompt, *([f"Negative prompt: {self.negative}"] if self.negative else []), line])


def save_pictures(pictures: Sequence[tuple[Recipe, Image.Image, Path]]) -> list[tuple[Path, Path]]:
    """Write pictures as PNG, each with its recipe inside and beside it; all files appear whole, or none does.

    Returns the two paths of each.
    """
    from PIL.PngImagePlugin import PngInfo

    paths = []
    for _, _, path in pictures:
        if path.suffix.lower() != ".png":
            raise ValueError(f"a picture is written as PNG: got {str(path)!r}; give a name that ends in .png")
        paths.append((path, path.with_name(path.name + ".json")))
    with written_whole(*(path for both in paths for path in both)) as asides:
        for number, (recipe, image, _) in enumerate(pictures):
            chunks = PngInfo()
            chunks.add_text("parameters", recipe.parameters)
            chunks.add_text("reattend", recipe.to_json())
            image.save(asides[2 * number], format="PNG", pnginfo=chunks)
            asides[2 * number + 1].write_text(recipe.to_json() + "\n", encoding="utf-8")
    return paths


def _words(entry: Mapping[str, Any]) -> str:
    """One attention as on the command line: its name and the settings that differ from its defaults."""
    from ..attn_processors import ATTN_PROCESSORS

    usual = ATTN_PROCESSORS[entry["name"]].from_settings({}).settings()
    return " ".join(
        [entry["name"], *(f"{key}={value}" for key, value in entry.items() if key != "name" and value != usual[key])]
    )


def _upscale_words(upscale: Upscale) -> dict[str, Any]:
    """The growth of a picture in the words that other tools use for it."""
    return {
        "Denoising strength": upscale.strength,
        "Hires upscale": upscale.scale,
        "Hires resize": f"{upscale.sizes[-1][0]}x{upscale.sizes[-1][1]}" if upscale.sizes else None,
        "Hires steps": upscale.steps,
    }


def _quoted(value: str) -> str:
    """Quoted where a comma, colon or line break would end the value early."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


def _file_text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(FILE_SIZE + 1)
    if len(content) > FILE_SIZE:
        raise ValueError(
            f"{path} is too big for a recipe: over {FILE_SIZE} bytes; give a PNG or JSON file that reattend wrote"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} holds no recipe: it is neither PNG nor text; give a file that reattend wrote"
        ) from None


def _png_text(path: Path) -> str:
    """The text chunk `reattend`. Only the chunks before the pixels are read; Pillow bounds what they may unpack to."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get("reattend")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is a broken PNG ({error}); give a file that reattend wrote") from None
    if not isinstance(text, str):
        raise ValueError(
            f"{path} holds no recipe: this PNG was not made by reattend, or its text was removed on the way"
        )
    return text
