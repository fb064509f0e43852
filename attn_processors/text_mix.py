"""Every subject reads text of its own: what its queries get from text, mixed inside the subject's place.

In the text cross-attention of UNets, for the queries of a subject:

    out = (1 - m) CA(q, text of the panel) + m CA(q, text of the subject)

The text is the caption of the subject's place if it has one, with m = text_mix; else that of its references, with m =
text_mix * strength / 2. The panel's prompt need not repeat what a character looks like, and each description reaches its
own character alone. A caption tells of the whole panel, a reference's prompt of another picture: with all of its weight
(IR-Diffusion, arXiv 2411.19261, mixes 0.9) it brings that picture's background, and hides who should be there.
Attention works query by query, so only the subject's own tokens are computed a second time.

In joint layers text and picture share one softmax, and text changes from layer to layer. So captions are further rows of
the call, drawn from the noise of their panel, and the second answer is that of the same keys with the caption's (or the
reference's) text, as that layer has it in its row, in place of the panel's, in the branches that see references. The text
of a reference reaches only the queries that see it in a step, a share `strength` of the subject's; for these m = text_mix / 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ops.groups import Extra, Group, grouped_attention
from .subjects import REFER

if TYPE_CHECKING:
    from .context import Context
    from .isolation_reposition import IsolationRepositionAttnProcessor
    from .layer import LayerCall
    from .places import Place
    from .subjects import Cast, Reader

__all__ = ["Ear", "mixed", "mixed_jointly", "own_rows"]

REFERENCE_SHARE = 0.5  # of text_mix, for text that was written for another picture


@dataclass(frozen=True, eq=False)
class Ear:
    """What is called after every text cross-attention. An object, so that a copy of the model has its own."""

    method: IsolationRepositionAttnProcessor
    context: Context

    def __call__(self, attn: Any, x: Tensor, text: Tensor, out: Tensor) -> Tensor:
        cast, maps = self.method.cast(self.context), self.method.maps(self.context)
        if maps is not None:
            maps.hear(self.context, attn, x, text)
        return mixed(self.method, cast, self.context, attn, x, text, out)


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
    grid = context.grids.get(x.shape[1])
    if grid is None or not method.text_mix:
        return out
    if method.source == "record":
        if cast.phase & REFER:
            _keep(cast, context, method, text)
        return out
    result = out
    for number, panel in enumerate(method.panels):
        owner, boxes = cast.owner(number, grid)
        for place in panel:
            if place.subject not in boxes:
                continue
            subject = cast.subjects.index(place.subject)
            mine = (owner >> subject & 1).nonzero().flatten().to(x.device)
            if not len(mine):
                continue
            owners = sum(owner[mine.cpu()] >> other & 1 for other in range(len(cast.subjects)))
            for branch, texts, share in _own(method, cast, context, text, place):
                (row,) = cast.rows("panel", number, context, [branch])
                weight = (share / owners).to(out)[:, None] if int(owners.max()) > 1 else share
                answers = [attn.processor(attn, x[[row]][:, mine], encoder_hidden_states=one[None]) for one in texts]
                own = torch.stack(answers).mean(0)
                if result is out:
                    result = out.clone()  # others may hold the output
                part = result[row, mine]
                result[row, mine] = part + weight * (own[0] - out[row, mine])
    return result


def _own(
    method: IsolationRepositionAttnProcessor, cast: Cast, context: Context, text: Tensor, place: Place
) -> Iterator[tuple[int, list[Tensor], float]]:
    """(branch, texts, share) of a subject in a panel, for the branches in which it reads text of its own."""
    if place.caption:
        for branch in cast.prompt_branches():
            yield branch, [cast.captions[place.caption].to(text)], method.text_mix
        return
    numbers = [number for number, one in enumerate(method.references) if one.subject == place.subject]
    share = REFERENCE_SHARE * method.text_mix * method.strength
    if not numbers or not share or not cast.phase & REFER:
        return
    for branch in cast.reference_branches():
        if (texts := _texts(method, cast, context, text, numbers, branch)) is not None:
            yield branch, texts, share


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


def own_rows(
    call: LayerCall, cast: Cast, number: int, rows: Sequence[int], readers: Mapping[int, Sequence[Reader]]
) -> dict[int, tuple[list[list[int]], float]]:
    """By subject of a panel: the rows of the call whose text it reads, each time for all `rows` of the panel, and m."""
    method = cast.method

    def for_all(kind: str, which: int) -> list[int]:
        found = cast.rows(kind, which, call.context, cast.reference_branches())
        return [row for row in found for _ in range(len(rows) // len(found))]

    own = {}
    if method.source == "rows":
        share = REFERENCE_SHARE * method.text_mix
        own = {s: ([for_all("reference", one.number) for one in several], share) for s, several in readers.items()}
    for which, (panel, subject, _) in enumerate(method.captions if method.caption_rows else ()):
        if panel == number:
            own[cast.subjects.index(subject)] = [for_all("caption", which)], method.text_mix
    return own


def mixed_jointly(
    call: LayerCall,
    rows: list[int],
    groups: Sequence[Group],
    extra: Mapping[int, Sequence[Extra]],
    own: Mapping[int, tuple[Sequence[list[int]], float]],
    out: Tensor,
) -> Tensor:
    """The output of a joint layer for the rows of one panel, with every subject's own text mixed in.

    Args:
        rows: of the panel in the call, one for each guidance branch.
        groups, extra: as `grouped_attention` had them.
        own: as `own_rows` tells it.
        out: what it returned, (len(rows), L, h, d).

    Raises:
        ValueError: the call hides padded text, whose places differ between rows.
    """
    if not own:
        return out
    if call.mask is not None:
        raise ValueError(f"layer {call.name!r}: text_mix does not work where padded text is masked; leave it 0.")
    q, k, v = call.q[rows], call.k[rows], call.v[rows]
    text = slice(call.text_places.start, call.text_places.stop)
    no_text = torch.ones(q.shape[1], dtype=torch.bool, device=q.device)
    no_text[text] = False
    result = out.clone()
    for group in groups:
        keys = no_text.nonzero().flatten() if group.keys is None else group.keys[no_text[group.keys]]
        before, both = out[:, group.queries], tuple(dict.fromkeys((*group.subjects, *group.told)))
        seen = {subject: extra[subject] for subject in group.subjects}
        changes = []
        for subject in (one for one in both if one in own):
            several, share = own[subject]
            answers = []
            for theirs in several:
                mine = Extra(call.k[theirs][:, text], call.v[theirs][:, text])
                given = {**seen, subject: [*seen.get(subject, ()), mine]}
                bare = Group(group.queries, keys, both)
                answers.append(grouped_attention(q, k, v, [bare], given, call.softmax)[:, group.queries])
            changes.append(share * (torch.stack(answers).mean(0) - before))
        if changes:
            result[:, group.queries] = before + torch.stack(changes).sum(0) / len(both)
    return result
