"""The folder of a trained model: what is saved comes back, removal is exact, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import denoise_flux, image_ids

from reattend.attn_processors import ClearAttnProcessor, install, installed
from reattend.distill import linear_folder, load_linear, save_linear
from reattend.distill.denoising import denoising_of
from reattend.distill.linear_folder import read_linear
from reattend.pipelines import load

IDS = image_ids(8, 12)
METHOD = ClearAttnProcessor(radius=3, backend="halo")


def trained(model: torch.nn.Module, pool: int | None = None) -> dict[str, torch.Tensor]:
    """Changed projections of every attention layer, and weight maps if pooled."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".attn.to_q." in name or ".attn.to_out.0." in name:
            tensors[name] = parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=draw)
    if pool:
        layers = [name for name, _ in model.named_modules() if name.endswith(".attn")]
        tensors |= {f"{name}.reattend_pool_weights": torch.rand(pool, pool, generator=draw) for name in layers}
    return tensors


@pytest.fixture
def model(flux: Any) -> torch.nn.Module:
    return flux.transformer


@pytest.mark.parametrize("pool", [None, 2])
def test_a_folder_installs_in_one_call_and_leaves_without_a_trace(model, tmp_path, pool):
    stock, parameters, keys = denoise_flux(model, IDS), dict(model.named_parameters()), list(model.state_dict())
    method = ClearAttnProcessor(radius=3, pool=pool)
    tensors = trained(model, pool)
    save_linear(tmp_path / "student", model, method, tensors, info={"steps": 10})
    handle = load_linear(model, tmp_path / "student")
    got = denoise_flux(model, IDS)
    assert {layer.method for layer in handle.report().layers} == {"clear"}
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in tensors.items())
    handle.remove()
    assert torch.equal(denoise_flux(model, IDS), stock)
    assert list(model.state_dict()) == keys
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    with torch.no_grad():  # the same by hand
        for name, tensor in tensors.items():
            if "reattend" not in name:
                model.get_parameter(name).copy_(tensor)
    if pool is None:
        install(model, method)
        assert torch.equal(denoise_flux(model, IDS), got)
    else:
        install(model, method)
        assert not torch.equal(denoise_flux(model, IDS), got)  # the weight maps matter


def test_bundled_students_go_by_their_names(model, tmp_path, monkeypatch):
    monkeypatch.setattr(linear_folder, "TINY", tmp_path)
    (tmp_path / "a-model").mkdir()
    save_linear(tmp_path / "a-student", model, METHOD, trained(model))
    assert linear_folder.bundled_students() == {"a-student": tmp_path / "a-student"}
    assert linear_folder.find_student("a-student") == tmp_path / "a-student"
    assert linear_folder.find_student("elsewhere") == Path("elsewhere")
    handle = load_linear(model, "a-student")
    got = denoise_flux(model, IDS)
    handle.remove()
    load_linear(model, tmp_path / "a-student")
    assert torch.equal(denoise_flux(model, IDS), got)
    with pytest.raises(FileNotFoundError, match=r"no linear_config.json and student.safetensors in a-model"):
        load_linear(model, "a-model")


@pytest.mark.parametrize("name", ["tiny-flux-clear"])
def test_a_bundled_student_is_near_its_teacher(name):
    """Where pictures are laid out training has taken away at least half of what its attention alone does wrong."""
    about = json.loads((linear_folder.bundled_students()[name] / linear_folder.CONFIG).read_text())
    pipe = load(about["info"]["base"], dtype="float32")
    denoising, draw = denoising_of(pipe), torch.Generator().manual_seed(0)
    size = (pipe.vae.config.sample_size,) * 2
    text = denoising.encode_text(["a blue cat on sand", "a red balloon and a green tree on sea"] * 2, 24)
    noise = torch.randn(4, denoising.tokens(size), denoising.model.config.in_channels, generator=draw)

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            return denoising.model(**denoising.inputs(noise, torch.ones(4), text, size, 0.0), return_dict=False)[0]

    teacher = velocity()
    handle = load_linear(pipe, name)
    student = velocity()
    handle.remove()
    with installed(pipe, read_linear(name)[0]):
        untrained = velocity()
    assert (student - teacher).square().mean() < 0.5 * (untrained - teacher).square().mean()
    assert torch.equal(velocity(), teacher)


def test_removal_follows_the_model_to_another_type(model, tmp_path):
    save_linear(tmp_path, model, METHOD, trained(model))
    handle = load_linear(model, tmp_path)
    model.to(torch.float64)
    handle.remove()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_single_settings_may_be_replaced(model, tmp_path):
    save_linear(tmp_path, model, METHOD, trained(model))
    method, _, trained_on, _ = read_linear(tmp_path, radius=5, backend="reference")
    assert (method.radius, method.backend, trained_on) == (5.0, "reference", "FluxTransformer2DModel")


def test_a_pipeline_takes_it_too_and_a_second_one_replaces_the_first(flux, tmp_path):
    save_linear(tmp_path, flux.transformer, METHOD, trained(flux.transformer))
    stock = denoise_flux(flux.transformer, IDS)
    load_linear(flux, tmp_path)
    once = denoise_flux(flux.transformer, IDS)
    handle = load_linear(flux, tmp_path)
    assert torch.equal(denoise_flux(flux.transformer, IDS), once)
    handle.remove()
    assert torch.equal(denoise_flux(flux.transformer, IDS), stock)


def low_rank(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Factors of rank 2 for each query projection."""
    draw = torch.Generator().manual_seed(1)
    layers = [name for name, module in model.named_modules() if name.endswith(".to_q")]
    shapes = {"down": (2, 32), "up": (32, 2)}
    return {f"{name}.low_rank.{k}": torch.randn(s, generator=draw) for name in layers for k, s in shapes.items()}


def test_low_rank_students_are_added_to_the_stock_weights_whatever_is_installed(model, tmp_path):
    save_linear(tmp_path / "low", model, METHOD, low_rank(model))
    save_linear(tmp_path / "whole", model, METHOD, trained(model))
    load_linear(model, tmp_path / "low")
    once = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for before in ("low", "whole"):
        load_linear(model, tmp_path / before)
        load_linear(model, tmp_path / "low")
        assert [name for name, value in once.items() if not torch.equal(model.get_parameter(name), value)] == []
    model.to(torch.float64)
    load_linear(model, tmp_path / "low")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_student_with_other_new_parameters_takes_the_place_of_one(model, tmp_path):
    for pool in (2, 4):
        method = ClearAttnProcessor(radius=3, pool=pool)
        save_linear(tmp_path / str(pool), model, method, trained(model, pool))
        load_linear(model, tmp_path / str(pool))
        assert model.transformer_blocks[0].attn.reattend_pool_weights.shape == (pool, pool)


@pytest.mark.parametrize("down", [None, 2])
def test_files_published_with_clear_are_read(model, tmp_path, down):
    tensors = {name: value for name, value in trained(model, down).items() if "reattend" not in name}
    if down:
        layers = [name for name, _ in model.named_modules() if name.endswith(".attn")]
        for name in layers:
            tensors[f"{name}.processor.spatial_weight"] = torch.rand(1, 1, 1, down, 1, down, 1)
    file = tmp_path / (f"clear_local_3_down_{down}.safetensors" if down else "clear_local_3.safetensors")
    save_file(tensors, file)
    handle = load_linear(model, file)
    (method,) = handle.report().methods
    assert (method["radius"], method["pool"]) == (3.0, down)
    assert method["pool_budget"] == (None if down else 1024)
    if down:
        weights = model.transformer_blocks[0].attn.reattend_pool_weights
        assert torch.equal(weights, tensors["transformer_blocks.0.attn.processor.spatial_weight"].view(down, down))
    denoise_flux(model, IDS)
    handle.remove()


def test_a_published_file_without_a_radius_in_its_name_wants_one(model, tmp_path):
    save_file(trained(model), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="does not tell a radius"):
        load_linear(model, tmp_path / "weights.safetensors")
    load_linear(model, tmp_path / "weights.safetensors", radius=4).remove()


def broken(folder: Path, what: str) -> None:
    weights, config = folder / "student.safetensors", folder / "linear_config.json"
    tensors, described = load_file(weights), json.loads(config.read_text())
    name = next(iter(tensors))
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif what == "changed":
        save_file(tensors | {name: tensors[name] + 1}, weights)
    elif what == "version":
        config.write_text(json.dumps(described | {"version": 99}))
    elif what == "json":
        config.write_text("{")
    elif what == "method":
        config.write_text(json.dumps(described | {"method": {"name": "magic"}}))
    elif what == "class":
        config.write_text(json.dumps(described | {"model": "SD3Transformer2DModel"}))
    else:
        weights.unlink()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("cut", "no whole safetensors file"),
        ("changed", "does not hold the tensors"),
        ("version", "save it again"),
        ("json", "not JSON"),
        ("method", "'magic'"),
        ("class", "trained on a SD3Transformer2DModel"),
        ("gone", "give the folder"),
    ],
)
def test_what_is_damaged_or_foreign_is_refused_and_nothing_changes(model, tmp_path, what, words):
    stock = denoise_flux(model, IDS)
    save_linear(tmp_path, model, METHOD, trained(model))
    broken(tmp_path, what)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_linear(model, tmp_path)
    assert torch.equal(denoise_flux(model, IDS), stock)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"transformer_blocks.7.attn.to_q.weight": torch.zeros(32, 32)}, "has no parameter"),
        ({"transformer_blocks.0.attn.to_q.weight": torch.zeros(32, 33)}, "32, 33"),
        ({"nowhere.reattend_pool_weights": torch.zeros(2, 2)}, "has no parameter"),
    ],
    ids=["name", "shape", "extra"],
)
def test_parameters_the_model_lacks_are_named(model, tmp_path, tensors, words):
    save_linear(tmp_path, model, METHOD, tensors)
    with pytest.raises(ValueError, match=words):
        load_linear(model, tmp_path)
    assert not model._forward_pre_hooks
