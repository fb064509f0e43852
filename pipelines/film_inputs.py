"""What goes into a film besides text, and how the stock pipeline gets it: pictures for its frames, and what they count.

- *Conditioning frames* go to the ControlNet, which treats every picture on its own. A clip of them becomes numbers when it is
  needed.
- A sparse ControlNet gets pictures for a few frames (`sparse_control`).
- A film to start from (*video*) is encoded frame by frame; what is drawn for a frame depends on the seed and the frame alone.
- The picture of an IP-Adapter is encoded once for all frames.
- Perturbed-attention guidance has a weight and layers (`perturbed`).

Numbers are in the recipe, pictures are arguments of `long_video`, of which the recipe holds the digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..attn_processors.comm import Span
from .borrowing import in_float32
from .events import CancelToken
from .files import opened
from .film_pictures import count_of, digest_of, pictures_of
from .noise import generator
from .offloading import device_of
from .perturbed import check_layers
from .recipe import Recipe
from .sparse_control import SparseConditions
from .stream import PerFrame
from .videos import NUMBERS, Video

__all__ = ["FilmInputs", "with_inputs"]

NEEDED = {
    "video": "the film to start from (a list of pictures, an MP4 or a folder)",
    "conditioning_frames": "a picture for every frame (a list, an MP4 or a folder)",
    "ip_adapter_image": "a picture for its IP-Adapter; or call pipe.unload_ip_adapter() first",
}
USE = {
    "video": "AnimateDiffVideoToVideoPipeline",
    "conditioning_frames": "AnimateDiffControlNetPipeline",
    "ip_adapter_image": "a pipeline with an IP-Adapter (pipe.load_ip_adapter)",
}


def with_inputs(recipe: Recipe, pipe: Any, given: Mapping[str, Any], cancel: CancelToken | None = None) -> Recipe:
    """The recipe of a film with the numbers and the digests of what goes into it besides text.

    given: pictures by argument of `long_video`; those that are None were not given.
    cancel: asked while they are read.

    Raises:
        Cancelled: if `cancel` was requested.
        ValueError: too much or too little was given, other pictures than the recipe was made with, layers that are not there.
        TypeError: something else than pictures.
    """
    name, video = type(pipe).__name__, recipe.video
    assert video is not None
    accepts = inspect.signature(pipe.__call__).parameters
    given = {word: value for word, value in given.items() if value is not None}
    scales = adapter_scales(pipe)
    wanted = [word for word in NEEDED if word in accepts and (word != "ip_adapter_image" or scales is not None)]
    for word in (*given, *video.pictures):
        if word not in wanted:
            made = "" if word in given else ", with which the recipe was made"
            raise ValueError(f"{name} takes no {word}{made}; leave it out, or use {USE.get(word, 'another pipeline')}")
    for word in wanted:
        if word not in given:
            raise ValueError(f"{name} needs {word}: give {NEEDED[word]}")
    frames = video.controlnet_frame_indices
    if "controlnet_frame_indices" in accepts:
        frames = frames or tuple(accepts["controlnet_frame_indices"].default)
        video = replace(video, controlnet_frame_indices=frames)
    elif frames:
        raise ValueError(f"{name} takes no controlnet_frame_indices, got {frames}; leave them out")
    pictures = {word: _digest(word, given[word], pipe, video, cancel) for word in wanted}
    for word, digest in video.pictures.items():
        if pictures[word] != digest:
            raise ValueError(
                f"the recipe was made with other {word}: got pictures with the digest {pictures[word][:12]}, it has "
                f"{digest[:12]}; give the same pictures, or leave pictures out of the recipe's video"
            )
    layers = video.pag_applied_layers or tuple(getattr(pipe, "pag_applied_layers", ()))
    if layers and "pag_scale" not in accepts:
        raise ValueError(f"{name} perturbs no layers, got pag_applied_layers {', '.join(layers)}; leave them out")
    numbers = _numbers(recipe, pipe, accepts, scales)
    if numbers.get("pag_scale"):
        check_layers(pipe, layers)
    return replace(recipe, video=replace(video, pictures=pictures, pag_applied_layers=layers, **numbers))


def _numbers(
    recipe: Recipe, pipe: Any, accepts: Mapping[str, inspect.Parameter], scales: set[float] | None
) -> dict[str, Any]:
    """Of each number that counts for this pipeline the value."""
    usual = {word: accepts[word].default for word in NUMBERS if word in accepts}
    if scales is not None:
        (usual["ip_adapter_scale"],) = scales
    numbers = {}
    for word in NUMBERS:
        value = getattr(recipe.video, word)
        if value is not None and word not in usual:
            raise ValueError(f"{type(pipe).__name__} takes no {word}, got {value:g}; leave it out")
        if word in usual:
            numbers[word] = float(usual[word] if value is None else value)
    if "strength" in numbers and int(recipe.steps * numbers["strength"]) < 1:
        raise ValueError(
            f"strength {numbers['strength']:g} of {recipe.steps} steps leaves no step to be done; give more of either"
        )
    return numbers


def _digest(word: str, given: Any, pipe: Any, video: Video, cancel: CancelToken | None) -> str:
    """SHA-256 of pictures, of which there must be one for every frame, or for those that are named."""
    if word == "ip_adapter_image":
        return digest_of(word, [_one(word, given)])[1]
    named = video.controlnet_frame_indices if word == "conditioning_frames" else ()
    wanted, digests = len(named) or video.frames, []
    for row in _rows(word, given, pipe):
        count, digest = digest_of(word, row, wanted + 1, cancel)
        digests.append(digest)
        if count == wanted:
            continue
        if count > wanted:  # what was not read is only counted
            count = max(count, count_of(word, row))
        if named:
            raise ValueError(
                f"{word} has {count} pictures, but controlnet_frame_indices names {wanted} frames; give one for each"
            )
        other = f", or set Video(frames={count})" if count else ""
        raise ValueError(
            f"{word} has {count} pictures, but the film has {wanted} frames; give one for every frame{other}"
        )
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _rows(word: str, given: Any, pipe: Any) -> list[Any]:
    """The rows of pictures: as many as there are ControlNets where those get them."""
    if word != "conditioning_frames":
        return [given]
    nets = len(getattr(pipe.controlnet, "nets", [pipe.controlnet]))
    several = isinstance(given, (list, tuple)) and all(isinstance(row, (str, Path, list, tuple)) for row in given)
    rows = list(given) if given and several else [given]
    if len(rows) != nets:
        name = type(pipe).__name__
        if nets == 1:
            raise ValueError(f"{name} has one ControlNet here, got {len(rows)} times {word}; give them once")
        raise ValueError(f"{name} has {nets} ControlNets here; give {word} as a list with the pictures of each")
    return rows


def _one(word: str, given: Any) -> Image.Image:
    if isinstance(given, (str, Path)):
        return opened(Path(given).expanduser(), "picture")
    if not isinstance(given, Image.Image):
        raise TypeError(f"{word} must be a PIL picture or the path of a file, got {type(given).__name__}")
    return given.convert("RGB")


def adapter_scales(pipe: Any) -> set[float] | None:
    """How much is taken from the picture of an IP-Adapter; None: the UNet carries none.

    Raises:
        ValueError: several pictures or scales, which a recipe cannot tell; nothing that encodes a picture.
    """
    if getattr(pipe.unet, "encoder_hid_proj", None) is None:
        return None
    found = [list(part.scale) for part in adapters(pipe)]
    scales = {scale for row in found for scale in row}
    if not found or max(map(len, found)) > 1 or len(scales) > 1 or not isinstance(next(iter(scales)), (int, float)):
        raise ValueError(
            f"{type(pipe).__name__} carries an IP-Adapter that a film cannot use: it can be one, for one picture, with one "
            "scale in all layers; load that, or call pipe.unload_ip_adapter() first"
        )
    if getattr(pipe, "image_encoder", None) is None or getattr(pipe, "feature_extractor", None) is None:
        raise ValueError(
            f"{type(pipe).__name__} carries an IP-Adapter but no image encoder for its picture; call pipe.load_ip_adapter "
            "with its image_encoder_folder, or pipe.unload_ip_adapter()"
        )
    return scales


def adapters(pipe: Any) -> list[Any]:
    """The processors of an IP-Adapter."""
    return [part for part in pipe.unet.attn_processors.values() if isinstance(getattr(part, "scale", None), list)]


class FilmInputs:
    """What one rank gives the stock pipeline besides text and noise."""

    def __init__(self, pipe: Any, recipe: Recipe, given: Mapping[str, Any], own: Span):
        """
        Args:
            pipe: the pipeline.
            recipe: a filled-in one.
            given: as for `with_inputs`.
            own: this rank's frames.
        """
        self.pipe, self.recipe, self.given, self.own = pipe, recipe, given, own
        self.accepts = inspect.signature(pipe.__call__).parameters
        self.sparse: SparseConditions | None = None
        if "controlnet_frame_indices" in self.accepts:
            self.sparse = SparseConditions(pipe, recipe, given["conditioning_frames"], own)

    @torch.no_grad()
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        pipe, video = self.pipe, self.recipe.video
        values = {"num_frames": self.own[1] - self.own[0]} | {word: getattr(video, word) for word in NUMBERS}
        if self.sparse is not None:
            values |= self.sparse.arguments()
        elif "conditioning_frames" in self.accepts:
            rows = _rows("conditioning_frames", self.given["conditioning_frames"], pipe)
            fitted = [self._fitted("conditioning_frames", row, pipe.control_video_processor) for row in rows]
            values["conditioning_frames"] = fitted[0] if not hasattr(pipe.controlnet, "nets") else fitted
        if adapters(pipe):
            guided = self.recipe.guidance is not None and self.recipe.guidance > 1
            picture = _one("ip_adapter_image", self.given["ip_adapter_image"])
            device = device_of(pipe.image_encoder)
            values["ip_adapter_image_embeds"] = pipe.prepare_ip_adapter_image_embeds(picture, None, device, 1, guided)
        return {word: value for word, value in values.items() if word in self.accepts and value is not None}

    def patches(self) -> list[tuple[Any, str, Any]]:
        """Triples for `patched`."""
        scale = getattr(self.recipe.video, "ip_adapter_scale", None)
        triples: list[tuple[Any, str, Any]] = [(part, "scale", [scale]) for part in adapters(self.pipe)]
        if "pag_scale" in self.accepts and self.recipe.video is not None:
            triples.append((self.pipe, "pag_applied_layers", list(self.recipe.video.pag_applied_layers)))
        if self.sparse is not None:
            triples += self.sparse.patches()
        for attribute in ("prepare_video", "prepare_conditioning_frames"):
            if hasattr(self.pipe, attribute):
                triples.append((self.pipe, attribute, self._conditions))
        return triples

    def _conditions(self, video: Sequence[Image.Image], dtype: torch.dtype, **_: Any) -> PerFrame:
        """Stands for `pipe.prepare_video`, which would make numbers of all frames at once."""
        return ConditionOfFrames(video, self.pipe.control_video_processor, dtype)

    def _fitted(self, word: str, row: Any, processor: Any) -> list[Image.Image]:
        """This rank's pictures in the size of the film, as the stock pipeline fits them."""
        height, width = self.recipe.height, self.recipe.width
        return [processor.resize(picture, height, width) for picture in pictures_of(word, row, self.own)]

    @torch.no_grad()
    def source(self, clip: int) -> Tensor | None:
        """Latents of the film to start from, as the VAE draws them, (1, C, f, H, W) on the CPU; None: from noise alone.

        clip: frames on the device at a time.
        """
        if "video" not in self.accepts:
            return None
        pipe, vae = self.pipe, self.pipe.vae
        pictures = self._fitted("video", self.given["video"], pipe.video_processor)
        found = []
        with in_float32(vae) if vae.config.force_upcast else contextlib.nullcontext():
            for first in range(0, len(pictures), clip):
                part = pictures[first : first + clip]
                x = pipe.video_processor.preprocess_video(part, self.recipe.height, self.recipe.width)[0].transpose(
                    0, 1
                )
                code = vae.encode(x.to(pipe.dtype).to(device_of(vae), vae.dtype))
                low = self.own[0] + first
                draws = [generator(self.recipe.seed, "source", i) for i in range(low, low + len(part))]
                found.append(code.latent_dist.sample(draws) if hasattr(code, "latent_dist") else code.latents)
        latents = torch.cat([latents.cpu() for latents in found]).to(pipe.dtype)
        return (vae.config.scaling_factor * latents).transpose(0, 1).unsqueeze(0)


class ConditionOfFrames(PerFrame):
    """Pictures for the ControlNet: those of this rank's frames, for every row of its batch."""

    def __init__(self, pictures: Sequence[Image.Image], processor: Any, dtype: torch.dtype):
        self.pictures, self.processor, self.dtype = pictures, processor, dtype

    def take(self, first: int, end: int) -> Tensor:
        """Rows [first, end), shape (rows, 3, H, W)."""
        chosen = [self.pictures[row % len(self.pictures)] for row in range(first, end)]
        width, height = chosen[0].size
        return self.processor.preprocess_video(chosen, height, width)[0].transpose(0, 1).to(self.dtype)
