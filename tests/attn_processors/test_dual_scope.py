"""Dual-scope attention is the stock model up to the trained length, and the dense judge beyond it."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from small_methods import DenseScopes

from reattend.attn_processors import ATTN_PROCESSORS, BackendUnavailable, DualScopeAttnProcessor, install
from reattend.attn_processors.comm import Comm
from reattend.attn_processors.context import context_of
from reattend.attn_processors.dual_scope import ScopePhase
from reattend.attn_processors.ops.scopes import Clip

EXACT = 1e-5  # fp32, relative to the largest value: the same sums in another order
SETTINGS = {"window": 5, "anchors": 3, "train_frames": 8}


@pytest.fixture
def model():
    return copy.deepcopy(tiny.animatediff().unet)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=EXACT * float(want.abs().max()), rtol=0)


def test_up_to_the_window_it_is_the_stock_model_bit_for_bit(model):
    want = tiny.denoise_video(model, 8)
    handle = install(model, "dual-scope", train_frames=8)
    assert {layer.role for layer in handle.report().layers} == {"temporal"} and len(handle.report().layers) == 14
    assert torch.equal(tiny.denoise_video(model, 8), want)
    other = tiny.denoise_video(model, 9)
    handle.remove()
    assert torch.equal(tiny.denoise_video(model, 8), want)
    assert (tiny.denoise_video(model, 9) - other).abs().max() > 1e-3  # it did something
    for module in model.modules():
        assert "forward" not in vars(module)


@pytest.mark.parametrize("frames", [1, 5, 8])
def test_our_path_up_to_the_window_is_the_stock_model(model, frames):
    want = tiny.denoise_video(model, frames)
    install(model, "dual-scope", train_frames=8)
    context_of(model).clip = Clip(Comm(), ((0, frames),))  # a film in parts takes our path
    close(tiny.denoise_video(model, frames), want)


@pytest.mark.parametrize("t", [999, 10], ids=["anchors favoured", "nothing favoured"])
@pytest.mark.parametrize(
    ("frames", "settings"),
    [
        (9, {"train_frames": 8}),
        (16, SETTINGS),
        (16, {**SETTINGS, "phases": (ScopePhase(window=10.0),)}),
        (11, {"window": 1, "anchors": 4, "token_scale": "log"}),
        (11, {"window": 1, "anchors": 0, "token_scale": "log"}),  # each frame sees itself alone
        (7, {"window": 3, "anchors": 64, "token_scale": "sqrt_log"}),
        (33, {"window": 3, "anchors": 1, "phases": (ScopePhase(anchors=2.0),)}),
    ],
    ids=str,
)
def test_it_is_the_dense_judge_beyond_the_window(model, frames, settings, t):
    with_judge = copy.deepcopy(model)
    install(with_judge, DenseScopes(**settings))
    install(model, DualScopeAttnProcessor(**settings))
    close(tiny.denoise_video(model, frames, t), tiny.denoise_video(with_judge, frames, t))


def test_phases_follow_the_steps(model):
    install(model, DualScopeAttnProcessor(**SETTINGS))
    early, late = (tiny.denoise_video(model, 16, t) for t in (999, 10))
    plain = copy.deepcopy(tiny.animatediff().unet)
    install(plain, DualScopeAttnProcessor(**SETTINGS, phases=(ScopePhase(anchors=10.0),)))
    assert torch.equal(tiny.denoise_video(plain, 16, 999), early)
    assert (tiny.denoise_video(plain, 16, 10) - late).abs().max() > 1e-3


def test_it_combines_with_agent_attention_on_the_spatial_layers(animatediff):
    want = tiny.run(animatediff, num_frames=6, width=48)
    stock = animatediff.unet.attn_processors
    dual = DualScopeAttnProcessor(window=3, anchors=2)
    alone = install(animatediff, dual)
    one = tiny.run(animatediff, num_frames=6, width=48)
    alone.remove()
    handle = install(animatediff, [ATTN_PROCESSORS["agent"](ratio=0.4, levels=2), dual])
    both = tiny.run(animatediff, num_frames=6, width=48)
    assert both.isfinite().all() and (both - one).abs().max() > 1e-4 and (one - want).abs().max() > 1e-4
    handle.remove()
    assert animatediff.unet.attn_processors == stock
    assert torch.equal(tiny.run(animatediff, num_frames=6, width=48), want)


def test_a_copy_of_the_model_carries_its_own(model):
    install(model, DualScopeAttnProcessor(**SETTINGS))
    twin = copy.deepcopy(model)
    want = tiny.denoise_video(model, 16)
    assert torch.equal(tiny.denoise_video(twin, 16), want)
    tiny.denoise_video(model, 4)  # the stock path of the one
    assert torch.equal(tiny.denoise_video(twin, 16), want)


def test_half_precision_stays_close_to_single(model):
    install(model, DualScopeAttnProcessor(**SETTINGS))
    want = tiny.denoise_video(model, 16)
    got = tiny.denoise_video(model.bfloat16(), 16).float()
    assert (got - want).abs().max() < 0.1 * want.abs().max()  # 8 bits of mantissa through a whole UNet


def test_settings_survive_a_command_line():
    method = DualScopeAttnProcessor.from_settings({"window": "24", "anchors": "8", "token_scale": "log"})
    assert DualScopeAttnProcessor.from_settings(method.settings()) == method
    assert method.length == 24 and DualScopeAttnProcessor(train_frames=32).length == 32


def test_anchors_are_favoured_in_the_first_two_fifths_alone_unless_asked_otherwise():
    method = DualScopeAttnProcessor()
    favours = [method.schedule[method.phase(step / 10)] for step in range(10)]
    assert [now.anchors - now.window for now in favours] == [10] * 4 + [0] * 6


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"anchors": -1}, "anchors must not be negative"),
        ({"train_frames": 1}, "train_frames must be at least 2"),
        ({"phases": ()}, "growing ends"),
        ({"token_scale": "cube"}, "wants one of"),
    ],
)
def test_bad_settings_get_one_sentence(settings, problem):
    with pytest.raises(ValueError, match=problem):
        DualScopeAttnProcessor(**settings)
    with pytest.raises(ValueError, match="until must be in"):
        ScopePhase(until=0.0)
    with pytest.raises(ValueError, match="window must be a number from"):
        ScopePhase(window=float("inf"))


def test_what_cannot_work_says_so(model, animatediff, unet):
    install(model, "dual-scope", window=40)
    with pytest.raises(ValueError, match="needs as many places, this model has 32; choose window=16"):
        tiny.denoise_video(model, 41)
    with pytest.raises(ValueError, match="take both or none"):
        install(animatediff, "dual-scope", layers="attn1$")
    assert context_of(animatediff.unet) is None
    with pytest.raises(ValueError, match="it wants temporal attention"):
        install(unet, "dual-scope")
    animatediff.enable_free_noise(context_length=4, context_stride=2)
    with pytest.raises(ValueError, match="call pipe.disable_free_noise"):
        install(animatediff, "dual-scope")


def test_a_window_beyond_the_training_clips_warns_and_other_backends_are_refused(model):
    handle = install(model, "dual-scope", window=20)
    with pytest.warns(UserWarning, match="longer than the 16 of the training clips"):
        tiny.denoise_video(model, 21)
    handle.remove()
    install(model, "dual-scope", window=2)
    model.down_blocks[0].motion_modules[0].transformer_blocks[0].attn1.processor._attention_backend = "flex"
    with pytest.raises(BackendUnavailable, match="runs as 'native' alone"):
        tiny.denoise_video(model, 3)
