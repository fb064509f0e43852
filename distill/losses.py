"""The three losses of a linear student, and which layers the third one looks at (CLEAR, arXiv 2412.16112, section 3.3).

    L = w_flow |s - u|^2 + w_output |s - t|^2 + w_attention mean_l |a_s - a_t|^2 + mean_l o_l

s and t are the outputs of student and teacher for the same noisy latents, u is what the data asks for (flow, noise or v), and
a the outputs of attention layer l before its output projection, all tokens. Squares are means over elements, in fp32. o is
what the layers of some attentions ask for themselves, weighted by them (the balance of a mixture of heads); mostly nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Losses", "matched_layers", "student_losses"]

SINGLE = "single_transformer_blocks."


@dataclass(frozen=True, eq=False)
class Losses:
    """Scalars, unweighted but for `total`; `layers` is the attention loss of each layer, `own` what layers ask for themselves."""

    total: Tensor
    flow: Tensor
    output: Tensor
    attention: Tensor
    layers: dict[str, Tensor]
    own: Tensor | None = None


def student_losses(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    student_taps: Mapping[str, Sequence[Tensor]],
    teacher_taps: Mapping[str, Sequence[Tensor]],
    *,
    flow_weight: float = 1.0,
    output_weight: float = 0.5,
    attention_weight: float = 0.5,
    own: Sequence[Tensor] = (),
) -> Losses:
    """The losses of one forward.

    Args:
        student, teacher, target: outputs and what the data asks for, of one shape.
        own: what layers ask for themselves.
        student_taps, teacher_taps: by layer, the parts of its attention output (picture, text), (B, tokens, C) each.
    """
    flow = F.mse_loss(student.float(), target.float())
    output = F.mse_loss(student.float(), teacher.float())
    layers = {name: _mean_square(student_taps[name], teacher_taps[name]) for name in teacher_taps}
    attention = torch.stack(list(layers.values())).mean() if layers else torch.zeros_like(flow)
    total = flow_weight * flow + output_weight * output
    if layers:
        total = total + attention_weight * attention
    asked = torch.stack(list(own)).mean() if own else None
    if asked is not None:
        total = total + asked
    return Losses(total, flow, output, attention, layers, asked)


def matched_layers(names: Sequence[str], match: str) -> list[str]:
    """Which of the layers `names` are compared: "all", "every:k", "single:k" (of the single blocks), or a regex.

    Raises:
        ValueError: for a bad expression, or one that no layer matches.
    """
    kind, _, number = match.partition(":")
    if match == "all":
        return list(names)
    if kind in ("every", "single") and number:
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"match={match!r} needs a whole number from 1 after the colon, as in 'every:4'")
        there = [name for name in names if kind == "every" or name.startswith(SINGLE)]
        found = there[int(number) - 1 :: int(number)] or there[-1:]
    else:
        try:
            found = [name for name in names if re.search(match, name)]
        except re.error as problem:
            raise ValueError(f"match={match!r} is no regular expression: {problem}") from None
    if not found:
        raise ValueError(f"match={match!r} fits no attention layer; there are {', '.join(names[:4])} ...")
    return found


def _mean_square(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over all elements of all parts together."""
    pairs = list(zip(ours, theirs, strict=True))
    total = torch.stack([F.mse_loss(a.float(), b.float(), reduction="sum") for a, b in pairs]).sum()
    return total / sum(b.numel() for _, b in pairs)
