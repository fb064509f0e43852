"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024), for convolutions too.

The trainings here use it for all weights but vectors and embeddings. `torch.optim.Muon` takes matrices only and iterates on
the whole matrix; here a kernel (out, in, 3, 3) is a matrix (out, 9 in), and the Newton-Schulz polynomial is
evaluated on the small Gram matrix, which makes it cheap enough for a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic that drives every singular value to about one


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of a batch (B, M, N): U V^T of each singular value decomposition U S V^T, roughly.

    With A = X X^T every step is X <- (a I + b A + c A^2) X, so the steps are multiplied up in the small A alone.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram, total = x @ x.mT, None
    eye = torch.eye(gram.size(-1), dtype=x.dtype)
    for _ in range(steps):
        factor = a * eye + b * gram + c * (gram @ gram)
        total = factor if total is None else factor @ total
        gram = factor @ gram @ factor
    x = total @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per weight and scaled to the size of an AdamW step (0.2 sqrt(max(M, N)))."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if "momentum" not in self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
                average = self.state[weight]["momentum"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"]).flatten(1)
                same_shape.setdefault(update.shape, []).append((weight, update))
            for shape, items in same_shape.items():
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for (weight, _), update in zip(items, orthogonalized(torch.stack([u for _, u in items])), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(weight), alpha=-rate)
