"""The benchmark runs every arm on the rows it says, keeps to its time limit and leaves the model as it was."""

from __future__ import annotations

import json
from statistics import median

import pytest
import torch

from reattend.bench import story as bench_story
from reattend.bench.agent import TINY, random_unet
from reattend.bench.measure import Run
from reattend.bench.story import (
    AGAIN,
    ISOLATION_2,
    ISOLATION_3,
    PICTURES,
    STOCK,
    STOCK_ROWS,
    STORY,
    Bench,
    Case,
    run,
    table,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(random_unet(TINY, CPU), CPU)


def test_a_quick_run_reports_every_arm_in_a_file_and_a_table(tmp_path, capsys, monkeypatch, bench):
    monkeypatch.setattr(bench_story, "random_unet", lambda *_: bench.unet)
    path = tmp_path / "new" / "story.json"
    before = [type(layer.processor) for layer in bench.unet.modules() if hasattr(layer, "processor")]
    result = run(quick=True, out=path, device="cpu")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    (case,) = result["cases"]
    assert list(case["arms"]) == list(PICTURES) and case["rounds"] == 1
    printed = capsys.readouterr().out
    assert f"| 64 | {STORY} | {case['arms'][STORY]['seconds']:.3g} |" in printed
    assert [type(layer.processor) for layer in bench.unet.modules() if hasattr(layer, "processor")] == before


def test_overheads_are_medians_of_those_within_a_round():
    times = {
        STOCK: [1, 10, 2], AGAIN: [1, 11, 2], STOCK_ROWS: [3, 30, 6], STORY: [3.6, 33, 6.6], ISOLATION_2: [1.1, 10, 4],
        ISOLATION_3: [2, 20, 2],
    }  # fmt: skip
    runs = {arm: [Run(float(s), None) for s in times[arm]] for arm in PICTURES}
    case = Case(64, runs=runs)
    found = bench_story._told(case)
    assert found["arms"][STORY]["over_as_many_rows"] == pytest.approx(0.1)
    assert found["arms"][STORY]["over_stock"] == pytest.approx(median([2.6, 2.3, 2.3]))
    assert found["arms"][ISOLATION_2]["over_stock"] == pytest.approx(0.1)
    goals = bench_story._goals([case, Case(128)])
    assert [goal["met"] for goal in goals] == [True, None, False, None]


def test_the_arms_do_what_they_say(bench):
    case, outputs = Case(64), {}

    for arm in (STOCK, ISOLATION_2, STOCK_ROWS, STORY):
        with torch.no_grad(), bench.applied(arm):
            outputs[arm] = bench.step(case, arm)(600.0).sample
    assert [len(x) for x in outputs.values()] == [2, 2, 6, 6]
    assert not torch.allclose(outputs[STOCK], outputs[ISOLATION_2], atol=1e-4)
    references, panel = [0, 1, 3, 4], 5
    torch.testing.assert_close(outputs[STORY][references], outputs[STOCK_ROWS][references], atol=1e-5, rtol=0)
    assert not torch.allclose(outputs[STORY][panel], outputs[STOCK_ROWS][panel], atol=1e-4)
    method = bench.method(STORY)
    assert (method.text_mix, len(method.captions), len(method.references)) == (1.0, 2, 2)


def test_rounds_that_do_not_fit_the_time_limit_are_left_out(capsys, monkeypatch, bench):
    monkeypatch.setattr(bench_story, "random_unet", lambda *_: bench.unet)
    result = run(quick=True, minutes=1e-9, device="cpu")
    assert result["cases"][0]["rounds"] == 0 and "64 pixels: left out, no time left" in table(result)
    small, large = Case(512, round_seconds=2.0), Case(1024)
    assert [case.guess([small, large]) for case in (small, large)] == [0.0, 32.0]
