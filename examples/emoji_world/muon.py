"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024), for convolutions too.

The trainings here use it for all weights but vectors and embeddings. `torch.optim.Muon` takes matrices only and iterates on
the whole matrix; here a kernel (out, in, 3, 3) is a matrix (out, 9 in), and the Newton-Schulz polynomial is
evaluated on the small Gram matrix, which makes it cheap enough for a CPU.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
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
    eye = torch.eye(gram.size(-1), dtype=x.dtype, device=x.device)
    for _ in range(steps):
        factor = a * eye + b * gram + c * (gram @ gram)
        total = factor if total is None else factor @ total
        gram = factor @ gram @ factor
    x = total @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per weight and scaled to the size of an AdamW step (0.2 sqrt(max(M, N))).

    Several processes with the same gradients share the work: each orthogonalises its part of the weights.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            momenta = [self.averaged_gradient(weight, group["momentum"]) for weight in weights]
            for weight, update in zip(weights, orthogonalized_together(momenta), strict=True):
                rate = group["lr"] * 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(weight), alpha=-rate)

    def averaged_gradient(self, weight: Tensor, momentum: float) -> Tensor:
        """The gradient with Nesterov momentum, as a matrix."""
        if "momentum" not in self.state[weight]:
            self.state[weight]["momentum"] = torch.zeros_like(weight)
        average = self.state[weight]["momentum"]
        average.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum).flatten(1)


def orthogonalized_together(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix orthogonalised; those of one shape at once, and every process of the group its share of them."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    flat = matrices[0].new_zeros(sum(matrix.numel() for matrix in matrices))
    done = [part.view_as(m) for part, m in zip(flat.split([m.numel() for m in matrices]), matrices, strict=True)]
    same_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        same_shape.setdefault(matrix.shape, []).append(i)
    for number, indices in enumerate(same_shape.values()):
        mine = indices[(rank + number) % ranks :: ranks]
        if mine:
            for i, result in zip(mine, orthogonalized(torch.stack([matrices[i] for i in mine])), strict=True):
                done[i].copy_(result)
    if ranks > 1:
        dist.all_reduce(flat)
    return done
