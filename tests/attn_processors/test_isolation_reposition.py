"""Isolation and reposition in tiny UNets and FLUX: rows, branches, schedules, and what they equal."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from plain_attention import EXACT
from two_subjects import ALONE, CLOSE, LEFT, PANEL, PROMPTS, REFERENCES, RIGHT, TWO, denoise, noise, pictures, rows_of

from reattend.attn_processors import (
    IsolationRepositionAttnProcessor,
    LayoutError,
    Place,
    installed,
)  # fmt: skip
from reattend.attn_processors.ops.groups import Extra, dense_reference
from reattend.attn_processors.ops.regions import box_tokens, owners

# -- neutral, removed, nothing to do -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd3"])
def test_no_subjects_and_removal_are_stock_bit_for_bit(family, request):
    pipe = request.getfixturevalue(family)
    want = pictures(pipe, PROMPTS[2:])
    with installed(pipe, IsolationRepositionAttnProcessor()) as handle:
        assert {layer.state for layer in handle.report().layers} == {"neutral"}
        assert torch.equal(pictures(pipe, PROMPTS[2:]), want)
    with installed(pipe, TWO):
        assert not torch.equal(pictures(pipe, PROMPTS)[2:], want)
    assert torch.equal(pictures(pipe, PROMPTS[2:]), want)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    assert not denoiser._forward_pre_hooks


def test_one_subject_alone_has_nothing_to_be_kept_from(unet):
    want = denoise(unet, noise(2))
    one = IsolationRepositionAttnProcessor(panels=((Place(subject="cat", box=LEFT),),))
    with installed(unet, one):
        torch.testing.assert_close(denoise(unet, noise(2)), want, atol=CLOSE, rtol=0)


def test_switched_off_it_is_neutral():
    assert replace(TWO, isolate=None, refer=None).neutral
    assert replace(TWO, isolate=None, strength=0.0).neutral
    assert replace(ALONE, isolate=None).neutral
    assert not ALONE.neutral and not replace(TWO, isolate=None).neutral


def test_settings_survive_json():
    again = IsolationRepositionAttnProcessor.from_settings(json.loads(json.dumps(TWO.settings())))
    assert again == TWO


# -- one layer against the oracle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["smallest", "shared"])
@pytest.mark.parametrize("isolate", [(0.0, 1.0), None])
def test_a_layer_of_a_unet_equals_the_masked_softmax(unet, overlap, isolate):
    unet = unet.double()
    wide = (0.25, 0.0, 1.0, 1.0)  # overlaps the other
    panel = (Place(subject="cat", box=LEFT), Place(subject="dog", box=wide))
    method = IsolationRepositionAttnProcessor(
        panels=(panel,), references=(*REFERENCES, Place(subject="cat")), reposition="plain", overlap=overlap,
        isolate=isolate, mass=0.5,
    )  # fmt: skip
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    grid = (5, 3)
    x = torch.randn(8, 15, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with installed(unet, method, layers="^mid"):
        context = attn.processor.context
        context.grids, context.batch, context.timestep = {15: grid}, 8, 500
        method.prepare(context)
        attn.processor.phase = method.phase(0.5)
        got = attn(x)
    q, k, v = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    masks = torch.stack([box_tokens(LEFT, grid), box_tokens(wide, grid)])
    owner = owners(masks, overlap)
    box = (0.25, 0.25, 0.75, 0.75)
    half = box_tokens(box, grid).flatten().nonzero().flatten()
    area = {"left": 0.5, "wide": 0.75}
    want = []
    for branch in range(2):
        rows = [4 * branch + i for i in range(4)]
        for row in rows[:3]:
            want.append(dense_reference(q[[row]], k[[row]], v[[row]], owner * 0, {}, scale=attn.scale))
        bias = [0.5 * math.log(area["left"] / 0.25) - math.log(2), 0.5 * math.log(area["left"]) - math.log(2)]
        extra = {
            0: [
                Extra(k[[rows[0]]][:, half], v[[rows[0]]][:, half], bias[0]),
                Extra(k[[rows[2]]], v[[rows[2]]], bias[1]),
            ],
            1: [Extra(k[[rows[1]]], v[[rows[1]]], 0.5 * math.log(area["wide"]))],
        }
        panel_row = rows[3:]
        want.append(
            dense_reference(
                q[panel_row], k[panel_row], v[panel_row], owner, extra, scale=attn.scale, isolate=isolate is not None
            )
        )
    expected = attn.to_out[0](torch.cat(want).flatten(2))
    torch.testing.assert_close(got, expected, atol=EXACT, rtol=0)


# -- rows and branches -------------------------------------------------------------------------------------------------


def test_references_do_not_see_the_pictures(unet):
    sample = noise(3)
    alone = denoise(unet, sample[:2])
    with installed(unet, TWO):
        together = denoise(unet, sample)
    torch.testing.assert_close(together[:2], alone, atol=CLOSE, rtol=0)


def test_several_panels_equal_one_at_a_time_in_any_order(unet):
    other = (Place(subject="dog", box=LEFT), Place(subject="cat", box=RIGHT))
    sample = noise(4)
    with installed(unet, replace(TWO, panels=(PANEL, other))):
        both = denoise(unet, sample)
    with installed(unet, replace(TWO, panels=(other, PANEL))):
        turned = denoise(unet, sample[[0, 1, 3, 2]])
    torch.testing.assert_close(turned[[0, 1, 3, 2]], both, atol=CLOSE, rtol=0)
    for row, panel in ((2, PANEL), (3, other)):
        with installed(unet, replace(TWO, panels=(panel,))):
            one = denoise(unet, sample[[0, 1, row]])
        torch.testing.assert_close(one[2], both[row], atol=CLOSE, rtol=0)


@pytest.mark.parametrize(("branches", "touched"), [("both", {0: [0, 2], 3: [3, 5]}), ("cond", {0: [0], 3: [3, 5]})])
def test_branches_keep_to_themselves(unet, branches, touched):
    """Rows: references, panel without the prompt, then the same with it. A change of a reference reaches its branch."""
    sample = noise(6)
    with installed(unet, replace(TWO, branches=branches)):
        before = denoise(unet, sample)
        for changed, rows in touched.items():
            other = sample.clone()
            other[changed] += 1
            after = denoise(unet, other)
            differ = [row for row in range(6) if not torch.equal(before[row], after[row])]
            assert differ == rows


def test_one_panel_without_references_stands_for_all_rows(unet):
    sample = noise(1).expand(4, -1, -1, -1)
    with installed(unet, ALONE):
        made = denoise(unet, sample)
    torch.testing.assert_close(made, made[:1].expand_as(made), atol=CLOSE, rtol=0)
    assert not torch.allclose(made[:1], denoise(unet, sample[:1]), atol=CLOSE)


def test_rows_that_do_not_fit_are_told(unet):
    with (
        installed(unet, TWO),
        pytest.raises(LayoutError, match="4 rows.*2 references, 0 captions and 1 panels.*in this order"),
    ):
        denoise(unet, noise(4))


def test_a_reference_reaches_its_own_subject_only(unet):
    """In one layer: a change of the cat's reference leaves the tokens of the dog and of the background as they are."""
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    panel = (Place(subject="cat", box=(0, 0, 0.25, 1)), Place(subject="dog", box=(0.75, 0, 1, 1)))
    method = replace(TWO, panels=(panel,))
    seen = []
    hook = attn.register_forward_hook(lambda _, args, out: seen.append(out[2].unflatten(0, (16, 16))))
    sample = noise(3)
    with installed(unet, method, layers=re.escape("down_blocks.0.attentions.0")):
        denoise(unet, sample)
        sample[0] += 1
        denoise(unet, sample)
    hook.remove()
    same = [torch.equal(seen[0][:, part], seen[1][:, part]) for part in (slice(0, 4), slice(4, 12), slice(12, 16))]
    assert same == [False, True, True]


def test_two_layers_leak_through_the_background_as_documented(unet):
    panel = (Place(subject="cat", box=(0, 0, 0.25, 1)), Place(subject="dog", box=(0.75, 0, 1, 1)))
    sample = noise(1)
    with installed(unet, replace(ALONE, panels=(panel,))):
        before = denoise(unet, sample)
        sample[:, :, :, 12:] += 1
        after = denoise(unet, sample)
    assert not torch.equal(before[:, :, :, :2], after[:, :, :, :2])


# -- schedule, strength, chance ------------------------------------------------------------------------------------------


def test_windows_say_when_it_acts():
    method = replace(TWO, isolate=(0.0, 0.8), refer=(0.2, 1.0))
    assert [method.phase(p) for p in (0.0, 0.2, 0.5, 0.8, 0.99)] == [1, 3, 3, 2, 2]
    assert replace(TWO, isolate=None).phase(0.5) == 2 and replace(TWO, strength=0.0).phase(0.5) == 1


def test_steps_outside_the_windows_are_stock(unet):
    method = replace(TWO, isolate=(0.0, 0.5), refer=(0.0, 0.5))
    sample = noise(3)
    with installed(unet, method):
        late = denoise(unet, sample, t=100)
        early = denoise(unet, sample, t=900)
    torch.testing.assert_close(late, denoise(unet, sample, t=100), atol=CLOSE, rtol=0)
    assert not torch.allclose(early, denoise(unet, sample, t=900), atol=CLOSE)


def test_strength_draws_tokens_from_its_own_seed_and_leaves_the_global_one_alone(unet):
    sample, half = noise(3), replace(TWO, strength=0.5)
    state = torch.random.get_rng_state()
    first, again, other = (rows_of(m, unet, sample) for m in (half, half, replace(half, seed=1)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    none, full = rows_of(replace(TWO, strength=0.0), unet, sample), rows_of(TWO, unet, sample)
    assert not torch.equal(first, none) and not torch.equal(first, full)
    least = rows_of(replace(TWO, strength=1e-6), unet, sample)
    assert not torch.equal(least, none)  # one token of every subject at least


def test_the_layers_that_see_references_can_be_chosen(unet):
    sample = noise(3)
    none = rows_of(replace(TWO, refer=None), unet, sample)
    torch.testing.assert_close(
        rows_of(replace(TWO, reference_layers="^nowhere"), unet, sample), none, atol=CLOSE, rtol=0
    )
    assert not torch.allclose(rows_of(replace(TWO, reference_layers="^up"), unet, sample), none, atol=CLOSE)


def test_a_second_run_and_an_interrupted_one_are_like_the_first(sd):
    with installed(sd, replace(TWO, strength=0.5)):
        first = pictures(sd, PROMPTS)

        def stop(pipe, index, timestep, tensors):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pictures(sd, PROMPTS, callback_on_step_end=stop)
        assert torch.equal(pictures(sd, PROMPTS), first)


def test_two_calls_of_a_step_are_told_apart(unet):
    """True guidance calls the model twice a step: the first call has the prompt."""
    sample = noise(3)
    with installed(unet, replace(TWO, branches="cond", isolate=None)):
        first, second = denoise(unet, sample), denoise(unet, sample)
        third = denoise(unet, sample, t=400)
    plain = denoise(unet, sample)
    assert not torch.allclose(first[2], plain[2], atol=CLOSE)
    torch.testing.assert_close(second, plain, atol=CLOSE, rtol=0)
    assert not torch.allclose(third[2], denoise(unet, sample, t=400)[2], atol=CLOSE)


def test_a_copy_of_the_model_works_by_itself(unet):
    sample = noise(3)
    with installed(unet, TWO):
        want = denoise(unet, sample)
        twin = copy.deepcopy(unet)
    assert torch.equal(denoise(twin, sample), want)
