"""Masks that come about in a running model, and the text that subjects read."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from reattend.attn_processors import IsolationRepositionAttnProcessor, LayoutError, Place, installed
from reattend.attn_processors.attention_maps import Maps
from reattend.attn_processors.bank import Bank

CLOSE = 1e-5  # fp32, other orders of summation
WORDS = (Place(subject="cat", words=(2,)), Place(subject="dog", words=(5, 6)))
AUTO = IsolationRepositionAttnProcessor(panels=(WORDS,), references=(Place(subject="cat", words=(2,)),))


def pictures(pipe: Any, prompts: list[str], **changes: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i, _ in enumerate(prompts)]
    return tiny.run(pipe, prompt=prompts, generator=generators, **changes)


@pytest.mark.parametrize("family", ["sd", "flux", "sd3"])
def test_masks_are_found_and_used_from_the_warm_up_on(family, request, monkeypatch):
    monkeypatch.setattr("reattend.attn_processors.ops.maps.FLAT", 0.0)  # attention of random weights is nearly flat
    pipe = request.getfixturevalue(family)
    prompts = ["a cat", "a cat and a dog"]
    settings = {"num_inference_steps": 4} | ({} if family == "sd" else {"max_sequence_length": 32})
    want = pictures(pipe, prompts, **settings)
    found = {}
    with installed(pipe, replace(AUTO, warmup=0.25)) as handle:
        method, context = handle.parts[0][1].method, handle.parts[0][0]

        def look(pipe, index, timestep, tensors):
            found[index] = dict(method.cast(context).found)
            return tensors

        got = pictures(pipe, prompts, callback_on_step_end=look, **settings)
    assert not found[0] and not found[1]
    assert {key for step in found.values() for key in step} <= {
        ("panel", 0, "cat"), ("panel", 0, "dog"), ("reference", 0, "cat"),
    }  # fmt: skip
    assert found[2] and all(mask.any() for mask in found[2].values())
    assert all(found[3][key] is mask for key, mask in found[2].items())  # made anew every few steps only
    assert not torch.equal(got[1], want[1])
    assert not (getattr(pipe, "unet", None) or pipe.transformer)._forward_hooks
    torch.testing.assert_close(got[0], want[0], atol=1e-3, rtol=1e-4)  # the reference does not see the panel


def test_hooks_go_with_the_handle(unet):
    with installed(unet, AUTO):
        assert sum(bool(module._forward_hooks) for module in unet.modules()) == 7
    assert not any(module._forward_hooks for module in unet.modules())


def test_what_is_heard_is_the_models_own_text_attention(unet):
    """Probabilities of our ear against those of the layer's own, for one layer."""
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    maps = Maps(AUTO)
    maps.listening = {("panel", 0): 1}
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 9, tiny.TEXT_WIDTH, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        maps.hear(SimpleNamespace(grids={12: (3, 4)}), attn, x, text)
        q, k = (attn.head_to_batch_dim(part) for part in (attn.to_q(x), attn.to_k(text)))
        probabilities = attn.get_attention_scores(q, k).view(2, attn.heads, 12, 9).mean(1)[1]
    want = torch.stack([probabilities[:, 2], probabilities[:, 5:7].amax(1)], 1)
    got, count = maps._heard["panel", 0].text[(3, 4), False]
    assert count == 1
    torch.testing.assert_close(got, want, atol=CLOSE, rtol=0)


def test_a_subject_without_a_place_in_the_attention_is_told(sd, monkeypatch):
    nothing = torch.zeros(2, 256, dtype=torch.bool)
    monkeypatch.setattr(
        "reattend.attn_processors.attention_maps.assign", lambda maps: nothing[: maps.shape[1], : len(maps)]
    )
    with installed(sd, AUTO) as handle:
        with pytest.warns(UserWarning, match="'cat' in panel 1 was not found: its words have no place of their own"):
            pictures(sd, ["a cat", "a cat and a dog"], num_inference_steps=4)
        assert "not found: 'dog' in panel 1" in str(handle.report())


def test_few_steps_get_masks_late_or_are_told(sd, monkeypatch):
    monkeypatch.setattr("reattend.attn_processors.ops.maps.FLAT", 0.0)
    prompts = ["a cat", "a cat and a dog"]
    with installed(sd, AUTO) as handle:
        method, context = handle.parts[0][1].method, handle.parts[0][0]
        assert "not found" not in str(handle.report())
        pictures(sd, prompts, num_inference_steps=3)
        assert method.cast(context).found
        pictures(sd, prompts, num_inference_steps=2)  # nothing can be read before the last step
        assert not method.cast(context).found
        for who in ("'cat' in reference 1", "'cat' in panel 1", "'dog' in panel 1"):
            assert f"not found: {who} (no mask was read" in str(handle.report())
        method.cast(context).first_panel = 4
        assert method.cast(context).told()[1:] == [
            f"not found: {name!r} in panel 5 (no mask was read from attention maps; more steps give one)"
            for name in ("cat", "dog")
        ]


@pytest.mark.parametrize("ever", [True, False])
def test_a_subject_found_later_is_not_absent_and_strict_waits_for_the_last_mask(sd, monkeypatch, ever):
    made = []

    def late(maps):
        made.append(maps)
        mask = torch.zeros(maps.shape[1], len(maps), dtype=torch.bool)
        if ever and len(made) > 2:  # one row each for reference and panel
            mask[0, : len(maps) // 2] = True
            mask[-1, len(maps) // 2 :] = True
        return mask

    monkeypatch.setattr("reattend.attn_processors.attention_maps.assign", late)
    monkeypatch.setattr("reattend.attn_processors.attention_maps.EVERY", 1)
    settings = {"prompts": ["a cat", "a cat and a dog"], "num_inference_steps": 6}
    with installed(sd, replace(AUTO, strict=True)) as handle:
        if ever:
            pictures(sd, **settings)
            assert "not found" not in str(handle.report())
        else:
            with pytest.raises(ValueError, match="'cat' in reference 1 was not found: its words have no place"):
                pictures(sd, **settings)
        assert len(made) == 4  # at 2/6 and 3/6 of the steps


def test_maps_of_the_latents_own_grid_are_left_out_when_pooled_to_that_of_coarser_layers(monkeypatch):
    monkeypatch.setattr("reattend.attn_processors.attention_maps.MOST_TOKENS", 4)
    maps, row = Maps(AUTO), ("panel", 0)
    maps._latents = (4, 4)
    draw = torch.Generator().manual_seed(0)
    coarse, own = torch.rand(4, 2, generator=draw), torch.rand(4, 4, generator=draw)
    want = None
    for more in ([], [torch.rand(16, 2, generator=draw)]):
        maps._text(row, (2, 2), coarse)
        maps._heard[row].add(maps._heard[row].own, (2, 2), (2, 2), own)
        for fine in more:
            maps._text(row, (4, 4), fine)
            maps._heard[row].add(maps._heard[row].own, (4, 4), (2, 2), torch.rand(4, 4, generator=draw))
        spread, grid = maps._heard[row].spread()
        assert grid == (2, 2)
        want = spread if want is None else want
        torch.testing.assert_close(spread, want, atol=1e-6, rtol=0)


def test_words_beyond_the_text_are_told(flux):
    far = IsolationRepositionAttnProcessor(panels=((Place(subject="cat", words=(600,)),),))
    with installed(flux, far), pytest.raises(ValueError, match="lie beyond the 512 text tokens"):
        pictures(flux, ["a cat"], num_inference_steps=4)


# -- text ----------------------------------------------------------------------------------------------------------------

BOXES = (Place(subject="cat", box=(0, 0, 0.5, 1)), Place(subject="dog", box=(0.5, 0, 1, 1)))
MIXED = IsolationRepositionAttnProcessor(
    panels=(BOXES,), references=(Place(subject="cat"), Place(subject="dog")), text_mix=0.5, branches="cond"
)


def test_subjects_read_their_own_text_inside_their_place(unet):
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    seen = []
    attn.register_forward_hook(lambda _, args, kwargs, out: seen.append((args[0], out)), with_kwargs=True)
    draw = torch.Generator().manual_seed(0)
    sample, text = torch.randn(6, 4, 16, 16, generator=draw), torch.randn(6, 77, tiny.TEXT_WIDTH, generator=draw)
    with torch.no_grad(), installed(unet, MIXED):
        unet(sample, torch.tensor(500), text)
        (x, stock), (_, after) = seen[0], (None, attn(seen[0][0], encoder_hidden_states=text))
        own = {row: attn.processor(attn, x[[5]], encoder_hidden_states=text[[row]])[0] for row in (3, 4)}
    left = (torch.arange(256) % 16 < 8)[:, None]
    want = 0.75 * stock[5] + 0.25 * torch.where(left, own[3], own[4])  # half of text_mix
    torch.testing.assert_close(after[5], want, atol=CLOSE, rtol=0)
    assert torch.equal(after[:5], stock[:5])  # references, and the branch without the prompt


def test_subjects_read_the_caption_of_their_place_in_the_branch_with_the_prompt(unet):
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    seen = []
    attn.register_forward_hook(lambda _, args, kwargs, out: seen.append((args[0], out)), with_kwargs=True)
    draw = torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 4, 16, 16, generator=draw), torch.randn(2, 77, tiny.TEXT_WIDTH, generator=draw)
    own = torch.randn(5, tiny.TEXT_WIDTH, generator=draw)  # as long as it likes
    cat, dog = BOXES
    method = IsolationRepositionAttnProcessor(panels=((replace(cat, caption="a red cat"), dog),), text_mix=0.5)
    with torch.no_grad(), installed(unet, method) as handle:
        with pytest.raises(RuntimeError, match="captions of places have to be encoded"):
            unet(sample, torch.tensor(500), text)
        method.cast(handle.parts[0][0]).captions["a red cat"] = own
        unet(sample, torch.tensor(500), text)
        (x, after), stock = seen[0], attn(seen[0][0], encoder_hidden_states=text)
        stock, after = after, stock
        read = attn.processor(attn, x[[1]], encoder_hidden_states=own[None])[0]
    left = (torch.arange(256) % 16 < 8)[:, None]
    torch.testing.assert_close(after[1], torch.where(left, 0.5 * stock[1] + 0.5 * read, stock[1]), atol=CLOSE, rtol=0)
    assert torch.equal(after[0], stock[0])


def test_text_of_a_bank_equals_that_of_rows(sd):
    prompts = ["a cat", "a dog", "a cat and a dog"]
    with installed(sd, MIXED):
        want = pictures(sd, prompts)[2:]
    bank, recorder = Bank(), replace(MIXED, panels=(), source="record")
    with installed(sd, recorder) as handle:
        recorder.cast(handle.parts[0][0]).bank = bank
        pictures(sd, prompts[:2])
    method = replace(MIXED, source="bank")
    with installed(sd, method) as handle:
        method.cast(handle.parts[0][0]).bank = bank
        got = tiny.run(sd, prompt=prompts[2:], generator=[torch.Generator().manual_seed(2)])
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_automatic_masks_need_a_panel_for_every_picture(unet):
    with installed(unet, replace(AUTO, references=(AUTO.references[0],) * 2)), pytest.raises(LayoutError, match="rows"):
        tiny.denoise(unet, batch=4)
