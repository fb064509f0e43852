"""The benchmark of the trainer: both arms compute the same losses, and the state is counted as it is."""

from __future__ import annotations

import json

from reattend.bench import distill


def test_a_quick_run_compares_arms_that_compute_the_same(tmp_path, capsys):
    path = tmp_path / "new" / "distill.json"
    result = distill.run(quick=True, out=path, device="cpu")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert result["same_losses"] < 1e-5  # the same numbers in fp32, after a step of AdamW each
    one, two = result["arms"]["one model"], result["arms"]["two models"]
    assert two["speed"] == 1 and two["state_ratio"] == 1
    assert one["state_ratio"] < 1
    assert one["state_mib"] / two["state_mib"] == one["state_ratio"]
    assert "| one model |" in capsys.readouterr().out
    assert "goals" not in result
