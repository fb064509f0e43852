"""References of a story: rows beside the panels, or a bank filled before them, within a budget of bytes.

A reference is what the stock model makes of its subject's own prompt, or a picture of one's own. Such a picture is kept
in its row by force: after each step the row's latents are the picture's, with noise as the next step expects it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..attn_processors.bank import Bank
from ..attn_processors.isolation_reposition import IsolationRepositionAttnProcessor
from ..attn_processors.method import LayerInfo
from ..attn_processors.ops.regions import box_tokens, clipped, mask_tokens, pack_mask, tight_box, unpack_mask
from ..attn_processors.places import Place

if TYPE_CHECKING:
    from ..attn_processors.context import Context
    from .script import Script

__all__ = ["BankPlan", "Pinned", "fitted", "plan_bank", "plan_for", "step_numbers"]


@dataclass(frozen=True)
class BankPlan:
    """How a bank keeps to its budget.

    Attributes:
        bytes: what it will hold; an upper bound where masks come from attention maps.
        every_layer, every_step, branches: as in `Bank`.
    """

    bytes: int
    every_layer: int = 1
    every_step: int = 1
    branches: str = "both"

    def bank(self, limit: int | None) -> Bank:
        return Bank(limit, every_layer=self.every_layer, every_step=self.every_step, branches=self.branches)

    def __str__(self) -> str:
        saved = [
            *(["prompt branch only"] if self.branches == "cond" else []),
            *(["every second layer"] if self.every_layer > 1 else []),
            *(["every second step"] if self.every_step > 1 else []),
        ]
        return f"bank of references: {self.bytes:,} bytes" + (f" ({', '.join(saved)})" if saved else "")


def plan_bank(
    method: IsolationRepositionAttnProcessor,
    layers: Sequence[LayerInfo],
    grids: Sequence[tuple[int, int]],
    *,
    steps: Sequence[int],
    branches: int,
    item: int,
    limit: int | None,
    text: int = 0,
) -> BankPlan:
    """The first plan that fits, giving up in this order: the branch without the prompt, every second layer, every second
    step. Only the subjects' own tokens are ever kept.

    Args:
        method: says the references, and when and where they are read.
        layers: those that may read references, in order.
        grids: (H, W) of each level of the model; joint models have one.
        steps: for every call of the denoiser the index of its timestep, the first of equal ones; see `step_numbers`.
        branches: guidance branches in a call.
        item: bytes of one number.
        limit: most bytes; None = no limit.
        text: numbers in the text of one reference, where subjects read that; else 0.

    Raises:
        MemoryError: not even the smallest plan fits.
    """
    times = [step for step in steps if method.phase(step / len(steps)) & 2]
    plan = None
    for every_step in (1, 2):
        for every_layer in (1, 2):
            for which in ("both", "cond"):
                if (every_step, every_layer) != (1, 1) and which == "both":
                    continue
                own = "both" if which == "both" and method.branches == "both" else "cond"
                rows = branches if own == "both" else 1
                kept = rows * len([step for step in times if step % every_step == 0])
                size = len(method.references) * rows * text * item if times else 0
                size += sum(
                    _tokens(place, grids[min(layer.level, len(grids) - 1)]) * layer.width * item * kept
                    for number, layer in enumerate(layers)
                    if number % every_layer == 0
                    for place in method.references
                )
                plan = BankPlan(size, every_layer, every_step, own)
                if limit is None or size <= limit:
                    return plan
    assert plan is not None
    raise MemoryError(
        f"a bank of {len(method.references)} references needs {plan.bytes:,} bytes at least, {limit:,} are allowed; allow "
        "more, make fewer steps, draw smaller boxes around the references, or keep references as rows (leave bank out)."
    )


def plan_for(pipe: Any, script: Script, recorder: IsolationRepositionAttnProcessor, context: Context) -> BankPlan:
    """The plan of a filled-in story's bank; `recorder` is installed on the pipeline. Raises MemoryError as `plan_bank`."""
    ours = [item for item in context.installations if item.method is recorder]
    infos = [swap.info for item in ours for swap in item.swaps if recorder.reads(swap.info.name)]
    text = 0
    if recorder.text_mix * recorder.strength:
        width = context.model.config.cross_attention_dim
        text = pipe.tokenizer.model_max_length * (width if isinstance(width, int) else max(width))
    guided = "Flux" not in type(pipe).__name__ and (script.guidance or 0) > 1
    return plan_bank(
        recorder, infos, _grids(pipe, script), steps=step_numbers(pipe.scheduler, script.steps),
        branches=2 if guided else 1, item=torch.finfo(context.model.dtype).bits // 8, limit=script.bank, text=text,
    )  # fmt: skip


def _grids(pipe: Any, script: Script) -> list[tuple[int, int]]:
    """(H, W) of every level of the denoiser at the story's size, finest first."""
    assert script.width is not None and script.height is not None, "filled in"
    height, width = script.height // pipe.vae_scale_factor, script.width // pipe.vae_scale_factor
    if (unet := getattr(pipe, "unet", None)) is None:
        patch = 2 if "Flux" in type(pipe).__name__ else pipe.transformer.config.patch_size
        return [(height // patch, width // patch)]
    grids = []
    for _ in unet.down_blocks:
        grids.append((height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    first = next(i for i, block in enumerate(unet.down_blocks) if hasattr(block, "attentions"))
    return grids[first:]  # levels count from the first with attention


def step_numbers(scheduler: Any, steps: int) -> list[int]:
    """For every call of the denoiser the index of its timestep. Some schedulers visit one twice: the first of the two."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()
    except (TypeError, ValueError):  # it wants to know more, as those of flow matching do, which visit each step once
        return list(range(steps))
    return [times.index(time) for time in times]


def _tokens(place: Place, grid: tuple[int, int]) -> int:
    """Tokens of a reference on a grid; all of them where attention maps will say."""
    if place.mask is not None:
        return int(mask_tokens(unpack_mask(place.mask), grid).sum())
    box = None if place.box is None else clipped(place.box)
    if place.box is not None and box is None:
        return 0
    return grid[0] * grid[1] if box is None else int(box_tokens(box, grid).sum())


class Pinned:
    """Rows of a call whose latents are those of given pictures, at the noise of each step; see `stock_rows`' `change`.

    pictures: by row of the call.
    seeds: of the noise of each row, the same at every step.
    """

    def __init__(self, pipe: Any, pictures: Mapping[int, Image.Image], seeds: Mapping[int, int], size: tuple[int, int]):
        self.clean = {row: encode(pipe, picture, size) for row, picture in pictures.items()}
        self.seeds = dict(seeds)

    def __call__(self, pipe: Any, index: int, latents: Tensor) -> Tensor:
        latents = latents.clone()
        steps = pipe.scheduler.timesteps
        for row, clean in self.clean.items():
            clean = clean.to(latents)
            if index + 1 < len(steps):
                draw = torch.Generator("cpu").manual_seed(self.seeds[row])
                noise = torch.randn(clean.shape, generator=draw).to(latents)
                at = steps[index + 1 : index + 2]
                if hasattr(pipe.scheduler, "scale_noise"):  # flow matching
                    clean = pipe.scheduler.scale_noise(clean, at, noise)
                else:
                    clean = pipe.scheduler.add_noise(clean, noise, at)
            latents[row] = _packed(pipe, clean, latents)[0]
        return latents


def encode(pipe: Any, picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """Latents of a picture cut to (width, height) pixels, (1, C, H, W), as the pipeline's denoiser knows them."""
    vae = pipe.vae
    cut = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    pixels = pipe.image_processor.preprocess(cut).to(vae.device, vae.dtype)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def fitted(picture: Image.Image, place: Place, size: tuple[int, int]) -> tuple[Image.Image, Place]:
    """A picture cut and scaled to (width, height) pixels, and the place of its subject in what is left of it.

    As much as has this shape is kept: around the place if there is one, else from the middle.
    """
    ratio = picture.width / picture.height * size[1] / size[0]
    shares = (min(1 / ratio, 1.0), min(ratio, 1.0))  # of width and height that are kept
    mask = None if place.mask is None else unpack_mask(place.mask)
    box = place.box if mask is None else tight_box(mask)
    middles = (0.5, 0.5) if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    starts = [min(max(middle - share / 2, 0.0), 1 - share) for middle, share in zip(middles, shares, strict=True)]
    centring = [start / (1 - share) if share < 1 else 0.5 for start, share in zip(starts, shares, strict=True)]
    cut = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS, centering=(centring[0], centring[1]))
    if mask is not None:
        for axis, side in ((0, 1), (1, 0)):  # rows are the second of (width, height)
            first = min(round(starts[side] * mask.shape[axis]), mask.shape[axis] - 1)
            mask = mask.narrow(
                axis, first, max(1, min(round(shares[side] * mask.shape[axis]), mask.shape[axis] - first))
            )
        return cut, replace(place, mask=pack_mask(mask))
    if box is not None:
        inside = [(edge - starts[i % 2]) / shares[i % 2] for i, edge in enumerate(box)]
        x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in inside)
        return cut, replace(place, box=(x0, y0, x1, y1))
    return cut, place


def _packed(pipe: Any, clean: Tensor, latents: Tensor) -> Tensor:
    """Latents of one picture in the shape the pipeline keeps them: FLUX packs 2 x 2 into a token."""
    if latents.ndim == 4:
        return clean
    _, channels, height, width = clean.shape
    return pipe._pack_latents(clean, 1, channels, height, width)
