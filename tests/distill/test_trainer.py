"""The trainer: exact resuming, a teacher that stays as it was, gradients that do not depend on how they are computed."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from reattend.attn_processors import ATTN_PROCESSORS
from reattend.attn_processors.families import family_of
from reattend.distill import distill, load_linear
from reattend.distill import trainer as trainer_module
from reattend.distill.batches import Batches, learning_rate
from reattend.distill.checkpoint import checkpoints, newest, save
from reattend.distill.shards import Samples
from reattend.distill.trainer import Run
from reattend.pipelines import CancelToken

ROUNDING = 1e-6  # the same sums in another order, fp32


def stop_after(step: int) -> tuple[CancelToken, Any]:
    token = CancelToken()
    return token, lambda event: token.request() if event.step >= step else None


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run / "checkpoints")[0] / "state.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def in_one_process(config: Any, pipe: Any) -> Any:
    """A run outside of `distill`, to ask for its parts."""
    from reattend.distill.ranks import Ranks

    return Ranks.joined(config), lambda ranks: Run(config, pipe, Samples(config.data), ranks)


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 2, "workers": 2, "ema": 0.9, "checkpointing": True},
        {"rank": 2, "attention": {"name": "clear", "radius": 2, "pool": 2}, "schedule": "cosine", "radius_steps": 8},
    ],
    ids=["copies, accumulation, workers, averages", "low rank, pooled, curriculum"],
)
def test_ten_steps_are_five_and_five_more_bit_for_bit(flux, config, tmp_path, changes):
    # 12 samples in batches of 4 are 3 steps an epoch, so step 5 is in the middle of one
    whole = config(log_every=1, **changes, out=tmp_path / "whole")
    parts = replace(whole, out=tmp_path / "parts")
    assert distill(whole, pipe=flux).finished
    token, on_step = stop_after(5)
    ended = distill(parts, pipe=flux, on_step=on_step, cancel=token)
    assert (ended.step, ended.finished) == (5, False)
    ended = distill(parts, pipe=flux)
    assert (ended.step, ended.finished) == (10, True)
    assert_same(state(whole.out), state(parts.out))
    assert_same(*(load_file(c.out / "student" / "student.safetensors") for c in (whole, parts)))
    losses = [[(line["step"], line["loss"]) for line in lines(c.out)] for c in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 10


def test_the_teacher_is_untouched_and_the_student_loads_in_one_call(flux, config, tmp_path):
    stock = tiny.run(flux)
    before = {name: value.clone() for name, value in flux.transformer.state_dict().items()}
    required = [parameter.requires_grad for parameter in flux.transformer.parameters()]
    ended = distill(config(steps=3, checkpointing=True), pipe=flux)
    after = flux.transformer.state_dict()
    assert_same(before, dict(after))
    assert [parameter.requires_grad for parameter in flux.transformer.parameters()] == required
    assert not flux.transformer.is_gradient_checkpointing
    assert torch.equal(tiny.run(flux), stock)
    handle = load_linear(flux, ended.student)
    assert not torch.equal(tiny.run(flux), stock)
    handle.remove()
    assert torch.equal(tiny.run(flux), stock)


@pytest.mark.parametrize(
    "changes",
    [{}, {"rank": 4}, {"layers": "^single_"}, {"projections": "all"}, {"projections": "all", "rank": 4}],
    ids=str,
)
def test_the_saved_student_computes_what_the_trained_one_did(flux, config, changes):
    settings = config(steps=3, ema=0, lr=1e-2, **changes)
    distill(settings, pipe=flux)
    joined, make = in_one_process(settings, flux)
    with joined as ranks:
        run = make(ranks)
        with run.roles.student():
            want = tiny.run(flux)
        run.close()
    load_linear(flux, settings.out / "student")
    torch.testing.assert_close(tiny.run(flux), want, atol=20 * ROUNDING, rtol=0)  # low rank: the product is added first
    text = [name for name in load_file(settings.out / "student" / "student.safetensors") if ".add_q_proj" in name]
    assert bool(text) == ("projections" in changes)


def test_radii_shrink_from_the_whole_picture_to_their_own(flux, config):
    radii = (("^single_", 3.0),)
    joined, make = in_one_process(
        config(radius_steps=4, attention={"name": "clear", "radius": 2, "radii": radii}), flux
    )
    with joined as ranks:
        run, seen = make(ranks), []
        for step in range(6):
            run.state.step = step
            method = run._shrunk((32, 32))  # 8 x 8 tokens, 12.3 from corner to corner with themselves
            run.roles.use(method)
            seen.append((method.radius, *(radius for _, radius in method.radii)))
        run.close()
    assert seen == [(13, 13), (10, 10), (8, 8), (5, 6), (2, 3), (2, 3)]


def test_fewer_steps_than_were_done_are_refused(flux, config):
    settings = config(steps=2)
    distill(settings, pipe=flux)
    with pytest.raises(ValueError, match=r"run is at step 2, asked are steps=1; ask for as many or more"):
        distill(replace(settings, steps=1), pipe=flux)


@pytest.mark.parametrize(("name", "steps", "fall"), [("flux", 30, 0.6), ("sd3", 12, 0.8), ("sd", 6, 0.85)])
def test_losses_fall_on_every_kind_of_model(name, steps, fall, config, request, tmp_path):
    from reattend.distill import make_dataset

    pipe = request.getfixturevalue(name)
    length = {} if name == "sd" else {"text_length": 16}
    data = make_dataset(pipe, tmp_path / "data", prompts=["a cat"], samples=4, steps=2, sizes=[(32, 32)], **length)
    settings = config(data=data, steps=steps, batch=4, micro_batch=4, lr=3e-3, flow_weight=0.0, log_every=2)
    distill(settings, pipe=pipe)
    logged = lines(settings.out)
    assert logged[-1]["loss"] < fall * logged[0]["loss"]
    assert all(line["attention"] > 0 and line["output"] > 0 for line in logged)


def test_gradients_are_the_same_with_checkpointing_accumulation_and_not(flux, config):
    def gradients(**changes: Any) -> dict[str, torch.Tensor]:
        settings = config(steps=1, lr=0.0, ema=0, clip=1e9, match="all", **changes)
        joined, make = in_one_process(settings, flux)
        with joined as ranks:
            run = make(ranks)
            kept = {}
            run.state.optimizer.step = lambda: kept.update({n: p.grad.clone() for n, p in run.state.trained.items()})
            for size, micros in run.read():
                run.learn(size, micros, 0.0, trainer_module.Meter(0, ranks))
            run.close()
        return kept

    plain, recomputed, pieces = (
        gradients(micro_batch=4),
        gradients(micro_batch=4, checkpointing=True),
        gradients(micro_batch=1),
    )
    assert all(value.abs().max() > 0 for value in plain.values())
    assert_same(plain, recomputed)
    for name in plain:
        torch.testing.assert_close(
            pieces[name], plain[name], atol=ROUNDING, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_taps_are_the_attention_outputs_of_both_roles(flux, config):
    from reattend.attn_processors import ClearAttnProcessor
    from reattend.distill.roles import TwoRoles

    roles = TwoRoles(flux, ClearAttnProcessor(radius=1000.0))
    roles.tap(roles.layers)
    ids = tiny.image_ids(4, 6)
    with roles.recording() as theirs:
        tiny.denoise_flux(flux.transformer, ids)
    with roles.student(), roles.recording() as ours:
        tiny.denoise_flux(flux.transformer, ids)
    tiny.denoise_flux(flux.transformer, ids)  # nothing is recorded outside
    assert {layer: sorted(kept) for layer, kept in theirs.items()} == {
        "transformer_blocks.0.attn": ["image", "text"],
        "single_transformer_blocks.0.attn": ["joined"],
    }
    for layer, kept in theirs.items():
        for stream, value in kept.items():  # a radius over everything is the teacher itself
            torch.testing.assert_close(ours[layer][stream], value, atol=1e-5, rtol=0)


def test_a_save_that_was_killed_leaves_the_checkpoint_before(flux, config, monkeypatch):
    settings = config(steps=6, save_every=2)
    distill(replace(settings, steps=4), pipe=flux)
    kept = state(settings.out)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt  # no handler of ours sees it: like the end of the process in the middle of a save

    monkeypatch.setattr(trainer_module, "save_linear", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(settings, pipe=flux)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(settings.out / "checkpoints")] == ["step-00000004", "step-00000002"]
    assert any((settings.out / "checkpoints").glob(".step-00000006.part/state.safetensors"))
    assert_same(state(settings.out), kept)
    assert distill(settings, pipe=flux).finished
    whole = replace(settings, out=settings.out.with_name("whole"))
    distill(whole, pipe=flux)
    assert_same(state(settings.out), state(whole.out))


def test_a_damaged_checkpoint_is_left_out(flux, config):
    settings = config(steps=4, save_every=2)
    distill(settings, pipe=flux)
    (settings.out / "checkpoints" / "step-00000004" / "state.safetensors").write_bytes(b"broken")
    assert distill(replace(settings, steps=6), pipe=flux).step == 6
    shutil.rmtree(settings.out / "checkpoints" / "step-00000006")
    for path in checkpoints(settings.out / "checkpoints"):
        (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"none of the \d checkpoints .* can be read; delete them"):
        distill(settings, pipe=flux)


def test_a_damaged_newest_checkpoint_does_not_push_out_good_ones(tmp_path):
    def write(step: int, keep: int) -> None:
        value = torch.full((2,), float(step))
        save(tmp_path, step, iter([("trained.x", value)]), {}, lambda folder: folder.mkdir(), keep=keep)

    write(50, keep=2)
    write(100, keep=2)
    (tmp_path / "step-00000100" / "state.safetensors").write_bytes(b"broken")
    found = newest(tmp_path)
    assert found is not None and found[0]["step"] == 50
    write(60, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000060"]
    found = newest(tmp_path)
    assert found is not None and torch.equal(load_file(found[1])["trained.x"], torch.full((2,), 60.0))


def test_sigterm_ends_after_the_step_with_a_checkpoint(flux, config):
    settings = config(log_every=1)

    def kill(event: Any) -> None:
        if event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    ended = distill(settings, pipe=flux, on_step=kill)
    assert (ended.step, ended.finished) == (3, False)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in checkpoints(settings.out / "checkpoints")] == ["step-00000003"]


def test_samples_are_asked_for_as_they_are_needed(flux, config, monkeypatch):
    asked: list[int] = []
    at = Batches.at
    monkeypatch.setattr(Batches, "at", lambda batches, step: asked.append(step) or at(batches, step))
    token, on_step = stop_after(3)
    assert distill(config(steps=10**9, log_every=1), pipe=flux, on_step=on_step, cancel=token).step == 3
    assert max(asked) <= 4


def test_a_run_is_not_continued_with_other_options_or_samples(flux, config, tmp_path):
    settings = config(steps=2)
    distill(settings, pipe=flux)
    with pytest.raises(ValueError, match=r"holds a run with lr=0.001, asked is 0.1; go on with the same options"):
        distill(replace(settings, lr=0.1), pipe=flux)
    from reattend.distill import make_dataset

    other = make_dataset(flux, tmp_path / "other", prompts=["x"], samples=4, steps=1, sizes=[(32, 32)], text_length=16)
    with pytest.raises(ValueError, match="began on other samples"):
        distill(replace(settings, data=other), pipe=flux)


def test_bad_input_is_one_sentence(flux, config):
    with pytest.raises(ValueError, match=r"a batch of 4 cannot be cut into micro batches of 3 on 1 processes"):
        distill(config(micro_batch=3), pipe=flux)
    with pytest.raises(ValueError, match=r"there are 4 samples of 48 x 32 pixels, fewer than a batch of 8"):
        distill(config(batch=8), pipe=flux)
    with pytest.raises(ValueError, match="the pipeline is in float32, the run computes in bfloat16"):
        distill(config(precision="bfloat16"), pipe=flux)
    with pytest.raises(ValueError, match="start it with torchrun"):
        distill(config(parallel="fsdp"), pipe=flux)
    assert torch.equal(tiny.run(flux), tiny.run(tiny.fresh(tiny.flux_pipeline())))


def test_half_precision_trains_fp32_masters(config):
    pipe = copy.deepcopy(tiny.flux_pipeline()).to(torch.bfloat16)  # not `flux`, which shares its VAE
    pictures = {"validate_every": 2, "validation_prompts": ("a cat",), "validation_steps": 1}
    settings = config(precision="bfloat16", steps=2, attention={"name": "inline"}, **pictures)
    distill(settings, pipe=pipe)
    kept = state(settings.out)
    assert {value.dtype for value in kept.values()} == {torch.float32}
    student = load_file(settings.out / "student" / "student.safetensors")
    stock = dict(pipe.transformer.named_parameters())
    assert all(value.dtype == (torch.bfloat16 if name in stock else torch.float32) for name, value in student.items())
    load_linear(pipe, settings.out / "student")
    assert tiny.run(pipe).isfinite().all()


def test_the_learning_rate_rises_and_falls(config):
    rate = lambda step, **changes: learning_rate(config(lr=1.0, **changes), step)  # noqa: E731
    assert rate(7) == 1.0
    assert [rate(step, warmup=4, schedule="linear", steps=8) for step in range(8)] == [
        0.25,
        0.5,
        0.75,
        1,
        1,
        0.75,
        0.5,
        0.25,
    ]
    assert math.isclose(rate(6, warmup=4, schedule="cosine", steps=8), 0.5)


@pytest.mark.parametrize(("times", "mean"), [("logit-normal", 0.0), ("logit-normal", 1.5), ("uniform", 0.0)])
def test_noise_levels_are_drawn_as_asked(flux, config, times, mean):
    joined, make = in_one_process(config(times=times, logit_mean=mean), flux)
    with joined as ranks:
        run = make(ranks)
        levels = run.draw(list(range(2000)), torch.Size([1]))[1].sort().values
        run.close()
    share = levels if times == "uniform" else torch.special.ndtr(levels.logit() - mean)
    gap = (share - (torch.arange(2000) + 0.5) / 2000).abs().max()
    assert gap < 1.63 / 2000**0.5  # Kolmogorov and Smirnov, 99 %; the seed is 0 every time


def test_a_state_of_another_shape_is_refused(flux, config):
    settings = config(steps=1)
    distill(settings, pipe=flux)
    file = checkpoints(settings.out / "checkpoints")[0] / "state.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("trained."))
    save_file(tensors | {name: tensors[name][:1].clone()}, file)
    with pytest.raises(ValueError, match=r"does not fit this run: 'trained\..*' is missing or has another shape"):
        distill(replace(settings, steps=2), pipe=flux)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("neighborhood", {"radius": 2}),
        ("linear", {}),
        ("inline", {}),
        ("flow", {}),
        ("agent-joint", {}),
        ("routed", {"tile": (2, 2), "topk": 4}),
        ("mixture-of-heads", {"radius": 3, "active": 0.5, "shared": 0.0}),
        ("mixture-of-heads", {"radius": 3, "active": 1.0, "shared": 0.0, "route": "sample"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_every_linear_form_trains_and_its_student_loads(name, settings, flux, config):
    asked = config(
        steps=12, ema=0, flow_weight=0.0, lr=3e-3, attention={"name": name, **settings}, batch=4, micro_batch=4
    )
    ended = distill(asked, pipe=flux)
    logged = lines(asked.out)
    assert logged[-1]["loss"] < 0.95 * logged[0]["loss"]
    method = ATTN_PROCESSORS[name](**settings)
    kept = load_file(ended.student / "student.safetensors")
    for info, _ in family_of(flux.transformer).layers(flux.transformer):
        for key, first in method.new_parameters(info).items():
            assert not torch.equal(kept[f"{info.name}.reattend_{key}"], first), key  # each is trained
    joined, make = in_one_process(asked, flux)
    with joined as ranks:
        run = make(ranks)
        with run.roles.student():
            want = tiny.run(flux)
        run.close()
    load_linear(flux, ended.student)
    assert torch.equal(tiny.run(flux), want)
