"""Isolation and reposition in tiny UNets, FLUX and Stable Diffusion 3: rows, branches, schedules, and what they equal."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from plain_attention import EXACT

from reattend.attn_processors import (
    AgentAttnProcessor,
    IsolationRepositionAttnProcessor,
    LayoutError,
    Place,
    install,
    installed,
)  # fmt: skip
from reattend.attn_processors.ops.groups import Extra, dense_reference
from reattend.attn_processors.ops.regions import box_tokens, owners, pack_mask
from reattend.attn_processors.subjects import Bank

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
    with installed(unet, TWO), pytest.raises(LayoutError, match="4 rows.*2 references and 1 panels.*references first"):
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


# -- what repositioning does ---------------------------------------------------------------------------------------------


def rows_of(method: IsolationRepositionAttnProcessor, model: Any, sample: torch.Tensor) -> torch.Tensor:
    with installed(model, method):
        return denoise(model, sample)


def test_on_a_unet_moving_alone_changes_nothing_and_scaling_does(unet):
    moved = replace(TWO, references=(Place(subject="cat", box=RIGHT),))  # as large as the target, elsewhere
    sample = noise(2)
    plain = rows_of(replace(moved, reposition="plain"), unet, sample)
    torch.testing.assert_close(rows_of(moved, unet, sample), plain, atol=CLOSE, rtol=0)
    scaled = replace(TWO, references=(Place(subject="cat", box=(0.25, 0.25, 0.5, 0.5)),))
    other = rows_of(scaled, unet, sample)
    assert not torch.allclose(other, rows_of(replace(scaled, reposition="plain"), unet, sample), atol=CLOSE)


def test_identity_boxes_equal_plain_references_in_a_rotary_model_and_moved_ones_do_not(flux):
    ids = tiny.image_ids(4, 6)
    same = IsolationRepositionAttnProcessor(
        panels=((Place(subject="cat", box=LEFT), Place(subject="dog", box=RIGHT)),),
        references=(Place(subject="cat", box=LEFT),),
    )
    made = {}
    for name, method in {
        "auto": same,
        "plain": replace(same, reposition="plain"),
        "moved": replace(same, references=(Place(subject="cat", box=RIGHT),)),
        "moved plain": replace(same, references=(Place(subject="cat", box=RIGHT),), reposition="plain"),
    }.items():
        with installed(flux.transformer, method):
            made[name] = flux_rows(flux.transformer, ids, 2)
    torch.testing.assert_close(made["auto"], made["plain"], atol=CLOSE, rtol=0)
    assert not torch.allclose(made["moved"], made["moved plain"], atol=1e-4)


def test_rotary_places_are_those_of_the_models_own_embedder(flux):
    """Also where the grid does not begin at 0. A key rotated to its query's place scores as at no distance."""
    model, seen = flux.transformer, []
    ids = tiny.image_ids(4, 6, corner=(3, 5))

    class Look(IsolationRepositionAttnProcessor):
        def attend(self, call, phase):
            places = torch.cartesian_prod(torch.arange(4), torch.arange(6)).double()
            own = call.k[:, call.layout.grid]
            seen.append((call.keys_at(call.picture, places), own, call))
            return super().attend(call, phase)

    with installed(model, Look(panels=(PANEL,))):
        flux_rows(model, ids, 1)
    assert len(seen) == 2
    for ours, own, _ in seen:
        torch.testing.assert_close(ours, own, atol=CLOSE, rtol=0)
    call = seen[0][2]
    x = call.picture[:, :1]
    half = call.keys_at(x, torch.tensor([[1.5, 2.25]]))
    same_place = call._joint.rotate(call.to_q(x), call._joint.rotary_at(torch.tensor([[1.5, 2.25]])))
    torch.testing.assert_close((same_place * half).sum(-1), (call.to_q(x) * call.to_k(x)).sum(-1), atol=CLOSE, rtol=0)
    # one offset for queries and keys changes no score
    shifted = call._joint.rotate(call.to_q(x), call._joint.rotary_at(torch.tensor([[3.5, 1.25]])))
    other = call.keys_at(call.picture[:, 1:2], torch.tensor([[4.0, 4.0]]))
    base = call._joint.rotate(call.to_q(x), call._joint.rotary_at(torch.tensor([[1.5, 2.25]])))
    other_base = call.keys_at(call.picture[:, 1:2], torch.tensor([[2.0, 5.0]]))
    torch.testing.assert_close((shifted * other).sum(-1), (base * other_base).sum(-1), atol=CLOSE, rtol=0)


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_isolation_of_joint_layers_keeps_text_and_background_open(family, request):
    """In the first joint layer the cat's tokens do not change with the dog's."""
    pipe = request.getfixturevalue(family)
    model = pipe.transformer
    first = "^transformer_blocks.0.attn$"
    attn = model.transformer_blocks[0].attn
    seen = []
    hook = attn.register_forward_hook(lambda _, args, out: seen.append(out[0][0]))
    if family == "flux":
        sample, ids = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0)), tiny.image_ids(4, 6)
    else:
        sample, ids = noise(1, (4, 6)), None
    panel = (Place(subject="cat", box=(0, 0, 0.33, 1)), Place(subject="dog", box=(0.67, 0, 1, 1)))

    def call() -> None:
        with torch.no_grad():
            text = torch.ones(1, 5, model.config.joint_attention_dim)
            pooled = torch.ones(1, model.config.pooled_projection_dim)
            common = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": torch.tensor([0.5])}
            more = {"img_ids": ids, "txt_ids": torch.zeros(5, 3)} if family == "flux" else {}
            model(hidden_states=sample, **common, **more)

    with installed(model, replace(ALONE, panels=(panel,)), layers=first):
        call()
        changed = sample.view(1, 4, 6, 16)[:, :, 4:] if family == "flux" else sample[:, :, :, 4:]
        changed += 1
        call()
    hook.remove()
    before, after = (one.unflatten(0, (4, 6)) for one in seen)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2:4], after[:, 2:4])


# -- bank ----------------------------------------------------------------------------------------------------------------


def recorded(pipe: Any, method: IsolationRepositionAttnProcessor, bank: Bank, prompts: list[str]) -> None:
    recorder = replace(method, panels=(), source="record")
    with installed(pipe, recorder) as handle:
        recorder.cast(handle.parts[0][0]).bank = bank
        pictures(pipe, prompts)


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "sd3"])
def test_a_bank_equals_rows(family, request):
    pipe = request.getfixturevalue(family)
    with installed(pipe, TWO):
        want = pictures(pipe, PROMPTS)[2:]
    bank = Bank()
    recorded(pipe, TWO, bank, PROMPTS[:2])
    method = replace(TWO, source="bank")
    generator = [torch.Generator().manual_seed(2)]
    with installed(pipe, method) as handle:
        method.cast(handle.parts[0][0]).bank = bank
        got = tiny.run(pipe, prompt=PROMPTS[2:], generator=generator)
        assert f"bank: {bank.held:,} bytes held, no limit, 0 times" in str(handle.report())
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)  # latents of several steps, with guidance


def test_a_full_bank_says_so(sd):
    with pytest.raises(MemoryError, match="bank of references would hold .* 1,000 are allowed"):
        recorded(sd, TWO, Bank(limit=1000), PROMPTS[:2])


def test_a_bank_of_other_steps_is_missed_and_counted(sd):
    bank = Bank()
    recorded(sd, TWO, bank, PROMPTS[:2])
    method = replace(TWO, source="bank")
    with installed(sd, method) as handle:
        method.cast(handle.parts[0][0]).bank = bank
        tiny.run(sd, prompt=PROMPTS[2:], num_inference_steps=3)
    assert bank.missing == 7  # the third step, in every layer


def test_a_bank_is_needed(unet):
    with installed(unet, replace(TWO, source="bank")), pytest.raises(RuntimeError, match="needs a bank"):
        denoise(unet, noise(2))


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


# -- bad input and edge cases --------------------------------------------------------------------------------------------


def test_a_subject_that_is_nowhere_is_told_once_counted_and_left_out(unet):
    outside = (Place(subject="cat", box=(1.2, 0.0, 1.5, 1.0)), Place(subject="dog", box=RIGHT))
    method = replace(ALONE, panels=(outside,))
    with installed(unet, method) as handle:
        with pytest.warns(UserWarning, match="'cat' in panel 1 was not found: its box .* is outside the picture"):
            got = denoise(unet, noise(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            denoise(unet, noise(1), t=400)
        assert "not found: 'cat' in panel 1" in str(handle.report())
    torch.testing.assert_close(got, denoise(unet, noise(1)), atol=CLOSE, rtol=0)
    with installed(unet, replace(method, strict=True)), pytest.raises(ValueError, match="give a box or mask"):
        denoise(unet, noise(1))


def test_an_empty_mask_and_an_empty_reference_are_not_found(unet):
    empty = pack_mask(torch.zeros(4, 4, dtype=torch.bool))
    method = replace(TWO, references=(Place(subject="cat", mask=empty), REFERENCES[1]))
    sample = noise(3)
    with pytest.warns(
        UserWarning, match="'cat' in reference 1 was not found: its mask is empty; this reference is left"
    ):
        got = rows_of(method, unet, sample)
    only_dog = rows_of(replace(TWO, references=REFERENCES[1:]), unet, sample[1:])
    torch.testing.assert_close(got[2], only_dog[1], atol=CLOSE, rtol=0)


def test_a_box_is_clipped_to_the_picture(unet):
    wide = (Place(subject="cat", box=(-0.5, -1.0, 0.5, 2.0)), PANEL[1])
    sample = noise(1)
    assert torch.equal(rows_of(replace(ALONE, panels=(wide,)), unet, sample), rows_of(ALONE, unet, sample))


def test_masks_do_what_boxes_do(unet):
    left = torch.zeros(32, 32, dtype=torch.bool)
    left[:, :16] = True
    masks = (Place(subject="cat", mask=pack_mask(left)), Place(subject="dog", mask=pack_mask(~left)))
    sample = noise(3)
    torch.testing.assert_close(
        rows_of(replace(TWO, panels=(masks,)), unet, sample), rows_of(TWO, unet, sample), atol=CLOSE, rtol=0
    )


def test_more_subjects_than_references_and_more_references_than_subjects(unet):
    sample = noise(3)
    only_cat = replace(TWO, references=REFERENCES[:1])  # the dog is only kept apart
    assert not torch.equal(rows_of(only_cat, unet, sample[[0, 2]])[1], rows_of(TWO, unet, sample)[2])
    one_panel = replace(TWO, panels=(PANEL[:1],))  # the dog's reference is not used
    both = rows_of(one_panel, unet, sample)[2]
    torch.testing.assert_close(
        both, rows_of(replace(one_panel, references=REFERENCES[:1]), unet, sample[[0, 2]])[1], atol=CLOSE, rtol=0
    )


def test_two_equal_references_weigh_as_one(unet):
    sample = noise(1)[[0, 0, 0]]
    twice = replace(TWO, references=(REFERENCES[0], REFERENCES[0]))
    once = rows_of(replace(TWO, references=REFERENCES[:1]), unet, sample[:2])
    torch.testing.assert_close(rows_of(twice, unet, sample)[2], once[1], atol=CLOSE, rtol=0)


def test_a_subject_that_fills_the_picture_is_not_kept_from_anything_but_reads(unet):
    whole = ((Place(subject="cat", box=(0, 0, 1, 1)),),)
    sample = noise(2)
    isolated = rows_of(IsolationRepositionAttnProcessor(panels=whole), unet, sample)
    torch.testing.assert_close(isolated, denoise(unet, sample), atol=CLOSE, rtol=0)
    referred = rows_of(IsolationRepositionAttnProcessor(panels=whole, references=REFERENCES[:1]), unet, sample)
    assert not torch.allclose(referred[1], isolated[1], atol=CLOSE)


BAD = {
    "strength is a share": {"strength": 1.5},
    "isolate is a window": {"isolate": (0.5, 0.5)},
    "refer is a window": {"refer": (0.2, 1.1)},
    "warmup is a share": {"warmup": 0.0},
    "no regular expression": {"reference_layers": "("},
    "leave the panels": {"source": "record", "panels": (PANEL,), "references": REFERENCES},
    "has no subject": {"panels": ((Place(subject="", box=LEFT),),)},
    "has no place": {"panels": ((Place(subject="cat"),),)},
    "is twice in panel 1": {"panels": ((PANEL[0], PANEL[0]),)},
    "needs the name": {"references": (Place(subject=""),)},
    "cannot tell them": {"panels": ((Place(subject="one", words=(2,)), Place(subject="two", words=(2, 3))),)},
    "at most 62 subjects": {"panels": (tuple(Place(subject=str(i), box=LEFT) for i in range(63)),)},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_settings_are_one_sentence(words):
    with pytest.raises(ValueError, match=words):
        IsolationRepositionAttnProcessor(**BAD[words])


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("no numbers", {"box": (0, 0, float("nan"), 1)}),
        ("turned around", {"box": (0.5, 0, 0.2, 1)}),
        ("packed mask", {"mask": "x"}),
        ("places from 0 on", {"words": (-1,)}),
    ],
)
def test_bad_places_are_one_sentence(words, place):
    with pytest.raises(ValueError, match=words):
        Place(subject="cat", **place)


def test_it_does_not_share_layers_with_another_attention(unet):
    with pytest.raises(ValueError, match="wanted by both"):
        install(unet, [TWO, AgentAttnProcessor()])
