"""Text of its own for every subject in joint layers, against a masked softmax. (UNets: test_attention_maps.py)"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from two_subjects import ALONE, LEFT, PROMPTS, REFERENCES, RIGHT, TWO, pictures

from reattend.attn_processors import IsolationRepositionAttnProcessor, Place, installed, isolation_reposition, text_mix
from reattend.attn_processors.families.joint import JointCall
from reattend.attn_processors.ops.groups import Extra, dense_reference
from reattend.attn_processors.ops.regions import box_tokens, owners

EXACT = 1e-5  # fp32, other orders of summation
PANEL = (Place(subject="cat", box=LEFT), Place(subject="dog", box=(0.25, 0.0, 1.0, 1.0)))  # they share some tokens
TOLD = (replace(PANEL[0], caption="a blue cat"), PANEL[1])
MIXED = replace(TWO, text_mix=0.4, overlap="shared", panels=(PANEL,), references=(*REFERENCES, Place(subject="cat")))
CAPTIONED = replace(MIXED, panels=(TOLD,), references=REFERENCES, caption_rows=True)
FOUR = ["a cat", "a dog", "a blue cat", PROMPTS[2]]


@pytest.mark.parametrize("method", [MIXED, CAPTIONED], ids=["references", "caption"])
@pytest.mark.parametrize("branches", ["both", "cond"])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_joint_layer_with_own_text_equals_the_masked_softmax(family, branches, method, request, monkeypatch):
    pipe = request.getfixturevalue(family)
    method = replace(method, branches=branches)
    calls: list[tuple[JointCall, torch.Tensor]] = []
    attend = IsolationRepositionAttnProcessor.attend

    def watched(self: Any, call: Any, phase: int) -> torch.Tensor:
        out = attend(self, call, phase)
        calls.append((call, out))
        return out

    monkeypatch.setattr(IsolationRepositionAttnProcessor, "attend", watched)
    with installed(pipe, method) as handle:
        pictures(pipe, FOUR, num_inference_steps=1)
        cast = method.cast(handle.parts[0][0])
        kinds = set()
        for call, out in calls:
            text = list(call.text_places)
            assert len(text) == (call.layout.global_tokens or 0)
            kinds.add((call.text is None, bool(text)))
            count = cast.branches
            for branch in range(count):
                reads = branches == "both" or branch == count - 1
                want = judged(method, call, cast, branch, text) if reads else None
                row = branch * 4 + 3
                if want is not None:
                    torch.testing.assert_close(
                        out[row : row + 1].unflatten(2, (call.heads, -1)), want, atol=EXACT, rtol=0
                    )
                references = slice(branch * 4, branch * 4 + 3)
                stock = call.softmax(call.q[references], call.k[references], call.v[references], mask=None)
                torch.testing.assert_close(out[references], stock.flatten(2), atol=EXACT, rtol=0)
        # streams of their own and joined ones in FLUX; in SD3 also layers of the picture alone, which have no text
        assert kinds == ({(False, True), (True, True)} if family == "flux" else {(False, True), (True, False)})


def judged(
    method: IsolationRepositionAttnProcessor, call: JointCall, cast: Any, branch: int, text: list[int]
) -> torch.Tensor:
    """One panel row of the layer by dense softmaxes: once with the panel's text, once with each reference's in its place."""
    row = branch * 4 + 3
    q, k, v = (x[row : row + 1] for x in (call.q, call.k, call.v))
    boxes = torch.stack([box_tokens(place.box, call.grid) for place in PANEL])
    owner = torch.zeros(call.layout.tokens, dtype=torch.int64)
    owner[call.layout.grid] = owners(boxes, "shared")
    extra: dict[int, list[Extra]] = {0: [], 1: []}
    for subject, several in cast.readers(0, call).items():
        for reader in several:
            x = call.picture[branch * 4 + reader.number][None]
            tokens = (x[:, reader.index] * reader.weight[None, ..., None].to(x)).sum(2)
            extra[subject].append(Extra(call.keys_at(tokens, reader.places), call.to_v(tokens), reader.bias))
    want = dense_reference(q, k, v, owner, extra, scale=call.scale)
    no_text = torch.ones(1, call.layout.tokens, dtype=torch.bool)
    no_text[:, text] = False
    own: dict[int, torch.Tensor] = {}
    for subject, numbers in {0: (2,) if method.caption_rows else (0, 2), 1: (1,)}.items():
        rows = [branch * 4 + number for number in numbers]
        texts = [Extra(call.k[[one]][:, text], call.v[[one]][:, text]) for one in rows]
        answers = [
            dense_reference(q, k, v, owner, {**extra, subject: [*extra[subject], one]}, scale=call.scale, valid=no_text)
            for one in texts
        ]
        own[subject] = torch.stack(answers).mean(0)
    result = want.clone()
    share = {0: 0.4 if method.caption_rows else 0.2, 1: 0.2}  # half for the text of references
    change = {subject: share[subject] * (own[subject] - want) for subject in own}
    for code, mix in {1: change[0], 2: change[1], 3: (change[0] + change[1]) / 2}.items():
        mine = owner == code
        assert mine.any()
        result[:, mine] += mix[:, mine]
    return result


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_subject_that_fills_the_panel_draws_the_picture_of_its_caption(family, request):
    pipe = request.getfixturevalue(family)
    place = Place(subject="cat", box=(0, 0, 1, 1), caption="a red cat")
    method = IsolationRepositionAttnProcessor(panels=((place,),), caption_rows=True, text_mix=1.0, branches="cond")

    def drawn() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)]
        return tiny.run(pipe, prompt=["a red cat", "a cat"], generator=generators)

    def one_pooled_text(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        pooled = given["pooled_projections"]
        return args, given | {"pooled_projections": pooled[::2].repeat_interleave(2, 0)}

    hook = pipe.transformer.register_forward_pre_hook(one_pooled_text, with_kwargs=True)
    try:
        stock = drawn()
        with installed(pipe, method):
            got = drawn()
    finally:
        hook.remove()
    torch.testing.assert_close(got[0], stock[0], atol=EXACT, rtol=0)
    torch.testing.assert_close(got[1], stock[0], atol=EXACT, rtol=0)
    assert not torch.allclose(stock[1], stock[0], atol=1e-4)


def test_captions_reach_all_of_their_subject_however_few_tokens_see_references(flux):
    def told(strength: float) -> int:
        method, found = replace(CAPTIONED, strength=strength, references=REFERENCES if strength else ()), []
        with installed(flux, method):
            mixed = text_mix.mixed_jointly

            def watched(call: Any, rows: Any, groups: Any, *more: Any) -> torch.Tensor:
                found.append(sum(len(group.queries) for group in groups if 0 in group.told))
                return mixed(call, rows, groups, *more)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(isolation_reposition, "mixed_jointly", watched)
                pictures(flux, FOUR if strength else FOUR[2:], num_inference_steps=1)
        return found[0]

    assert told(0.0) == told(0.05) == told(1.0) == 8 * 8 // 2


def test_a_caption_without_a_row_is_told(flux):
    method = replace(CAPTIONED, caption_rows=False, references=())
    with installed(flux, method), pytest.raises(RuntimeError, match="captions of places have to be encoded"):
        pictures(flux, ["a cat and a dog"])


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_own_text_reaches_its_subject_and_only_while_references_are_seen(family, request):
    pipe = request.getfixturevalue(family)

    def drawn(method: IsolationRepositionAttnProcessor, cat: str) -> torch.Tensor:
        with installed(pipe, method):
            return pictures(pipe, [cat, "a dog", PROMPTS[2]])

    mixed = replace(TWO, text_mix=0.5)
    plain = drawn(TWO, "a cat")
    got = drawn(mixed, "a cat")
    torch.testing.assert_close(got[:2], plain[:2], atol=EXACT, rtol=0)  # references are untouched
    assert not torch.allclose(got[2], plain[2], atol=1e-4)
    assert torch.equal(drawn(replace(mixed, refer=None), "a cat"), drawn(replace(TWO, refer=None), "a cat"))


def test_a_bank_keeps_no_text_of_joint_layers_and_says_so(flux):
    for source in ("bank", "record"):
        method = replace(TWO, text_mix=0.5, source=source, panels=() if source == "record" else TWO.panels)
        with pytest.raises(ValueError, match="a bank keeps none; leave out the bank, or text_mix"):
            installed(flux, method).__enter__()


def test_models_without_text_are_told():
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8).eval()
    method = replace(ALONE, text_mix=0.5, panels=((Place(subject="cat", box=RIGHT),),))
    with pytest.raises(ValueError, match="text_mix needs layers that read text.*DiTTransformer2DModel has not"):
        installed(dit, method).__enter__()
