"""What subjects read from their references: what repositioning does in each kind of model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from two_subjects import ALONE, CLOSE, LEFT, PANEL, RIGHT, TWO, flux_rows, noise, rows_of

from reattend.attn_processors import (
    IsolationRepositionAttnProcessor,
    Place,
    installed,
)  # fmt: skip

# -- what repositioning does ---------------------------------------------------------------------------------------------


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
