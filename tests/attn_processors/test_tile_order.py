"""A model whose tokens are in tile order computes what it computes in raster order, and only does so where nobody minds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_dits
import torch
from tiny import denoise_flux, image_ids
from torch import Tensor, nn

from reattend.attn_processors import AttnMethod, install, installed
from reattend.attn_processors.context import context_of

EXACT = 1e-5  # same operations in another order, fp32, through a few blocks
SIZES = [(16, 32), (9, 20)]  # whole tiles; short ones
FLEX = {"radius": 3, "backend": "flex"}
TOKENS = 32  # channels of tokens inside the tiny models

pytestmark = pytest.mark.usefixtures("flex_without_compiler")


class InRaster(AttnMethod):
    """Plain softmax whose layers want raster order."""

    name = "in-raster"
    roles = ("joint",)

    def attend(self, call: Any, phase: int) -> Tensor:
        assert call.layout.order == "raster"
        return call.softmax(call.q, call.k, call.v, mask=call.mask).flatten(2)


def seen_orders(model: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    """What a call gives, and in which order the layers had its tokens."""
    orders: list[str] = []
    swaps = [swap for item in context_of(model).installations for swap in item.swaps]
    attends = [swap.ours.method for swap in swaps]
    with pytest.MonkeyPatch.context() as patch:
        for cls in {type(method) for method in attends}:
            real = cls.attend

            def attend(self: Any, call: Any, phase: int, real: Any = real) -> Tensor:
                orders.append(call.layout.order)
                return real(self, call, phase)

            patch.setattr(cls, "attend", attend)
        return call(), orders


def residuals(size: tuple[int, int], count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(1, size[0] * size[1], TOKENS, generator=draw) for _ in range(count)]


def sd3_call(size: tuple[int, int], **extra: Any) -> Callable[[nn.Module], Tensor]:
    def call(model: nn.Module) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        width = model.config.joint_attention_dim
        with torch.no_grad():
            return model(
                hidden_states=torch.randn(1, 4, *size, generator=draw),
                encoder_hidden_states=torch.randn(1, 7, width, generator=draw),
                pooled_projections=torch.randn(1, width, generator=draw),
                timestep=torch.full((1,), 500.0),
                **extra,
            ).sample

    return call


def calls(family: str, size: tuple[int, int]) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model, and a call of it with all that can go along with the tokens."""
    if family == "FLUX":
        ids = torch.cat([image_ids(*size), image_ids(4, 5, picture=1)])
        return copy.deepcopy(tiny.flux_pipeline().transformer), lambda model: denoise_flux(model, ids)
    if family == "FLUX, ControlNet":
        more = {"controlnet_block_samples": residuals(size, 1), "controlnet_single_block_samples": residuals(size, 1)}
        model = copy.deepcopy(tiny.flux_pipeline().transformer)
        return model, lambda model: denoise_flux(model, image_ids(*size), text=128, **more)
    if family == "FLUX.2":
        model = copy.deepcopy(tiny_dits.flux2())
        return model, lambda model: tiny_dits.denoise_flux2(model, size, reference=(4, 5))
    if family == "Qwen-Image":
        model = copy.deepcopy(tiny_dits.qwenimage())
        return model, lambda model: tiny_dits.denoise_qwenimage(model, size, reference=(4, 5))
    if family == "Qwen-Image, ControlNet":
        more = {"controlnet_block_samples": residuals(size, 2)}
        return copy.deepcopy(tiny_dits.qwenimage()), lambda model: tiny_dits.denoise_qwenimage(model, size, **more)
    more = {"block_controlnet_hidden_states": residuals(size, 1)} if "ControlNet" in family else {}
    return copy.deepcopy(tiny.sd3_pipeline().transformer), sd3_call(size, **more)


FAMILIES = (
    "FLUX", "FLUX, ControlNet", "FLUX.2", "Qwen-Image", "Qwen-Image, ControlNet", "Stable Diffusion 3",
    "Stable Diffusion 3, ControlNet",
)  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_tile_order_gives_what_it_gives_in_raster_order(family, size):
    model, call = calls(family, size)
    stock = call(model)
    with installed(model, "clear", radius=3, backend="reference"):
        want, orders = seen_orders(model, lambda: call(model))
        assert set(orders) == {"raster"}
    with installed(model, "clear", **FLEX):
        got, orders = seen_orders(model, lambda: call(model))
        assert set(orders) == {"tile"}
    torch.testing.assert_close(got, want, atol=EXACT * max(1.0, float(want.abs().max())), rtol=0)
    assert (want - stock).abs().max() > 100 * EXACT  # else it would show nothing
    assert torch.equal(call(model), stock)


def test_sizes_may_alternate_and_stock_layers_do_not_mind():
    model = copy.deepcopy(tiny.flux_pipeline().transformer)
    with installed(model, "clear", radius=3, backend="reference", layers="^single"):
        want = {size: denoise_flux(model, image_ids(*size)) for size in SIZES}
    with installed(model, "clear", layers="^single", **FLEX):
        for size in [*SIZES, *SIZES]:
            got, orders = seen_orders(model, lambda size=size: denoise_flux(model, image_ids(*size)))
            assert set(orders) == {"tile"}
            torch.testing.assert_close(got, want[size], atol=EXACT, rtol=0)


def test_dense_steps_and_other_backends_may_be_among_the_layers():
    model = copy.deepcopy(tiny.flux_pipeline().transformer)

    def made(backend: str, **settings: Any) -> Tensor:
        with (
            installed(model, "clear", radius=3, backend=backend, layers="^single", **settings),
            installed(model, "clear", radius=4, pool=2, backend="halo", layers="^transformer"),
        ):
            got, orders = seen_orders(model, lambda: denoise_flux(model, image_ids(9, 20)))
            assert set(orders) == {"tile" if backend == "flex" else "raster"}
            return got

    for settings in ({}, {"start": 0.9}):  # the call is at 0.5: dense
        torch.testing.assert_close(made("flex", **settings), made("reference", **settings), atol=EXACT, rtol=0)


def test_layers_that_want_raster_order_get_it():
    model = copy.deepcopy(tiny.flux_pipeline().transformer)
    with installed(model, "clear", layers="^single", **FLEX):
        want, orders = seen_orders(model, lambda: denoise_flux(model, image_ids(9, 20)))
        assert set(orders) == {"tile"}
        with installed(model, InRaster(), layers="^transformer"):
            got, orders = seen_orders(model, lambda: denoise_flux(model, image_ids(9, 20)))
            assert set(orders) == {"raster"}
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_neutral_layers_keep_raster_order_as_a_teacher_has_it():
    model = copy.deepcopy(tiny.flux_pipeline().transformer)
    want = denoise_flux(model, image_ids(9, 20))
    handle = install(model, "clear", **FLEX)
    for _, item in handle.parts:
        for swap in item.swaps:
            swap.ours.neutral = True
    assert torch.equal(denoise_flux(model, image_ids(9, 20)), want)
    assert context_of(model).order == "raster"


def test_with_gradients_tokens_stay_in_raster_order():
    model = copy.deepcopy(tiny.flux_pipeline().transformer)
    ids = image_ids(9, 20)
    call = {
        "hidden_states": torch.randn(1, len(ids), 16, requires_grad=True), "encoder_hidden_states": torch.randn(1, 7, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.full((1,), 0.5), "img_ids": ids,
        "txt_ids": torch.zeros(7, 3),
    }  # fmt: skip
    with installed(model, "clear", **FLEX):
        context = context_of(model)
        with pytest.raises(ValueError, match="no gradient"):
            model(**call)
    assert context.order == "raster"


def test_a_copy_has_an_order_of_its_own_and_removal_leaves_no_hook():
    model = copy.deepcopy(tiny.flux_pipeline().transformer)
    stock = denoise_flux(model, image_ids(9, 20))
    handle = install(model, "clear", **FLEX)
    want = denoise_flux(model, image_ids(9, 20))
    other = copy.deepcopy(model)
    handle.remove()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.equal(denoise_flux(model, image_ids(9, 20)), stock)
    got, orders = seen_orders(other, lambda: denoise_flux(other, image_ids(9, 20)))
    assert set(orders) == {"tile"} and torch.equal(got, want)
    assert context_of(other) is not None and context_of(model) is None


def test_tokens_that_lie_as_the_kernel_wants_are_not_gathered(monkeypatch):
    from reattend.attn_processors.ops import flex

    gathered: list[bool] = []
    real = flex._gathered
    monkeypatch.setattr(flex, "_gathered", lambda x, i: (gathered.append(i is not None), real(x, i))[1])
    model = copy.deepcopy(tiny.flux_pipeline().transformer)
    with installed(model, "clear", **FLEX):
        denoise_flux(model, image_ids(16, 32), text=128)
        assert gathered and not any(gathered)
        gathered.clear()
        denoise_flux(model, image_ids(16, 32), text=7)  # no whole block of text
        assert gathered == [False, True, True, False] * (len(gathered) // 4)
