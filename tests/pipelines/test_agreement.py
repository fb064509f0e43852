"""Ranks agree on one film before they begin, and a film is another one as soon as anything that changes it is."""

from __future__ import annotations

import contextlib
import copy

import pytest
import tiny
import torch
from films import make, make_on_ranks
from holding import held_elsewhere

from reattend.attn_processors import dual_scope
from reattend.pipelines import Recipe, Video, agreement, filming
from reattend.pipelines.agreement import request_digest
from reattend.pipelines.checkpoint import parts_folder
from reattend.pipelines.film import partial


def recipe(seed: int = 5) -> Recipe:
    attention = ({"name": "dual-scope", "window": 4, "anchors": 2},)
    return Recipe(
        prompt="a red cat", seed=seed, steps=2, width=32, height=24, attention=attention, video=Video(frames=5)
    )


def test_a_film_that_another_process_makes_is_left_to_it_and_all_ranks_are_told(animatediff, tmp_path, monkeypatch):
    out, said = tmp_path / "cat.mp4", []
    with held_elsewhere(parts_folder(out)):
        with pytest.raises(ValueError, match=r"another process works in .*cat.mp4.parts; wait for its end"):
            make(animatediff, recipe(), out)
        plain = agreement.Comm.tell
        monkeypatch.setattr(agreement.Comm, "tell", lambda self, word: said.append(word) or plain(self, word))
        with pytest.raises(ValueError, match="another process works in|rank 0 could not hold"):
            make_on_ranks(monkeypatch, 2, recipe(), out)
        monkeypatch.undo()
    assert len(said) == 2 and not out.exists() and not partial(out).exists()
    make(animatediff, recipe(), out)
    assert out.exists() and not parts_folder(out).exists()


@pytest.mark.parametrize(
    ("device", "config", "enough"),
    [
        ("cpu", "cpu:gloo", True),
        ("cpu", "cpu:gloo,cuda:gloo", True),
        ("cuda", "cpu:gloo,cuda:nccl", True),
        ("cpu", "cuda:nccl", False),
        ("cuda", "cuda:nccl", False),  # what all ranks agree on lies on the host
        ("cuda", "cpu:gloo", False),
        ("cuda", "cpu:gloo,cuda:gloo", False),  # gloo sends nothing of a card from rank to rank
    ],
)
def test_a_process_group_without_the_backends_is_told_before_anything_is_sent(device, config, enough, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: config)
    agreement.check_backends(filming.Comm(), torch.device(device))  # one rank sends nothing
    words = rf"on {device} sends tensors of .* got '{config}'; start it with init_process_group\('cpu:gloo,cuda:nccl'\)"
    with contextlib.nullcontext() if enough else pytest.raises(ValueError, match=words):
        agreement.check_backends(filming.Comm(0, 2), torch.device(device))


def test_a_film_asks_for_the_backends_of_its_process_group(animatediff, tmp_path, monkeypatch):
    where = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("cpu:gloo", init_method=where, rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: "cuda:nccl")
        monkeypatch.setattr(filming.Comm, "of_group", lambda group=None: filming.Comm(0, 2))
        with pytest.raises(ValueError, match="a film on cpu sends tensors of cpu, which the process group cannot do"):
            make(animatediff, recipe(), tmp_path / "cat.mp4")
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_that_disagree_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"rank . was given another recipe or other weights than rank"):
        make_on_ranks(monkeypatch, 2, lambda rank: recipe(seed=rank), tmp_path / "cat.mp4")


def test_the_digest_does_not_depend_on_the_order_of_a_set():
    pipe = tiny.fresh(tiny.animatediff())
    found = set()
    for notes in (["a", "b", "c"], ["c", "a", "b"]):  # diffusers lists a set, in the order of this process
        pipe.scheduler.register_to_config(_use_default_values=notes)
        assert pipe.scheduler.config["_use_default_values"] == notes
        found.add(request_digest(recipe(), pipe))
    pipe.scheduler.register_to_config(beta_end=0.5)
    assert len(found) == 1 and request_digest(recipe(), pipe) not in found


def test_the_digest_tells_adapters_and_free_u_apart(animatediff):
    class Adapted(torch.nn.Linear):
        """What PEFT's layers say of themselves."""

        scaling, active_adapters, disable_adapters = {"style": 1.0, "other": 1.0}, ["style"], False

    unet = animatediff.unet = copy.deepcopy(animatediff.unet)
    layer = unet.adapted = Adapted(4, 4)
    found = [request_digest(recipe(), animatediff)]
    layer.scaling = {"style": 0.3, "other": 1.0}
    found.append(request_digest(recipe(), animatediff))
    layer.active_adapters = ["other"]
    found.append(request_digest(recipe(), animatediff))
    layer.disable_adapters = True
    found.append(request_digest(recipe(), animatediff))
    animatediff.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    found.append(request_digest(recipe(), animatediff))
    animatediff.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.5)
    found.append(request_digest(recipe(), animatediff))
    assert len(set(found)) == len(found)
    animatediff.disable_freeu()
    assert request_digest(recipe(), animatediff) == found[3]


@pytest.mark.parametrize("shape", [(7,), (65, 64), (3000,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_in_other_places_are_other_weights(shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = agreement._sums(values)
    unaligned = torch.cat([torch.zeros(1, dtype=dtype), values.flatten()])[1:].view(shape)
    assert agreement._sums(unaligned) == found == agreement._sums(torch.nn.Parameter(values))
    if len(shape):
        assert agreement._sums(values.flip(0)) != found != agreement._sums(values.roll(1))
    if len(shape) == 2:
        assert agreement._sums(values.flip(1)) != found


def test_the_digest_changes_with_phases_that_are_left_to_the_default(animatediff, monkeypatch):
    before = request_digest(recipe(), animatediff)
    monkeypatch.setattr(dual_scope, "PHASES", (dual_scope.ScopePhase(window=1.0),))
    assert request_digest(recipe(), animatediff) != before
