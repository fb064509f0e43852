"""Pictures for a few frames of a film: what a sparse ControlNet gets, which fills the gaps between them by itself.

Each rank encodes those of its own frames; what is drawn for one depends on the seed and its frame alone.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..attn_processors.comm import Span
from .film_pictures import Pictures, pictures_of
from .noise import generator
from .offloading import device_of
from .recipe import Recipe

__all__ = ["SparseConditions"]


class SparseConditions:
    """The pictures of one rank's frames."""

    def __init__(self, pipe: Any, recipe: Recipe, given: Pictures, own: Span):
        """
        Args:
            pipe: a pipeline with a sparse ControlNet.
            recipe: a filled-in one; its video says which frames the pictures are for.
            given: pictures, as many as those frames.
            own: this rank's frames.
        """
        self.pipe, self.recipe, self.given, self.own = pipe, recipe, given, own
        self.conditions = torch.empty(0)

    @torch.no_grad()
    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call. Reads the pictures, of which only the numbers stay."""
        pipe, recipe, own = self.pipe, self.recipe, self.own
        assert recipe.video is not None and recipe.width is not None and recipe.height is not None
        side = pipe.vae_scale_factor if self.coded else 1
        channels = pipe.vae.config.latent_channels if self.coded else 3
        size = (channels, recipe.height // side, recipe.width // side)
        rows, places = [torch.zeros(0, *size, dtype=pipe.controlnet.dtype)], []
        both = zip(recipe.video.controlnet_frame_indices, pictures_of("conditioning_frames", self.given), strict=True)
        for frame, picture in both:
            if own[0] <= frame < own[1]:
                rows.append(self._row(frame, picture))
                places.append(frame - own[0])
        self.conditions = torch.cat(rows).transpose(0, 1).unsqueeze(0)
        return {"conditioning_frames": [], "controlnet_frame_indices": places}

    @property
    def coded(self) -> bool:
        """Does the net want latents, not pixels?"""
        return bool(self.pipe.controlnet.use_simplified_condition_embedding)

    def _row(self, frame: int, picture: Image.Image) -> Tensor:
        """(1, C, H, W), on the CPU."""
        pipe, vae = self.pipe, self.pipe.vae
        height, width = self.recipe.height, self.recipe.width
        pixels = pipe.control_image_processor.preprocess(picture, height=height, width=width).to(pipe.controlnet.dtype)
        if not self.coded:
            return pixels
        code = vae.encode((2 * pixels - 1).to(device_of(vae)))
        draws = [generator(self.recipe.seed, "condition", frame)]
        found = code.latent_dist.sample(draws) if hasattr(code, "latent_dist") else code.latents
        return (vae.config.scaling_factor * found).cpu()

    def patches(self) -> list[tuple[Any, str, Any]]:
        """Triples for `patched`."""
        return [(self.pipe, "prepare_image", self.condition)]

    def condition(self, image: Any, width: int, height: int, device: Any, dtype: torch.dtype) -> Tensor:
        """Stands for `pipe.prepare_image`, which wants a picture at least: (1, C, n, H, W), for n pictures."""
        return self.conditions.to(device, dtype)
