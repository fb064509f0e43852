"""The benchmark runs every arm, reports what it ran, keeps to its time limit and leaves the model as it was."""

from __future__ import annotations

import json

import pytest
import torch

from reattend.attn_processors import AgentAttnProcessor
from reattend.bench import agent as bench_agent
from reattend.bench.agent import TINY, Bench, Case, run
from reattend.bench.measure import measured

CPU = torch.device("cpu")
ARMS = ["stock", "tomesd", "agent, phase 1 (agents)", "agent, phase 2 (merging only)", "agent, averaged"]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(bench_agent.random_unet(TINY, CPU), AgentAttnProcessor(), CPU)


def test_a_quick_run_reports_every_arm_in_a_file_and_a_table(tmp_path, capsys):
    path = tmp_path / "new" / "agent.json"
    result = run(quick=True, out=path, device="cpu")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [(case["what"], case["pixels"]) for case in result["cases"]] == [
        ("layer", 64),
        ("layer", 128),
        ("step", 64),
        ("step", 128),
        ("layer", 256),
    ]
    printed = capsys.readouterr().out
    for case in result["cases"]:
        assert sorted(case["arms"]) == sorted(ARMS)
        phases = [case["arms"][name]["all_seconds"] for name in ARMS[2:4]]
        average = [0.4 * early + 0.6 * late for early, late in zip(*phases, strict=True)]
        assert case["arms"]["agent, averaged"]["all_seconds"] == pytest.approx(average)
        assert f"| {case['pixels']} | stock | {case['arms']['stock']['seconds']:.3g} | 1.00 |" in printed
    assert result["versions"]["torch"] == torch.__version__
    assert result["settings"]["schedule"][0]["agent_ratio"] == 0.95


def test_json_goes_to_stdout_alone(capsys, monkeypatch, bench):
    monkeypatch.setattr(bench_agent, "random_unet", lambda *_: bench.unet)
    result = run(quick=True, json=True, device="cpu")
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(result))


def test_rounds_that_do_not_fit_the_time_limit_are_left_out(capsys, monkeypatch, bench):
    monkeypatch.setattr(bench_agent, "random_unet", lambda *_: bench.unet)
    result = run(quick=True, minutes=1e-9, device="cpu")
    assert [case["rounds"] for case in result["cases"]] == [0] * 5
    assert capsys.readouterr().out.count("no time left") == 5


def test_an_arm_changes_the_layer_only_while_it_is_applied(bench):
    layer = bench.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    before = layer.processor
    for case in (Case("layer", 128), Case("step", 128)):
        outputs = {}
        for arm in bench.arms:
            with bench.applied(arm), torch.no_grad():
                out = bench.work(case, arm)()
                outputs[arm] = out if isinstance(out, torch.Tensor) else out.sample
        assert layer.processor is before
        assert not bench.unet._forward_pre_hooks
        stock = outputs.pop("stock")
        assert all(out.shape == stock.shape and not torch.equal(out, stock) for out in outputs.values())


def test_runs_over_twenty_seconds_are_repeated_less():
    case = Case("step", 1024)
    assert case.wanted == 5
    case.runs["stock"] = [bench_agent.Run(seconds=20.0, peak_mib=None)]
    assert case.wanted == 5
    case.runs["stock"] = [bench_agent.Run(seconds=21.0, peak_mib=None)]
    assert case.wanted == 3


def test_a_first_round_is_expected_to_grow_with_the_picture():
    small, large, step = Case("layer", 512, round_seconds=2.0), Case("layer", 1024), Case("step", 1024)
    assert [case.guess([small, large, step]) for case in (small, large, step)] == [0.0, 32.0, 0.0]


def test_goals_at_1024_pixels_weigh_the_phases_and_compare_within_the_round(bench):
    step, layer = Case("step", 1024), Case("layer", 1024)
    first, second = bench.timesteps
    times = {"stock": [2.0, 20.0], "tomesd": [1.0, 30.0], first: [1.0, 10.0], second: [2.0, 20.0]}
    step.runs = {arm: [bench_agent.Run(seconds, None) for seconds in row] for arm, row in times.items()}
    for case in (step, layer):
        bench.average(case)
    assert bench_agent._told(step)["arms"]["agent, averaged"]["all_seconds"] == pytest.approx([1.6, 16.0])
    goals = bench_agent._goals({"step": step, "layer": layer}, first)
    assert [goal["value"] for goal in goals] == [pytest.approx(1.25), pytest.approx((1 / 1.6 + 30 / 16) / 2), None]
    assert [goal["met"] for goal in goals] == [False, True, None]


def test_peak_memory_counts_what_a_run_needed_even_if_it_gave_it_back():
    size = 64 * 2**20

    def work():
        block = torch.ones(size, dtype=torch.uint8)
        del block

    peak = measured(work, CPU).peak_mib
    if peak is None:
        pytest.skip("this system tells no peak of the resident set")
    assert 60 <= peak <= 96
    assert measured(lambda: None, CPU).peak_mib < 8
