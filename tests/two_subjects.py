"""A cat and a dog: the panel, the references and the calls that the tests of isolation and reposition share."""

from __future__ import annotations

from typing import Any

import tiny
import torch

from reattend.attn_processors import (
    IsolationRepositionAttnProcessor,
    Place,
    installed,
)  # fmt: skip

CLOSE = 1e-5  # fp32 through a whole model, other orders of summation
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
PANEL = (Place(subject="cat", box=LEFT), Place(subject="dog", box=RIGHT))
REFERENCES = (Place(subject="cat", box=(0.25, 0.25, 0.75, 0.75)), Place(subject="dog"))
TWO = IsolationRepositionAttnProcessor(panels=(PANEL,), references=REFERENCES)
ALONE = IsolationRepositionAttnProcessor(panels=(PANEL,))
PROMPTS = ["a cat", "a dog", "a cat and a dog"]


def noise(batch: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, *size, generator=torch.Generator().manual_seed(seed))


def denoise(model: Any, sample: torch.Tensor, t: float = 500) -> torch.Tensor:
    """A UNet on the given rows, every row with a text of its own."""
    text = torch.randn(1, 77, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return model(sample, torch.tensor(t), text.expand(len(sample), -1, -1)).sample


def flux_rows(model: Any, ids: torch.Tensor, batch: int) -> torch.Tensor:
    return tiny.denoise_flux(model, ids, batch=batch)


def pictures(pipe: Any, prompts: list[str], **changes: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i, _ in enumerate(prompts)]
    return tiny.run(pipe, prompt=prompts, generator=generators, **changes)


def rows_of(method: IsolationRepositionAttnProcessor, model: Any, sample: torch.Tensor) -> torch.Tensor:
    with installed(model, method):
        return denoise(model, sample)
