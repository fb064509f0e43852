"""The benchmark of the trainer: both arms compute the same losses, and the state is counted as it is."""

from __future__ import annotations

import json

from reattend.bench import distill


def test_a_quick_run_compares_arms_that_compute_the_same(tmp_path, capsys):
    path = tmp_path / "new" / "distill.json"
    result = distill.run(quick=True, out=path, device="cpu")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert result["same_losses"] < 1e-5  # the same numbers in fp32, after a step of AdamW each
    (case,) = result["cases"]
    one, two = case["arms"]["one model"], case["arms"]["two models"]
    assert two["speed"] == 1 and two["state_ratio"] == 1
    assert one["state_ratio"] < 1
    assert one["state_mib"] / two["state_mib"] == one["state_ratio"]
    assert f"| {case['model']} | one model | {one['seconds']:.3g} |" in capsys.readouterr().out
    assert result["goals"] == []


def test_without_time_nothing_is_told_of_speed_but_the_state_is_known(capsys):
    result = distill.run(quick=True, minutes=1e-9, device="cpu")
    assert result["cases"][0]["arms"] == {} and list(result["left_out"].values()) == ["no time left"]
    speed, state = distill._goals(distill.Case("a model"))
    assert (speed["value"], speed["met"]) == (None, None)
    assert 0 < state["value"] < 1 and state["at_most"] == 0.7
