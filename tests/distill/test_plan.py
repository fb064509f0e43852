"""Memory at full size on the meta device, against numbers that can be counted by hand and against a real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reattend.distill import DistillConfig
from reattend.distill.plan import memory_plan

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "distill").glob("*.toml"))


@pytest.fixture(scope="module")
def flux():
    return memory_plan(DistillConfig.read(EXAMPLES[0]))


def test_flux_is_counted_as_it_is(flux):
    assert EXAMPLES[0].name == "flux-1-dev.toml"
    assert flux.parameters == 11_901_408_320  # of the published FLUX.1-dev
    double, single = 19 * 4 * (3072**2 + 3072), 38 * 3 * (3072**2 + 3072)
    assert flux.trained == double + single
    assert flux.frozen_bytes == 2 * flux.parameters
    assert flux.state_bytes == 2 * flux.parameters + 16 * flux.trained


def test_two_models_are_counted_as_they_are(flux):
    # teacher in bf16; of the student what is trained in fp32 with gradient and moments, the rest in bf16
    teacher, rest = 2 * flux.parameters, 2 * (flux.parameters - flux.trained)
    assert flux.two_models_bytes == teacher + rest + 16 * flux.trained
    assert 0.72 < flux.ratio < 0.725
    low = memory_plan(DistillConfig.read(EXAMPLES[0], rank=64))  # adapters come on top of a whole student
    assert low.two_models_bytes == 2 * teacher + 16 * low.trained
    assert low.ratio < 0.52


def test_two_models_are_counted_as_two_real_ones(tmp_path):
    """Against the modules themselves, with new parameters that the teacher does not have."""
    from reattend.attn_processors import ClearAttnProcessor
    from reattend.distill.roles import TwoRoles

    pipe = tiny.fresh(tiny.flux_pipeline())
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    attention = {"name": "clear", "radius": 2, "pool": 2}
    config = DistillConfig(model=str(tmp_path), data="d", micro_batch=1, precision="bfloat16", attention=attention)
    planned = memory_plan(config, size=(128, 128), text_length=7)
    teacher = pipe.transformer.to(torch.bfloat16)
    weights = sum(value.nbytes for value in teacher.parameters())
    roles = TwoRoles(teacher, ClearAttnProcessor(radius=2, pool=2))
    with roles.student():
        trained = sum(value.nbytes for value in roles.trained().values())
    stock = [part.stock for part in roles._parts]
    frozen = weights - sum(value.nbytes for module in stock for value in module.parameters())
    roles.remove()
    assert planned.two_models_bytes == weights + frozen + 4 * trained


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_recipes_fit_a_device_of_80_gb(example):
    assert memory_plan(DistillConfig.read(example)).total_bytes < 75e9


def test_checkpointing_low_rank_and_sharing_take_less(flux):
    config = DistillConfig.read(EXAMPLES[0], micro_batch=2)
    assert 1.9 < memory_plan(config).activation_bytes / flux.activation_bytes < 2.1
    assert (
        memory_plan(DistillConfig.read(EXAMPLES[0], checkpointing=False)).activation_bytes > 5 * flux.activation_bytes
    )
    low = memory_plan(DistillConfig.read(EXAMPLES[0], rank=64))
    assert low.trained < 0.05 * flux.trained and low.frozen_bytes == flux.frozen_bytes
    shared = memory_plan(DistillConfig.read(EXAMPLES[0], parallel="fsdp"), processes=8)
    assert abs(shared.state_bytes * 8 - flux.state_bytes) < 100


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_are_what_a_real_forward_keeps(tmp_path, precision):
    """Against the same forward with numbers, on the CPU, where stock attention saves what the fused kernel asks for.

    In bfloat16 as in training: under autocast, with trained weights in fp32, of which it keeps copies.
    """
    pipe = tiny.fresh(tiny.flux_pipeline())
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    config = DistillConfig(
        model=str(tmp_path), data="d", micro_batch=1, attention_weight=0.0, attention={"name": "clear", "radius": 2},
        precision=precision,
    )  # fmt: skip
    planned = memory_plan(config, size=(128, 128), text_length=7)
    dtype = getattr(torch, precision)
    model = pipe.transformer.to(dtype).requires_grad_(False)
    for name, module in model.named_modules():
        if name.endswith((".attn.to_q", ".attn.to_k", ".attn.to_v", ".attn.to_out.0")):
            module.float().requires_grad_(True)
    own = {parameter.untyped_storage().data_ptr(): parameter.requires_grad for parameter in model.parameters()}
    seen: dict[int, torch.Tensor] = {}
    copies: list[torch.Tensor] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **kwargs or {})
            if function is torch.ops.aten._to_copy.default and own.get(args[0].untyped_storage().data_ptr()):
                copies.append(out)
            return out

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            seen[place] = tensor
        return tensor

    given = {
        "hidden_states": torch.randn(1, 64, 16), "encoder_hidden_states": torch.randn(1, 7, tiny.TEXT_WIDTH),
        "pooled_projections": torch.randn(1, tiny.TEXT_WIDTH), "timestep": torch.tensor([0.5]),
    }  # fmt: skip
    given = {name: value.to(dtype) for name, value in given.items()}
    ids = {"img_ids": tiny.image_ids(8, 8), "txt_ids": torch.zeros(7, 3)}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16), Casts():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**given, **ids)
        model(**given, **ids)  # what was copied is there: nothing is copied again
    assert sum(copy.nbytes for copy in copies) == planned.copy_bytes
    for copy in copies:
        seen.pop(copy.untyped_storage().data_ptr(), None)
    real = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    assert abs(planned.activation_bytes - real) < 0.1 * real


def test_models_that_are_not_known_are_told(tmp_path):
    with pytest.raises(
        ValueError, match=r"the architecture of 'someone/else' is not here.*black-forest-labs/FLUX.1-dev"
    ):
        memory_plan(DistillConfig(model="someone/else", data="d"))
