"""CLEAR on stock models: equal to stock where the radius covers the grid, local where it does not, whatever computes it."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tiny import denoise_flux, image_ids

from reattend.attn_processors import AttnMethod, ClearAttnProcessor, install, installed

EXACT = 1e-5  # same operations in another order, fp32, through a few blocks
ALL = 1000.0  # a radius that covers every grid here


def ours(model, size: tuple[int, int], text: int = 7, batch: int = 1, **settings) -> torch.Tensor:
    with installed(model, "clear", **settings):
        return denoise_flux(model, image_ids(*size), text, batch)


@pytest.mark.parametrize("name", ["flux", "sd3", "sd", "sdxl"])
@pytest.mark.parametrize("settings", [{}, {"pattern": "tile"}, {"pattern": "square"}], ids=str)
def test_a_radius_that_covers_the_grid_is_stock_and_removal_is_exact(name, settings, request):
    pipe = request.getfixturevalue(name)
    want = tiny.run(pipe, height=32, width=48)
    with installed(pipe, "clear", radius=ALL, **settings):
        got = tiny.run(pipe, height=32, width=48)
    scale = max(1.0, float(want.abs().max()))
    torch.testing.assert_close(got, want, atol=10 * EXACT * scale, rtol=0)
    assert torch.equal(tiny.run(pipe, height=32, width=48), want)


@pytest.mark.parametrize("name", ["flux", "sd3", "sd"])
def test_a_small_radius_changes_the_picture(name, request):
    pipe = request.getfixturevalue(name)
    want = tiny.run(pipe, height=32, width=48)
    with installed(pipe, ClearAttnProcessor(radius=2)):
        assert (tiny.run(pipe, height=32, width=48) - want).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {"radius": 2.5},
        {"radius": 3, "pool": 2},
        {"radius": 3, "pool": 2, "pool_budget": 4},
        {"radius": 2, "pattern": "square"},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [0, 7])
def test_backends_agree_through_the_model(flux, settings, text):
    model = flux.transformer
    want = ours(model, (9, 14), text, backend="reference", **settings)
    torch.testing.assert_close(ours(model, (9, 14), text, backend="halo", **settings), want, atol=EXACT, rtol=0)
    torch.testing.assert_close(ours(model, (9, 14), text, **settings), want, atol=EXACT, rtol=0)


def test_tile_windows_agree_through_the_model(flux):
    settings = {"pattern": "tile", "tile": (4, 4), "radius": 2}
    want = ours(flux.transformer, (9, 14), backend="reference", **settings)
    torch.testing.assert_close(ours(flux.transformer, (9, 14), backend="tile", **settings), want, atol=EXACT, rtol=0)


def test_sizes_may_alternate_in_one_process(flux):
    model = flux.transformer
    alone = {size: ours(model, size, radius=3, backend="halo") for size in [(9, 14), (6, 6), (1, 5)]}
    with installed(model, "clear", radius=3, backend="halo"):
        for size in [(9, 14), (6, 6), (9, 14), (1, 5), (6, 6)]:
            assert torch.equal(denoise_flux(model, image_ids(*size)), alone[size])


def test_a_far_pixel_does_not_reach_one_layer(flux):
    """One double block: tokens beyond the radius see neither each other nor, in the first layer, each other's text."""
    block = flux.transformer.transformer_blocks[0].attn
    x = torch.randn(1, 96, 32, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 0] += 1
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    with installed(flux.transformer, "clear", radius=3, backend="halo"), torch.no_grad():
        denoise_flux(flux.transformer, image_ids(8, 12))
        before, after = block(x, text)[0], block(changed, text)[0]
    moved = (before - after).abs().amax(-1).view(8, 12) > 0
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(12), indexing="ij")
    assert torch.equal(moved, rows**2 + columns**2 < 9)


def test_layers_may_have_radii_of_their_own(flux):
    model, size = flux.transformer, (9, 14)
    only_single = ClearAttnProcessor(radius=ALL, radii=(("^single", 2.0),))
    with installed(model, only_single):
        got = denoise_flux(model, image_ids(*size))
    with installed(model, "clear", radius=2, layers="^single"):
        want = denoise_flux(model, image_ids(*size))
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)


def test_dense_steps_come_before_start_and_after_until(flux):
    method = ClearAttnProcessor(start=0.25, until=0.75)
    assert [method.phase(step / 8) for step in range(8)] == [1, 1, 0, 0, 0, 0, 1, 1]
    assert ClearAttnProcessor(start=0.25).phase(1 - 1e-6) == 0
    want = tiny.run(flux, height=32, width=48)
    with installed(flux, "clear", radius=2, start=0.6):  # neither of the two steps begins after 0.6
        got = tiny.run(flux, height=32, width=48)
    torch.testing.assert_close(got, want, atol=10 * EXACT, rtol=0)
    with installed(flux, "clear", radius=2, start=0.5):
        assert (tiny.run(flux, height=32, width=48) - want).abs().max() > 1e-3


def test_padded_text_is_hidden_from_all(flux):
    model, ids = flux.transformer, image_ids(6, 9)
    mask = torch.ones(1, 1, 1, 7 + 54, dtype=torch.bool)
    mask[..., 4:7] = False
    extra = {"joint_attention_kwargs": {"attention_mask": mask}}
    plain = denoise_flux(model, ids, **extra)
    for backend in ("auto", "halo"):
        with installed(model, "clear", radius=ALL, backend=backend):
            torch.testing.assert_close(denoise_flux(model, ids, **extra), plain, atol=EXACT, rtol=0)


def test_gradients_reach_the_input_like_those_of_the_reference(flux):
    block = flux.transformer.single_transformer_blocks[0].attn
    grads = []
    for backend in ("reference", "halo"):
        with installed(flux.transformer, "clear", radius=3, backend=backend):
            denoise_flux(flux.transformer, image_ids(8, 12))
            x = torch.randn(2, 103, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
            block(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4, rtol=1e-4)


def test_the_report_tells_gain_and_its_absence(flux):
    handle = install(flux, "clear", radius=3)
    assert "64 x 64" in str(handle.report()) and "times fewer operations" in str(handle.report())
    tiny.run(flux, height=32, width=48)
    assert "8 x 12 and 512 text tokens: no gain at this size" in str(handle.report())
    assert handle.report().outlook


def test_explicit_backends_are_never_replaced(flux):
    with installed(flux, "clear", backend="tile"), pytest.raises(ValueError, match="'tile'"):
        tiny.run(flux, height=32, width=48)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"radius": 0.5}, "radius"),
        ({"pattern": "square", "radius": 2.5}, "whole radius"),
        ({"pattern": "disk"}, "disc"),
        ({"start": 0.5, "until": 0.5}, "start < until"),
        ({"pool": 0}, "pool"),
        ({"radii": (("(", 2.0),)}, "regular expression"),
        ({"scale": -1.0}, "scale"),
        ({"trained": (0, 64, 512)}, "trained"),
        ({"tile": (0, 4), "pattern": "tile"}, "tile"),
    ],
    ids=str,
)
def test_bad_settings_are_told_in_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        ClearAttnProcessor(**settings)


def test_settings_survive_json_and_words():
    method = ClearAttnProcessor(radius=8, pool=4, radii=(("^single", 4.0),), scale="visible")
    assert ClearAttnProcessor.from_settings(method.settings()) == method
    assert ClearAttnProcessor.from_settings({"radius": "8", "pool": "4", "scale": "1.1"}).scale == 1.1
    assert isinstance(method, AttnMethod)


@pytest.mark.parametrize("settings", [{"radius": 3, "backend": "halo"}, {"radius": 3, "pool": 2}], ids=str)
def test_regional_compile_is_one_graph_per_kind_of_block(flux, settings):
    model, graphs = flux.transformer, []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    install(model, "clear", **settings)
    want = denoise_flux(model, image_ids(8, 12))
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=counting)
    for _ in range(2):
        torch.testing.assert_close(denoise_flux(model, image_ids(8, 12)), want, atol=EXACT, rtol=0)
    assert len(graphs) == 2  # a double and a single block


def test_what_a_size_needs_is_made_once_and_again_for_other_settings(flux):
    model = flux.transformer
    handle, block = install(model, "clear", radius=3, layers="^single"), model.single_transformer_blocks[0].attn
    denoise_flux(model, image_ids(8, 12))
    (first,) = block.processor.kept.values()
    denoise_flux(model, image_ids(8, 12))
    assert list(block.processor.kept.values()) == [first]
    assert not copy.deepcopy(model).single_transformer_blocks[0].attn.processor.kept
    other = install(model, "clear", radius=2, layers="^transformer")  # keeps the context alive
    handle.remove()
    install(model, "clear", radius=5, layers="^single")
    denoise_flux(model, image_ids(8, 12))
    (second,) = block.processor.kept.values()
    assert second is not first and second.prepared.pattern.radius == 5
    other.remove()


def test_flex_refuses_gradients_on_a_cpu_in_a_sentence(flux):
    block = flux.transformer.single_transformer_blocks[0].attn
    with installed(flux.transformer, "clear", radius=3, backend="flex", layers="^single"):
        context = next(iter(flux.transformer._forward_pre_hooks.values()))
        context.grids, context.text = {96: (8, 12)}, 7
        with pytest.raises(ValueError, match="no gradient"):
            block(torch.randn(1, 103, 32, requires_grad=True))
