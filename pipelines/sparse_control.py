"""Pictures for a few frames of a film: what a sparse ControlNet gets, which fills the gaps between them by itself.

Each rank encodes those of its own frames; what is drawn for one depends on the seed and its frame alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attn_processors.comm import Span
from .borrowing import device_of
from .film_pictures import Pictures, pictures_of
from .noise import generator
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
        assert recipe.video is not None
        self.pipe, self.recipe, self.own = pipe, recipe, own
        both = zip(recipe.video.controlnet_frame_indices, pictures_of("conditioning_frames", given), strict=True)
        self.pictures = {frame: picture for frame, picture in both if own[0] <= frame < own[1]}

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        places = [frame - self.own[0] for frame in self.pictures]
        return {"conditioning_frames": list(self.pictures.values()), "controlnet_frame_indices": places}

    def patches(self) -> list[tuple[Any, str, Any]]:
        """Triples for `patched`."""
        return [(self.pipe, "prepare_image", self.condition)]

    @torch.no_grad()
    def condition(self, image: Any, width: int, height: int, device: Any, dtype: torch.dtype) -> Tensor:
        """Stands for `pipe.prepare_image`, which wants a picture at least: (1, C, n, H, W), for n pictures."""
        pipe, vae = self.pipe, self.pipe.vae
        coded = pipe.controlnet.use_simplified_condition_embedding  # latents, not pixels
        if not self.pictures:
            side = pipe.vae_scale_factor if coded else 1
            channels = vae.config.latent_channels if coded else 3
            return torch.zeros(1, channels, 0, height // side, width // side, device=device, dtype=dtype)
        rows = []
        for frame, picture in self.pictures.items():
            pixels = pipe.control_image_processor.preprocess(picture, height=height, width=width).to(dtype)
            if coded:
                code = vae.encode((2 * pixels - 1).to(device_of(vae)))
                draws = [generator(self.recipe.seed, "condition", frame)]
                found = code.latent_dist.sample(draws) if hasattr(code, "latent_dist") else code.latents
                pixels = vae.config.scaling_factor * found
            rows.append(pixels.to(device))
        return torch.cat(rows).transpose(0, 1).unsqueeze(0)
