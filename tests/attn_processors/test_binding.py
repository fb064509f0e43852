"""`set_attn_processor` on a pipeline and on its denoiser, as people are used to."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from small_methods import Exact, Recording, Sharper

from reattend.attn_processors import ATTN_PROCESSORS, install, pluggable


@pytest.fixture
def plugged(sd: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(ATTN_PROCESSORS, "sharper", Sharper)
    return pluggable(sd)


def ours(pipe: Any) -> list[Any]:
    return [p.method for name, p in pipe.unet.attn_processors.items() if getattr(p, "method", None) is not None]


def test_same_object_and_same_pixels_after_reset(plugged, sd):
    assert plugged is sd
    before, want = dict(sd.unet.attn_processors), tiny.denoise(sd.unet)
    sd.set_attn_processor("sharper", factor=2)
    assert ours(sd) == [Sharper(factor=2)] * 7
    assert not torch.equal(tiny.denoise(sd.unet), want)
    sd.reset_attn_processor()
    assert all(processor is before[name] for name, processor in sd.unet.attn_processors.items())
    assert torch.equal(tiny.denoise(sd.unet), want)


def test_setting_again_replaces_and_resetting_twice_is_harmless(plugged):
    plugged.set_attn_processor(Sharper())
    plugged.set_attn_processor([Exact()], layers="^mid")
    assert ours(plugged) == [Exact()]
    plugged.reset_attn_processor()
    plugged.reset_attn_processor()
    assert ours(plugged) == [] and not plugged.unet._forward_pre_hooks


def test_replaces_what_install_put_there(plugged):
    handle = install(plugged, Exact())
    plugged.set_attn_processor("sharper")
    assert {layer.state for layer in handle.report().layers} == {"removed"}
    handle.remove()
    assert len(ours(plugged)) == 7


def test_a_failing_set_keeps_what_is_there(plugged):
    plugged.set_attn_processor("sharper")
    for bad in ("agnet", Sharper(levels=0), 3, None):
        with pytest.raises((ValueError, TypeError)):
            plugged.set_attn_processor(bad)
    with pytest.raises(ValueError, match="has no setting 'fctor'; it has"):
        plugged.set_attn_processor("sharper", fctor=1)
    assert ours(plugged) == [Sharper()] * 7


def test_the_denoiser_takes_the_same_and_knows_the_schedule_of_its_pipeline(plugged):
    plugged.unet.set_attn_processor(Recording())
    tiny.run(plugged)
    context = plugged.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor.context
    assert context.slots["seen"] == [(0.0, 0), (0.5, 1)]
    plugged.unet.reset_attn_processor()
    assert ours(plugged) == []


@pytest.mark.parametrize("on", ["pipeline", "denoiser"])
def test_foreign_processors_go_to_the_stock_method_after_removing_ours(plugged, on):
    plugged.set_attn_processor(Exact())
    theirs = AttnProcessor()
    (plugged if on == "pipeline" else plugged.unet).set_attn_processor(theirs)
    assert all(processor is theirs for processor in plugged.unet.attn_processors.values())
    assert not plugged.unet._forward_pre_hooks


def test_a_dict_of_foreign_processors_is_not_emptied(plugged):
    table = {name: AttnProcessor2_0() for name in plugged.unet.attn_processors}
    plugged.unet.set_attn_processor(table)
    assert len(table) == 14 and plugged.unet.attn_processors == table


def test_the_saved_table_of_the_model_can_be_set_back(plugged):
    plugged.set_attn_processor("sharper")
    table = plugged.unet.attn_processors
    plugged.unet.set_attn_processor(table)
    assert len(ours(plugged)) == 7 and plugged.unet._forward_pre_hooks
    plugged.reset_attn_processor()
    with pytest.warns(UserWarning, match="7 processors of ours in this dict were removed before"):
        plugged.unet.set_attn_processor(table)
    assert ours(plugged) == [] and len(table) == 14


def test_copies_are_bound_to_themselves(plugged):
    twin = copy.deepcopy(plugged)
    twin.set_attn_processor("sharper")
    assert len(ours(twin)) == 7 and ours(plugged) == []
    thawed = pickle.loads(pickle.dumps(plugged.unet))
    thawed.set_attn_processor(Exact())
    assert thawed._forward_pre_hooks and not plugged.unet._forward_pre_hooks


def test_binds_this_instance_only(plugged):
    other = StableDiffusionImg2ImgPipeline.from_pipe(plugged, requires_safety_checker=False)
    assert not hasattr(other, "set_attn_processor") and not hasattr(type(plugged), "set_attn_processor")
    assert "set_attn_processor" not in plugged.components


def test_a_method_set_by_the_stock_method_says_what_to_do(sd):
    sd.unet.set_attn_processor(Exact())
    with pytest.raises(RuntimeError, match=r"install\(pipe, Exact\(...\)\)"):
        tiny.denoise(sd.unet)
