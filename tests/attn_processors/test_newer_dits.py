"""What we know about FLUX.2, Qwen-Image and Z-Image: the right layers, the right order of tokens, stock results."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny_dits as tiny
import torch
from small_methods import Exact
from torch import Tensor

from reattend.attn_processors import LayerCall, LayoutError, UnsupportedModel, install, installed
from reattend.attn_processors.families.flux import raster

EXACT = 1e-5  # same operations in another order, fp32, through two or three blocks

MODELS = {
    "flux2": (tiny.flux2, tiny.denoise_flux2),
    "qwenimage": (tiny.qwenimage, tiny.denoise_qwenimage),
    "z_image": (tiny.z_image, tiny.denoise_z_image),
}


@dataclass(frozen=True, kw_only=True)
class Looking(Exact):
    """Stock attention by our path that keeps the layout of every call."""

    roles: ClassVar[tuple[str, ...]] = ("spatial", "joint")

    def attend(self, call: LayerCall, phase: int) -> Tensor:
        call.context.slots.setdefault("layouts", {})[call.name] = call.layout
        return super().attend(call, phase)


@pytest.fixture(params=MODELS)
def named(request) -> tuple[str, Any, Any]:
    build, denoise = MODELS[request.param]
    return request.param, copy.deepcopy(build()), denoise


def layouts_of(model) -> dict[str, tuple[int, int, int, int]]:
    held = next(iter(model._forward_pre_hooks.values())).slots["layouts"]
    return {name: (*layout.shape, layout.before, layout.after) for name, layout in held.items()}


@pytest.mark.parametrize("size", [(8, 8), (6, 9), (1, 5)], ids=str)
@pytest.mark.parametrize(("text", "batch"), [(7, 1), (33, 2)])
def test_our_path_equals_stock_on_any_grid_and_text(named, size, text, batch):
    name, model, denoise = named
    want = denoise(model, size, text, batch)
    with installed(model, Looking()) as handle:
        got = denoise(model, size, text, batch)
        seen = layouts_of(model)
    tokens = size[0] * size[1]
    if name == "z_image":
        filling, words = -tokens % 32, text + -text % 32
        assert seen.pop("noise_refiner.0.attention") == (*size, 0, filling)
        assert set(seen.values()) == {(*size, 0, filling + words)}
    else:
        assert set(seen.values()) == {(*size, text, 0)}
    assert len(handle.report().layers) == {"flux2": 2, "qwenimage": 2, "z_image": 3}[name]
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)
    assert torch.equal(denoise(model, size, text, batch), want)


def test_clear_is_stock_where_it_covers_the_picture_and_local_where_not(named):
    _, model, denoise = named
    want = denoise(model, (6, 9), batch=2)
    local = []
    with installed(model, "clear", radius=12):
        torch.testing.assert_close(denoise(model, (6, 9), batch=2), want, atol=EXACT, rtol=0)
    for backend in ("reference", "halo"):
        with installed(model, "clear", radius=2.5, backend=backend):
            local.append(denoise(model, (6, 9), batch=2))
    assert (local[0] - want).abs().max() > 100 * EXACT
    torch.testing.assert_close(local[1], local[0], atol=EXACT, rtol=0)
    assert torch.equal(denoise(model, (6, 9), batch=2), want)


def test_neutral_settings_take_the_stock_path(named):
    @dataclass(frozen=True, kw_only=True)
    class Neutral(Looking):
        neutral: ClassVar[bool] = True

    _, model, denoise = named
    want = denoise(model, (5, 7))
    with installed(model, Neutral()):
        assert torch.equal(denoise(model, (5, 7)), want)


def test_tokens_can_be_rotated_as_if_they_lay_elsewhere(named):
    """Places of the sequence give the very queries of the layer, and rows and columns of the picture its keys."""
    name, model, denoise = named
    looked_at = []

    @dataclass(frozen=True, kw_only=True)
    class Placing(Looking):
        def attend(self, call: LayerCall, phase: int) -> Tensor:
            places = torch.arange(call.layout.tokens).flip(0)[:20]
            torch.testing.assert_close(
                call.rotated(call.unrotated_q[:, places], places), call.q[:, places], atol=EXACT, rtol=0
            )
            if name == "z_image":
                with pytest.raises(UnsupportedModel, match="behind its caption"):
                    call.keys_at(call.picture, call.layout.coordinates())
            else:
                keys = call.keys_at(call.picture, call.layout.coordinates().float())
                torch.testing.assert_close(keys, call.k[:, call.layout.grid], atol=EXACT, rtol=0)
                between = call.keys_at(call.picture, call.layout.coordinates().float() + 0.25)
                assert not torch.allclose(between, keys)
            looked_at.append(call.name)
            return super().attend(call, phase)

    with installed(model, Placing()):
        denoise(model, (5, 8), batch=2)
    assert len(looked_at) == {"flux2": 2, "qwenimage": 2, "z_image": 3}[name]


@pytest.mark.parametrize("size", [(6, 9), (2, 3)], ids=str)
def test_agents_of_joint_layers_run_on_all_of_them(named, size):
    _, model, denoise = named
    want = denoise(model, size, batch=2)
    with installed(model, "agent-joint", agents=2):
        got = denoise(model, size, batch=2)
    assert got.isfinite().all() and not torch.allclose(got, want)
    assert torch.equal(denoise(model, size, batch=2), want)


@pytest.mark.parametrize("method", [Looking(), "clear"], ids=["exact", "clear"])
def test_padded_text_of_qwen_image_is_hidden(method):
    model = copy.deepcopy(tiny.qwenimage())
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 4:] = 0
    mask[1, 2:5] = 0  # the model takes holes, too
    want = tiny.denoise_qwenimage(model, (6, 9), 11, 2, encoder_hidden_states_mask=mask)
    assert not torch.allclose(want, tiny.denoise_qwenimage(model, (6, 9), 11, 2))
    with installed(model, method):
        got = tiny.denoise_qwenimage(model, (6, 9), 11, 2, encoder_hidden_states_mask=mask)
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


@pytest.mark.parametrize("method", [Looking(), "clear"], ids=["exact", "clear"])
def test_captions_of_different_length_in_one_call_of_z_image(method):
    model = copy.deepcopy(tiny.z_image())
    want = tiny.denoise_z_image(model, (6, 9), (5, 70, 33))
    with installed(model, method):
        got = tiny.denoise_z_image(model, (6, 9), (5, 70, 33))
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)
    alone = tiny.denoise_z_image(model, (6, 9), (5,))  # the first row's own inputs, where nothing has to be hidden
    torch.testing.assert_close(want[:1], alone, atol=EXACT, rtol=0)


@pytest.mark.parametrize("name", ["flux2", "qwenimage"])
def test_reference_pictures_are_global_tokens(name):
    build, denoise = MODELS[name]
    model = copy.deepcopy(build())
    want = denoise(model, (6, 9), reference=(4, 5))
    with installed(model, Looking()):
        got = denoise(model, (6, 9), reference=(4, 5))
        assert set(layouts_of(model).values()) == {(6, 9, 7, 20)}
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_a_mask_reaches_both_kinds_of_blocks_of_flux2():
    model = copy.deepcopy(tiny.flux2())
    mask = torch.ones(1, 1, 1, 7 + 20, dtype=torch.bool)
    mask[..., 4:7] = False
    extra = {"joint_attention_kwargs": {"attention_mask": mask}}
    want = tiny.denoise_flux2(model, (4, 5), **extra)
    assert not torch.allclose(want, tiny.denoise_flux2(model, (4, 5)))
    with installed(model, Looking()):
        got = tiny.denoise_flux2(model, (4, 5), **extra)
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_a_raster_of_four_columns_is_read_or_refused():
    ids = torch.nn.functional.pad(tiny.image_ids(6, 9), (0, 1))
    assert raster(ids) == (6, 9)
    ids[3, 3] = 1
    assert raster(ids) is None


@pytest.mark.parametrize("steps", [5])
def test_pipelines_equal_stock_and_know_their_step(named, steps):
    @dataclass(frozen=True, kw_only=True)
    class Steps(Looking):
        def prepare(self, context: Any) -> None:
            context.slots.setdefault("seen", []).append((context.progress(), context.step()))

    name, model, _ = named
    pipe = tiny.pipeline(model)
    want = tiny.run(pipe, steps)
    with installed(pipe, Steps()):
        got = tiny.run(pipe, steps)
        seen = next(iter(model._forward_pre_hooks.values())).slots["seen"]
    calls = 2 if name == "qwenimage" else 1  # with and without the prompt; Z-Image makes one call of both
    assert [step for _, step in seen] == [i for i in range(steps) for _ in range(calls)]
    assert seen[0][0] == 0 and seen[-1][0] == pytest.approx(1 - 1 / steps)
    torch.testing.assert_close(got, want, atol=10 * EXACT * float(want.abs().max()), rtol=0)
    assert torch.equal(tiny.run(pipe, steps), want)


def test_calls_without_one_grid_raise_or_run_stock():
    model = copy.deepcopy(tiny.z_image())
    draw = torch.Generator().manual_seed(0)
    pictures = [torch.randn(4, 1, 8, width, generator=draw) for width in (8, 12)]
    captions = [torch.randn(5, 32, generator=draw) for _ in pictures]

    def call() -> list[Tensor]:
        with torch.no_grad():
            return model(pictures, torch.full((2,), 0.5), captions).sample

    want = call()
    with installed(model, Looking()), pytest.raises(LayoutError, match="one picture of one size"):
        call()
    with installed(model, Looking(on_mismatch="stock")), pytest.warns(UserWarning, match="the stock layer runs"):
        assert all(torch.equal(a, b) for a, b in zip(call(), want, strict=True))
    layered = copy.deepcopy(tiny.qwenimage(use_layer3d_rope=True))
    with installed(layered, Looking()), pytest.raises(LayoutError, match="one picture of one size"):
        tiny.denoise_qwenimage(layered, (4, 4), reference=(4, 4))


def test_what_we_cannot_imitate_is_refused_by_name():
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor

    model = copy.deepcopy(tiny.flux2())
    with installed(model, Looking()), pytest.raises(ValueError, match="kv_cache_mode"):
        tiny.denoise_flux2(model, (4, 4), kv_cache_mode="extract")
    model.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn.*Flux2KVAttnProcessor.*plain Flux2"):
        install(model, Looking())
    for build, layer in ((tiny.qwenimage, "transformer_blocks.0.attn"), (tiny.z_image, "noise_refiner.0.attention")):
        model = copy.deepcopy(build())
        model.get_submodule(layer).set_processor(torch.nn.Identity())
        with pytest.raises(ValueError, match=rf"{layer}.*Identity"):
            install(model, Looking())


def test_blocks_of_one_kind_share_one_compiled_graph():
    model, graphs = copy.deepcopy(tiny.qwenimage()), []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    install(model, "clear", radius=2.5, backend="halo")
    want = tiny.denoise_qwenimage(model, (6, 9))
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=counting)
    torch.testing.assert_close(tiny.denoise_qwenimage(model, (6, 9)), want, atol=EXACT, rtol=0)
    assert len(graphs) == 1


def test_full_size_models_show_all_their_layers():
    from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel, ZImageTransformer2DModel

    def layers(cls: type) -> list[tuple[str, int, int]]:
        with torch.device("meta"):
            model = cls()
        return [(layer.name, layer.heads, layer.width) for layer in install(model, Looking()).report().layers]

    found = layers(Flux2Transformer2DModel)
    assert len(found) == 8 + 48 and {layer[1:] for layer in found} == {(48, 6144)}
    found = layers(QwenImageTransformer2DModel)
    assert len(found) == 60 and {layer[1:] for layer in found} == {(24, 3072)}
    found = layers(ZImageTransformer2DModel)
    assert len(found) == 2 + 30 and {layer[1:] for layer in found} == {(30, 3840)}
    assert not any("context_refiner" in name for name, *_ in found)
