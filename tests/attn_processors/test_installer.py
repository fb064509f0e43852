"""Installing, and undoing it to the very same objects."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
import tiny
import torch
from small_methods import Exact, Halves, Patching, RowMeans, Sharper

from reattend.attn_processors import (
    ATTN_PROCESSORS,
    AttnMethod,
    Displaced,
    UnsupportedModel,
    install,
    installed,
    pluggable,
)


def processors(model):
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def same_objects(left, right):
    return left.keys() == right.keys() and all(left[name] is right[name] for name in left)


def test_removal_puts_back_the_same_objects_keys_and_output(unet):
    before, keys, want = processors(unet), list(unet.state_dict()), tiny.denoise(unet)
    handle = install(unet, Sharper())
    assert not torch.equal(tiny.denoise(unet), want)
    handle.remove()
    handle.remove()  # harmless
    assert same_objects(processors(unet), before)
    assert list(unet.state_dict()) == keys
    assert not unet._forward_pre_hooks and not unet._forward_pre_hooks_with_kwargs
    assert torch.equal(tiny.denoise(unet), want)
    assert {layer.state for layer in handle.report().layers} == {"removed"}


def test_restores_after_an_error_in_the_block(unet):
    before = processors(unet)
    with pytest.raises(ZeroDivisionError), installed(unet, Sharper()):
        raise ZeroDivisionError
    assert same_objects(processors(unet), before)


def test_neutral_settings_take_the_stock_path_bit_for_bit(unet):
    want = tiny.denoise(unet)
    handle = install(unet, Sharper(factor=1))
    assert torch.equal(tiny.denoise(unet), want)
    assert {layer.state for layer in handle.report().layers} == {"neutral"}


def test_touches_self_attention_only(unet):
    before = processors(unet)
    install(unet, Exact())
    changed = {name for name, processor in processors(unet).items() if processor is not before[name]}
    assert changed and all(name.endswith("attn1") for name in changed)
    assert len(changed) == 7


def test_narrows_layers_by_pattern_and_by_function(unet):
    with installed(unet, Exact(), layers=r"^mid_block") as handle:
        assert [layer.name for layer in handle.report().layers] == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    with installed(unet, Exact(), layers=lambda name: "up_blocks" in name) as handle:
        assert len(handle.report().layers) == 4


def test_level_zero_is_the_highest_resolution(unet):
    with installed(unet, Sharper(levels=1)) as handle:
        names = [layer.name for layer in handle.report().layers]
    assert len(names) == 3 and all(name.startswith(("down_blocks.0", "up_blocks.1")) for name in names)


def test_handles_of_different_layers_go_in_any_order(unet):
    before, want = processors(unet), tiny.denoise(unet)
    first = install(unet, Sharper(), layers="^down")
    second = install(unet, Exact(), layers="^up")
    assert len(unet._forward_pre_hooks) == 1
    first.remove()
    assert len(unet._forward_pre_hooks) == 1
    torch.testing.assert_close(tiny.denoise(unet), want, atol=1e-5, rtol=0)
    second.remove()
    assert not unet._forward_pre_hooks
    assert same_objects(processors(unet), before)


def test_several_methods_at_once_need_different_layers(unet):
    with pytest.raises(ValueError, match="wanted by both 'exact' and 'sharper'"):
        install(unet, [Exact(), Sharper()])
    assert not unet._forward_pre_hooks


def test_installing_over_ours_is_an_error_and_changes_nothing(unet):
    handle = install(unet, Exact(), layers="^mid")
    now = processors(unet)
    with pytest.raises(ValueError, match="already carries 'exact'; remove its handle first"):
        install(unet, Sharper())
    assert same_objects(processors(unet), now)
    handle.verify()


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda pipe: pipe.enable_attention_slicing(1), "SlicedAttnProcessor.*disable_attention_slicing"),
        (lambda pipe: pipe.unet.fuse_qkv_projections(), "FusedAttnProcessor2_0.*unfuse_qkv_projections"),
    ],
    ids=["sliced", "fused"],
)
def test_refuses_layers_with_another_processor(sd, prepare, sentence):
    prepare(sd)
    with pytest.raises(ValueError, match=r"layer 'down_blocks\.0.*" + sentence):
        install(sd, Exact())


def test_refuses_a_custom_processor_by_class_name(unet):
    class Theirs:
        def __call__(self, attn, hidden_states):
            return hidden_states

    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Theirs())
    with pytest.raises(ValueError, match="'mid_block.*carries Theirs"):
        install(unet, Exact())
    install(unet, Exact(), layers="^(down|up)_blocks")  # the others are free


def test_verify_notices_attention_slicing_and_removal_leaves_it(sd, caplog):
    handle = install(sd, Exact())
    handle.verify()
    sd.enable_attention_slicing(1)
    with pytest.raises(Displaced, match="7 of 7 layers.*replaced by SlicedAttnProcessor"):
        handle.verify()
    with caplog.at_level(logging.WARNING):
        handle.remove()
    assert "left 7 layers alone" in caplog.text
    assert {type(p).__name__ for p in processors(sd.unet).values()} == {"SlicedAttnProcessor"}
    assert not sd.unet._forward_pre_hooks


def test_report_is_printable_and_json(unet):
    report = install(unet, Sharper(factor=2)).report()
    data = json.loads(report.to_json())
    assert data["methods"] == [{"name": "sharper", "factor": 2.0, "levels": 2, "on_mismatch": "raise"}]
    assert data["layers"][0]["width"] == 32 and data["layers"][0]["heads"] == 8
    assert "sharper (" in str(report) and "mid_block" in str(report)


def test_patches_are_applied_and_undone(unet):
    conv, bias = unet.conv_out, unet.conv_out.bias
    want = tiny.denoise(unet)
    with installed(unet, Patching()):
        assert not torch.equal(tiny.denoise(unet), want)
    assert "forward" not in vars(conv)
    assert conv.bias is bias
    assert torch.equal(tiny.denoise(unet), want)


def test_an_error_while_installing_leaves_nothing(unet):
    class Broken(Exact):
        def patches(self, model):
            raise OSError("no table")

    before = processors(unet)
    with pytest.raises(OSError, match="no table"):
        install(unet, Broken())
    assert same_objects(processors(unet), before)
    assert not unet._forward_pre_hooks


def test_deepcopy_runs_and_resets_on_its_own(sd):
    pluggable(sd)
    stock = tiny.run(sd)
    sd.set_attn_processor(Halves())
    want = tiny.run(sd)
    twin = copy.deepcopy(sd)
    assert torch.equal(tiny.run(twin), want)
    twin.reset_attn_processor()
    assert torch.equal(tiny.run(twin), stock)
    assert torch.equal(tiny.run(sd), want)  # the original still has ours


def test_pickled_denoiser_keeps_its_attention(unet):
    install(unet, RowMeans())
    twin = pickle.loads(pickle.dumps(unet))
    sample, text = torch.randn(1, 4, 5, 7), torch.randn(1, 77, 32)
    with torch.no_grad():
        assert torch.equal(twin(sample, 5, text).sample, unet(sample, 5, text).sample)


def test_compiled_wrapper_is_taken_off(sd):
    bare = sd.unet
    sd.unet = torch.compile(sd.unet, backend="eager")
    handle = install(sd, Exact())
    assert bare._forward_pre_hooks
    handle.remove()
    assert not bare._forward_pre_hooks


@pytest.mark.parametrize(
    ("target", "processor", "error", "sentence"),
    [
        ("pipe", "agnet", ValueError, "no attention called 'agnet'; there are: .*agent"),
        ("pipe", Exact, TypeError, r"write Exact\(\)"),
        ("pipe", 3, TypeError, "got 3 as attention processor"),
        ("pipe", [], TypeError, r"got \[\] as attention processor"),
        ("pipe", Sharper(levels=0), ValueError, "no layer for 'sharper': it wants spatial attention.*7 layers: down_"),
        ("vae", Exact(), UnsupportedModel, "AutoencoderKL is not supported yet; supported are UNet2D"),
        (None, Exact(), TypeError, "need a diffusers pipeline or a model, got NoneType"),
    ],
    ids=["unknown", "class", "number", "empty", "no-layer", "unsupported", "no-target"],
)
def test_bad_input_gets_one_sentence(sd, target, processor, error, sentence):
    with pytest.raises(error, match=sentence) as caught:
        install({"pipe": sd, "vae": sd.vae}.get(target), processor)
    assert "\n" not in str(caught.value)


def test_bad_layers_and_stray_settings_get_one_sentence(unet):
    with pytest.raises(ValueError, match="no regular expression"):
        install(unet, Exact(), layers="(")
    with pytest.raises(TypeError, match="layers wants"):
        install(unet, Exact(), layers=3)
    with pytest.raises(ValueError, match="within layers='nowhere'"):
        install(unet, Exact(), layers="nowhere")
    with pytest.raises(TypeError, match="settings \\(ratio\\) go with a name"):
        install(unet, Exact(), ratio=0.3)


def test_names_come_from_the_plain_dict(unet, monkeypatch):
    monkeypatch.setitem(ATTN_PROCESSORS, "sharper", Sharper)
    assert isinstance(ATTN_PROCESSORS, dict) and all(issubclass(cls, AttnMethod) for cls in ATTN_PROCESSORS.values())
    with installed(unet, "sharper", factor="2") as handle:
        assert handle.report().methods[0]["factor"] == 2.0
