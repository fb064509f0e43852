from __future__ import annotations

import copy
import importlib
import json
import shutil

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

import reattend.pipelines
from reattend.pipelines import ModelUnavailable, bundled, load


@pytest.fixture
def folder(sd_folder, tmp_path):
    """A copy of the tiny model to break."""
    return shutil.copytree(sd_folder, tmp_path / "model")


def edit_index(folder, **changes):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


def test_a_folder_loads_its_stock_class_ready_for_attention(sd_folder):
    pipe = load(sd_folder)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.dtype == torch.float32
    assert callable(pipe.set_attn_processor)
    assert callable(pipe.reset_attn_processor)
    assert pipe.name_or_path == str(sd_folder)


def test_a_bundled_name_loads_from_the_package(sd_folder, monkeypatch):
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", sd_folder.parent)
    assert bundled() == {"tiny-sd": sd_folder}
    assert load("tiny-sd").name_or_path == "tiny-sd"


def test_a_bundled_transformer_draws_at_the_size_its_vae_tells(tmp_path, monkeypatch):
    model = copy.deepcopy(tiny.flux_pipeline())
    model.vae.register_to_config(sample_size=24)
    model.save_pretrained(tmp_path / "tiny-flux")
    assert load(tmp_path / "tiny-flux").default_sample_size == 128  # the stock pipeline's own
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", tmp_path)
    pipe = load("tiny-flux")
    assert pipe.default_sample_size * pipe.vae_scale_factor == 24


def test_dtype_is_taken_by_name_and_half_precision_files_become_float32(sd_folder, tmp_path):
    half = load(sd_folder, dtype="float16")
    assert half.unet.dtype == torch.float16
    half.save_pretrained(tmp_path / "plain")
    half.save_pretrained(tmp_path / "variant", variant="fp16")
    for saved in ("plain", "variant"):
        pipe = load(tmp_path / saved)
        assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
        assert torch.equal(pipe.unet.conv_in.weight, half.unet.conv_in.weight.float())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int8"}, "dtype is unknown: got 'int8'; choose one of float32, float16, bfloat16"),
        ({"device": "toaster"}, "device is not available: got 'toaster', .*cpu"),
        ({"device": "cpu:3"}, "device is not available: got 'cpu:3'"),
        ({"device": "meta"}, "device is not available: got 'meta'"),
    ],
)
def test_unknown_device_or_dtype_is_refused(sd_folder, settings, words):
    with pytest.raises(ValueError, match=words):
        load(sd_folder, **settings)


@pytest.mark.parametrize("name", ["tiny", "no folder", "/nowhere/at/all", "a/b/c", ""])
def test_an_unknown_name_is_told_what_there_is(name):
    with pytest.raises(ModelUnavailable, match=r"no model|not a diffusers model"):
        load(name)


def test_a_missing_network_gives_one_sentence():
    with pytest.raises(
        ModelUnavailable, match=r"cannot get the model 'nobody/nothing'.*check the name and the network"
    ) as caught:
        load("nobody/nothing")  # the suite runs offline
    assert "\n" not in str(caught.value)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelUnavailable, match="is a file; a model is a diffusers folder"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_a_folder_without_a_readable_index_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "model_index.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelUnavailable, match="is not a diffusers model"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "MyPipeline"},
        {"_class_name": ["pipeline", "MyPipeline"]},
        {"_class_name": "UNet2DConditionModel"},
        {"unet": ["my_unet", "MyUNet"]},
        {"unet": ["os", "system"]},
        {"unet": ["diffusers", "logging"]},
        {"unet": ["diffusers"]},
        {"text_encoder": ["transformers", "MyTextModel"]},
    ],
    ids=str,
)
def test_classes_from_outside_are_refused_and_never_run(folder, changes):
    edit_index(folder, **changes)
    planted = "raise SystemExit('code of the folder was run')"
    for place in ("my_unet.py", "pipeline.py", "unet/my_unet.py"):
        (folder / place).write_text(planted)
    with pytest.raises(ModelUnavailable, match="only stock classes are loaded, code from a model folder is never run"):
        load(folder)


def test_broken_weights_give_one_sentence(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelUnavailable, match="cannot read the model folder") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_pickled_weights_are_not_read(folder, part):
    weights = folder / f"{part}.safetensors"
    weights.unlink()
    name = "pytorch_model.bin" if part.startswith("text") else "diffusion_pytorch_model.bin"
    torch.save({}, weights.with_name(name))
    with pytest.raises(ModelUnavailable, match=r"cannot read the model folder.*safetensors"):
        load(folder)


def test_the_package_name_load_is_the_function():
    importlib.import_module("reattend.pipelines.load")
    importlib.import_module("reattend.pipelines.image")
    assert reattend.pipelines.load is load
    assert callable(load)
    assert set(reattend.pipelines.__all__) <= set(dir(reattend.pipelines))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = reattend.pipelines.nothing


def test_a_bundled_model_borrows_what_it_shares_with_tiny_sd_and_no_other_folder_does(sd_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", tmp_path)
    shutil.copytree(sd_folder, tmp_path / "tiny-sd")
    shutil.copytree(sd_folder, tmp_path / "tiny-more")
    shutil.copytree(sd_folder, tmp_path / "elsewhere" / "tiny-more")
    for folder in (tmp_path, tmp_path / "elsewhere"):
        shutil.rmtree(folder / "tiny-more" / "vae")
    pipe = load("tiny-more")
    assert torch.equal(pipe.vae.post_quant_conv.weight, load("tiny-sd").vae.post_quant_conv.weight)
    with pytest.raises(ModelUnavailable, match="cannot read the model folder"):
        load(tmp_path / "elsewhere" / "tiny-more")
