"""What a student is trained on: latents and text embeddings, made once and kept in shards that check themselves.

Samples are what the teacher makes of prompts (`make_dataset(prompts=...)`: final latents, no detour through the VAE), or
encoded pictures (`pictures=...`). Sample i depends on (seed, i) alone, so shards may be made by any number of processes, in
any order, and a run that was stopped makes the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..pipelines.checks import check_number, check_side, check_text
from ..pipelines.files import ENDINGS, PICTURES
from ..pipelines.filling_in import chosen_guidance, chosen_length
from .denoising import Denoising, Size, denoising_of
from .shards import EMPTY, FORMAT, INDEX, VERSION, Samples, about_digest, claim, is_whole, read_index, write_shard
from .sparing import MOST

if TYPE_CHECKING:
    from PIL import Image

    from .config import DistillConfig
    from .ranks import Ranks

__all__ = ["captioned_pictures", "make_dataset", "own_size", "read_prompts", "samples_of"]

log = logging.getLogger(__name__)

PROMPT_LENGTH = 10_000  # characters


def make_dataset(
    pipe: Any,
    out: str | Path,
    *,
    prompts: Sequence[str] | None = None,
    pictures: str | Path | None = None,
    samples: int | None = None,
    sizes: Sequence[Size] | None = None,
    steps: int = 20,
    guidance: float | None = None,
    text_length: int | None = None,
    seed: int = 0,
    shard: int = 256,
    batch: int = 4,
    part: tuple[int, int] = (0, 1),
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make samples for distillation, or those that are still missing.

    Args:
        pipe: the teacher, a stock pipeline; its random state is not used.
        out: folder of the samples.
        prompts: captions; the teacher makes the pictures. They are gone through again if `samples` is larger.
        pictures: in place of prompts, a folder of PNG, JPEG or WebP files, each with its caption: the text in a file of the
            same name ending in .txt, or `file_name` and `text` in the lines of `metadata.jsonl`.
        samples: how many; default one for each prompt or picture.
        sizes: (width, height) in pixels. Prompts take them in turn, shard by shard; a picture goes to the size nearest to
            its shape, is resized to cover it, and cut at the edges. Default: the pipeline's own.
        steps, guidance: of the teacher's sampling; guidance None = the model's own.
        text_length: text tokens that captions are padded to; None = as many as `generate` takes.
        seed: the only source of chance.
        shard: samples per file.
        batch: samples made at once; more = faster and more memory. It does not change the samples' seeds.
        part: (rank, ranks): this process makes every ranks-th shard, from rank on.
        on_progress: called with (samples done, samples in all) of this process.

    Returns:
        the folder.

    Raises:
        ValueError: for bad input, a folder that holds samples made in another way, or one of pictures of which many cannot
            be read; a few are left out with a warning.
        RuntimeError: if the teacher makes latents that are no numbers.
    """
    folder, denoising = Path(out), denoising_of(pipe)
    if (prompts is None) == (pictures is None):
        raise ValueError("give either prompts or a folder of pictures, not both and not neither")
    for name, value, low, high in (
        ("steps", steps, 1, 1000),
        ("shard", shard, 1, 100_000),
        ("batch", batch, 1, 10_000),
    ):
        check_number(name, value, int, low, high)
    if guidance is not None:
        check_number("guidance", guidance, float, 0.0, 1000.0)
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part is (rank, ranks) with 0 <= rank < ranks, got {part}")
    length, guidance = chosen_length(pipe, text_length), chosen_guidance(pipe, guidance)
    if samples is not None:
        check_number("samples", samples, int, 1, 10**9)
    sizes = [(int(width), int(height)) for width, height in sizes or [own_size(pipe)]]
    for size in sizes:
        _check_size(size, denoising)
    if prompts is not None:
        plan: _Plan = _of_prompts(denoising, prompts, samples, sizes, steps, guidance, length, seed, shard)
    else:
        assert pictures is not None
        plan = _of_pictures(denoising, Path(pictures), samples, sizes, length, shard)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "model": str(pipe.config.get("_name_or_path") or ""),
        "pipeline": type(pipe).__name__,
        "shards": [len(captions) for captions, _ in plan.shards],
        "sizes": [size for _, size in plan.shards],
        "seed": seed,
        **plan.made_from,
    }
    claim(folder, about)
    digest = about_digest(about)
    with torch.no_grad():
        if not is_whole(folder / EMPTY, digest, 1):
            write_shard(folder / EMPTY, [denoising.encode_text([""], length)], [""], digest, sizes[0])
        mine = range(part[0], len(plan.shards), part[1])
        total, done = sum(len(plan.shards[number][0]) for number in mine), 0
        for number in mine:
            captions, size = plan.shards[number]
            file = folder / f"shard-{number:05d}.safetensors"
            first = sum(len(earlier) for earlier, _ in plan.shards[:number])
            if not is_whole(file, digest, len(captions)):
                made: list[dict[str, Tensor]] = []
                for start in range(0, len(captions), batch):
                    some = range(start, min(start + batch, len(captions)))
                    latents = plan.latents(first, list(some), captions, size)
                    if not torch.isfinite(latents).all():
                        raise RuntimeError(
                            f"the teacher made latents that are no numbers (samples {first + some[0]} to "
                            f"{first + some[-1]}); float16 often overflows, use dtype bfloat16 or float32"
                        )
                    text = denoising.encode_text([captions[i] for i in some], length)
                    whole = {"latents": latents, **text}
                    made += [{name: value[i : i + 1] for name, value in whole.items()} for i in range(len(some))]
                    if on_progress is not None:
                        on_progress(done + len(made), total)
                write_shard(file, made, captions, digest, size)
            done += len(captions)
            if on_progress is not None:
                on_progress(done, total)
    return folder


def samples_of(
    config: DistillConfig, pipe: Any, ranks: Ranks, on_progress: Callable[[int, int], None] | None = None
) -> Samples:
    """The samples of a run; made first, in its folder, if `config.data` is prompts or pictures.

    Args:
        on_progress: called with (samples done, samples in all) of the first process.
    """
    from ..pipelines.image import without_progress_bar

    folder, source = config.data, config.data
    if source.is_file() or (source.is_dir() and not (source / INDEX).is_file()):
        folder = config.out / "data"
        given: dict[str, Any] = {"prompts": read_prompts(source)} if source.is_file() else {"pictures": source}
        begun = read_index(folder) if (folder / INDEX).is_file() else {}
        with without_progress_bar(pipe):
            make_dataset(
                pipe, folder, **given, seed=config.seed, part=(ranks.rank, ranks.size),
                steps=begun.get("steps", config.validation_steps),  # which may change when a run goes on
                on_progress=on_progress if ranks.first else None,
            )  # fmt: skip
        ranks.wait()
    return Samples(folder)


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one a line; empty lines and those that begin with # are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read prompts from {path} ({error}); give a UTF-8 text file, one prompt a line"
        ) from None
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return found


def captioned_pictures(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder with their captions, in the order of names.

    Raises:
        ValueError: if there are none, or some lack a caption.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder of pictures at {folder}")
    told: dict[str, str] = {}
    if (folder / "metadata.jsonl").is_file():
        for number, line in enumerate(_read(folder / "metadata.jsonl").splitlines(), 1):
            try:
                entry = json.loads(line)
                told[str(entry["file_name"])] = str(entry["text"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{folder / 'metadata.jsonl'} line {number} is no JSON with file_name and text"
                ) from None
    found, bare = [], []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS):
        beside = path.with_suffix(".txt")
        caption = told.get(path.name) or (_read(beside).strip() if beside.is_file() else "")
        check_text(f"the caption of {path.name}", caption, PROMPT_LENGTH)
        found.append((path, caption))
        bare += [] if caption else [path.name]
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(ENDINGS)})")
    if bare:
        raise ValueError(
            f"{len(bare)} of {len(found)} pictures in {folder} have no caption, for example {bare[0]}; write it into a "
            ".txt file of the same name, or into metadata.jsonl"
        )
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read captions from {path} ({error}); make it UTF-8 text") from None


@dataclass(frozen=True, eq=False)
class _Plan:
    shards: list[tuple[list[str], Size]]  # captions and size of each
    made_from: dict[str, Any]
    latents: Callable[[int, list[int], list[str], Size], Tensor]  # (first sample of the shard, places, captions, size)


def _of_prompts(
    denoising: Denoising, prompts: Sequence[str], samples: int | None, sizes: list[Size], steps: int,
    guidance: float | None, length: int | None, seed: int, shard: int,
) -> _Plan:  # fmt: skip
    if not prompts:
        raise ValueError("there are no prompts; give some")
    for prompt in prompts:
        check_text("prompt", prompt, PROMPT_LENGTH)
    count = len(prompts) if samples is None else samples
    captions = [prompts[i % len(prompts)] for i in range(count)]
    shards = [
        (captions[start : start + shard], sizes[number % len(sizes)])
        for number, start in enumerate(range(0, count, shard))
    ]

    def latents(first: int, places: list[int], words: list[str], size: Size) -> Tensor:
        draws = [torch.Generator().manual_seed(mixed(seed, first + place)) for place in places]
        chosen = [words[place] for place in places]
        return denoising.sample(chosen, size, draws, steps, guidance, length)

    made_from = {
        "steps": steps, "guidance": guidance, "text_length": length,
        "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest(),
    }  # fmt: skip
    return _Plan(shards, made_from, latents)


def _of_pictures(
    denoising: Denoising, folder: Path, samples: int | None, sizes: list[Size], length: int | None, shard: int
) -> _Plan:
    found, broken = captioned_pictures(folder)[:samples], []
    by_size: dict[Size, list[tuple[Path, str]]] = {size: [] for size in sizes}
    for path, caption in found:
        try:
            with _upright(path) as picture:
                picture.load()  # all of it: a file that was cut off opens, too
                ratio = np.log(picture.width / picture.height)
        except ValueError as error:
            broken.append(path)
            log.warning("left out: %s (%d of %d pictures up to now)", error, len(broken), len(found))
            if len(broken) == len(found) or len(broken) > max(1, int(MOST * len(found))):
                raise ValueError(
                    f"{len(broken)} of {len(found)} pictures in {folder} cannot be read, the last is {path.name}; more than "
                    f"{MOST:.0%} are not left out: mend them or take them out"
                ) from None
            continue
        by_size[min(sizes, key=lambda size: abs(np.log(size[0] / size[1]) - ratio))].append((path, caption))
    found = [pair for pair in found if pair[0] not in broken]
    parts = [
        (some[start : start + shard], size) for size, some in by_size.items() for start in range(0, len(some), shard)
    ]
    shards = [([caption for _, caption in some], size) for some, size in parts]
    paths = [path for some, _ in parts for path, _ in some]

    def latents(first: int, places: list[int], words: list[str], size: Size) -> Tensor:
        return denoising.encode_pictures(torch.stack([_pixels(paths[first + place], size) for place in places]))

    listed = [(path.name, path.stat().st_size, caption) for path, caption in found]
    made_from = {"text_length": length, "pictures": hashlib.sha256(json.dumps(listed).encode()).hexdigest()}
    return _Plan(shards, made_from, latents)


def _pixels(path: Path, size: Size) -> Tensor:
    """A picture that covers `size`, (3, height, width) in [-1, 1]."""
    from PIL import Image, ImageOps

    with _upright(path) as picture:
        fitted = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@contextmanager
def _upright(path: Path) -> Iterator[Image.Image]:
    """A picture turned as its EXIF orientation says; what cannot be read in the with block is told in one sentence."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=PICTURES) as picture:
            ImageOps.exif_transpose(picture, in_place=True)
            yield picture
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # UnidentifiedImageError is an OSError
        raise ValueError(f"cannot read the picture {path} ({error}); mend it or take it out") from None


def mixed(*keys: int) -> int:
    """A seed for one purpose out of several whole numbers."""
    return int.from_bytes(hashlib.sha256(json.dumps(keys).encode()).digest()[:7], "big")


def own_size(pipe: Any) -> Size:
    """Width and height of the pictures a pipeline makes if nobody asks for others."""
    side = pipe.default_sample_size if hasattr(pipe, "default_sample_size") else pipe.unet.config.sample_size
    return (side * pipe.vae_scale_factor,) * 2


def _check_size(size: Size, denoising: Denoising) -> None:
    for name, side in zip(("width", "height"), size, strict=True):
        check_side(name, side)
    rows, columns = denoising.grid(size)
    fits = denoising.grid((size[0] + 1, size[1] + 1)) == (rows, columns) and min(rows, columns) > 0
    if not fits or denoising.grid((size[0] - 1, size[1] - 1)) != (rows - 1, columns - 1):
        raise ValueError(f"size {size[0]} x {size[1]} does not fit the model's patches; choose multiples of 16 or 32")
