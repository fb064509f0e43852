"""How a run joins its processes, without any: the limit they wait for, what is sharded first, and trackers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import LoggerType

from reattend.distill import distill
from reattend.distill.ranks import Ranks


class Joined(Exception):
    """What the process group was asked for."""


@pytest.fixture
def two_processes(monkeypatch) -> Any:
    """The environment torchrun makes, and a process group that only tells what it was asked for."""
    from accelerate.state import PartialState

    def group(*args: Any, **kwargs: Any) -> None:
        raise Joined(kwargs["timeout"])

    local = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in local.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", group)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def test_processes_wait_for_one_another_for_longer_than_the_usual_minutes(config, two_processes):
    with pytest.raises(Joined) as asked, Ranks.joined(config()):
        pass
    assert asked.value.args[0] >= timedelta(hours=24)


def test_cudnn_attention_is_out_of_use_in_a_run_and_back_after_it(config):
    assert torch.backends.cuda.cudnn_sdp_enabled()

    def interrupted() -> None:
        with Ranks.joined(config()):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_what_is_inside_is_sharded_first(sd, config, monkeypatch):
    order: list[torch.nn.Module] = []

    def shard(module: torch.nn.Module, mesh: Any) -> torch.nn.Module:
        order.append(module)
        return module

    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", shard)
    monkeypatch.setattr(dist, "init_device_mesh", lambda *args: None)
    ranks = Ranks(SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=2))
    ranks.wrapped(sd.unet, replace(config(), parallel="fsdp"))
    assert len(order) > 3 and order[-1] is sd.unet
    for place, module in enumerate(order):
        inside = set(module.modules()) - {module}
        assert not inside & set(order[place:])


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("ACCELERATE_USE_FSDP", "true", "parallel=fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "parallel=fsdp"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "micro_batch"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "set precision"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "without torch.compile"),
    ],
)
def test_what_only_accelerate_was_told_is_refused(config, monkeypatch, name, value, remedy):
    monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=f"{name}={value}, which a run does not follow.*{remedy}"),
        Ranks.joined(config()),
    ):
        pass
    monkeypatch.setenv(name, "1" if value == "4" else "no")
    with Ranks.joined(config()) as ranks:
        assert ranks.size == 1


def test_a_tracker_that_is_not_installed_is_told(config, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    words = "tracker 'wandb' is not installed; pip install wandb"
    with pytest.raises(ValueError, match=words), Ranks.joined(config(trackers=("wandb",))):
        pass


def test_a_tracker_that_cannot_begin_is_told(config, monkeypatch):
    def refuse(**how: Any) -> None:
        raise RuntimeError("no account.\nLog in.")

    monkeypatch.setattr(
        "accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD, LoggerType.WANDB]
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    settings = config(trackers="tensorboard, wandb")
    words = "tracker 'wandb' cannot begin: no account. Log in; mend that, or take it out of trackers"
    with pytest.raises(ValueError, match=words), Ranks.joined(settings) as ranks:
        ranks.track(settings)


def test_a_tracker_hears_what_the_log_does_and_stdout_stays_clean(flux, config, monkeypatch, capsys):
    heard: list[Any] = []

    class Chatty:
        """As trackio: it greets, and accelerate ends its run without telling it that none is current."""

        config = SimpleNamespace(update=lambda values, **how: heard.append(values["batch"]))

        def init(self, **how: Any) -> Any:
            print("hello", how["name"])
            return self

        def log(self, values: dict[str, Any], step: int) -> None:
            heard.append({"step": step} | values)

        def finish(self) -> None:
            print("bye")
            heard.append("finished")

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TRACKIO])
    monkeypatch.setitem(sys.modules, "trackio", Chatty())
    pictures = {"validate_every": 2, "validation_prompts": "a cat", "validation_steps": 1}
    settings = config(trackers="trackio", steps=2, log_every=1, **pictures)
    distill(settings, pipe=flux)
    lines = [json.loads(line) for line in (settings.out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {f"layers/{name}": loss for name, loss in line.pop("layers", {}).items()}
    assert heard == [4, *lines, "finished"]
    assert "validation_latent_error" in lines[-1] and any(name.startswith("layers/") for name in lines[0])
    told = capsys.readouterr()
    assert told.out == "" and "hello run" in told.err and "bye" in told.err
