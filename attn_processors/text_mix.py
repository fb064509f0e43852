"""Every subject reads its own prompt: text cross-attention of UNets, mixed inside the subject's place.

    out = (1 - m) CA(q, text of the panel) + m CA(q, text of the subject's reference),    m = text_mix * strength

for the queries of that subject (IR-Diffusion, arXiv 2411.19261, mixes with 0.9). The panel's caption need not repeat
what a character looks like, and each description reaches its own character alone. Cross-attention works query by query,
so only the subject's own tokens are computed a second time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .context import Context
    from .isolation_reposition import IsolationRepositionAttnProcessor
    from .subjects import Cast

__all__ = ["mixed"]


def mixed(
    method: IsolationRepositionAttnProcessor, cast: Cast, context: Context, attn: Any, x: Tensor, text: Tensor, out: Tensor
) -> Tensor:  # fmt: skip
    """The output of a text cross-attention layer with every subject's own text mixed in.

    Args:
        attn: the layer, whose own processor answers.
        x: image tokens (B, N, C) the layer was called with.
        text: text tokens (B, T, C').
        out: what it returned, (B, N, C).
    """
    share = method.text_mix * method.strength
    grid = context.grids.get(x.shape[1])
    if grid is None or not share:
        return out
    if method.source == "record":
        _keep(cast, context, method, text)
        return out
    result = out
    for number in range(len(method.panels)):
        owner, boxes = cast.owner(number, grid)
        for name in boxes:
            numbers = [i for i, place in enumerate(method.references) if place.subject == name]
            subject = cast.subjects.index(name)
            mine = (owner >> subject & 1).nonzero().flatten().to(x.device)
            if not numbers or not len(mine):
                continue
            owners = sum(owner[mine.cpu()] >> other & 1 for other in range(len(cast.subjects)))
            weight = (share / owners).to(out)[:, None] if int(owners.max()) > 1 else share
            for branch in cast.reference_branches():
                rows = cast.rows("panel", number, context, [branch])
                texts = _texts(method, cast, context, text, numbers, branch)
                if texts is None:
                    continue
                answers = [attn.processor(attn, x[rows][:, mine], encoder_hidden_states=one[None]) for one in texts]
                own = torch.stack(answers).mean(0)
                if result is out:
                    result = out.clone()  # others may hold the output
                part = result[rows[0], mine]
                result[rows[0], mine] = part + weight * (own[0] - out[rows[0], mine])
    return result


def _texts(
    method: IsolationRepositionAttnProcessor,
    cast: Cast,
    context: Context,
    text: Tensor,
    numbers: list[int],
    branch: int,
) -> list[Tensor] | None:
    if method.source == "rows":
        return [text[cast.rows("reference", number, context, [branch])[0]] for number in numbers]
    assert cast.bank is not None
    kept = [cast.bank.texts.get((branch - cast.branches, number)) for number in numbers]
    found = [one.to(text) for one in kept if one is not None]
    return found or None


def _keep(cast: Cast, context: Context, method: IsolationRepositionAttnProcessor, text: Tensor) -> None:
    """Once for each reference and branch that is read: text is the same in all layers and steps."""
    assert cast.bank is not None
    for number in range(len(method.references)):
        for branch in cast.reference_branches():
            key = (branch - cast.branches, number)
            if key not in cast.bank.texts:
                cast.bank.put_text(key, text[cast.rows("reference", number, context, [branch])[0]].clone())
