"""The benchmark of CLEAR runs every arm, keeps to its time limit, and its arms compute the same thing."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from reattend.attn_processors.ops.layout import TokenLayout
from reattend.attn_processors.ops.local import local_attention
from reattend.attn_processors.ops.patterns import Disc
from reattend.bench import clear
from reattend.bench.rounds import one_round
from reattend.ui.cli import main

CPU = torch.device("cpu")
RESULTS = Path(clear.__file__).with_name("results")


def test_a_quick_run_reports_every_arm_in_a_file_and_a_table(tmp_path, capsys):
    path = tmp_path / "new" / "clear.json"
    result = clear.run(quick=True, out=path, device="cpu")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [(case["what"], case["tokens"]) for case in result["cases"]] == [("operator", 256), ("FLUX block", 64)]
    printed = capsys.readouterr().out
    for case in result["cases"]:
        assert list(case["arms"]) == ["dense", "halo, r=4"]
        assert case["arms"]["dense"]["times_faster_than_dense"] == 1
        assert f"| {case['tokens']} | 2 x 16 | dense |" in printed
    assert result["goals"] == []


def test_the_readme_table_comes_from_a_kept_result(tmp_path, capsys):
    path = tmp_path / "clear.json"
    result = clear.run(quick=True, out=path, device="cpu")
    capsys.readouterr()
    assert main(["bench", "clear", "--show", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert result["device"] in lines[0] and f"torch {torch.__version__}" in lines[0]
    assert "| | tokens | heads x width | halo, r = 4 |" in lines
    faster = result["cases"][0]["arms"]["halo, r=4"]["times_faster_than_dense"]
    assert f"| operator | 256 | 2 x 16 | {faster:.2g} |" in lines
    path.write_text('{"benchmark": "agent"}')
    assert main(["bench", "clear", "--show", str(path)]) == 2
    assert "no result of the benchmark of CLEAR (it is of" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("file", sorted(RESULTS.glob("clear-*.json")), ids=lambda file: file.name)
def test_results_in_the_repository_are_whole_and_name_where_they_come_from(file):
    result = json.loads(file.read_text())
    assert result["device"] and result["versions"]["torch"] and result["command"] == "reattend bench clear"
    unmeasured = [case for case in result["cases"] if not case["rounds"]]
    assert {case["what"] for case in unmeasured} <= {clear.WHOLE}  # the last to be measured
    assert sorted(result["left_out"]) == sorted(
        f"{case['what']}, {case['tokens']} tokens, {case['heads']} x {case['head_width']}" for case in unmeasured
    )
    assert clear.show(file).count("\n") > len(result["cases"])


def test_the_bundled_model_is_measured_where_it_is_and_left_out_openly_where_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", tmp_path)
    assert not [case for case in clear.cases_for(CPU, quick=False) if case.what == clear.WHOLE]
    result = clear.run(quick=True, device="cpu")
    for text in (clear.table(result), clear.short_table(result)):
        assert "tiny-flux: left out, this install does not bundle it" in text
    tiny.flux_pipeline().save_pretrained(tmp_path / "tiny-flux")
    small, large = (case for case in clear.cases_for(CPU, quick=False) if case.what == clear.WHOLE)
    assert (small.side, large.side, small.heads, small.width) == (16, 64, 2, 16)
    small.side = 4  # 16 x 16 pixels of this tiny one
    one_round(small, partial(clear.time_arm, device=CPU, dtype=torch.float32))
    assert {str(arm): len(runs) for arm, runs in small.runs.items()} == {"dense": 1, "halo, r=8": 1, "halo, r=16": 1}


def test_operations_per_token_hardly_grow_with_the_picture():
    for row in clear.flops_per_token():
        flops = row["flops_per_token"]
        assert flops["8192"] / flops["2048"] < 1.1  # what is left is the smaller share of border tokens
        assert flops["8192"] > flops["1024"]


def test_no_time_left_is_told_not_guessed():
    cases = clear.cases_for(CPU, quick=False)
    goals = clear._goals(cases)
    assert [goal["value"] for goal in goals] == [None] * 3
    assert "not measured" in clear.table(
        {**clear.run(quick=True, device="cpu"), "goals": goals, "cases": [clear._told(case) for case in cases]}
    )


def test_floors_are_judged_by_the_median_ratio_within_rounds():
    cases = clear.cases_for(CPU, quick=False)
    case = next(case for case in cases if case.tokens == 16_384)
    times = {clear.Arm(clear.DENSE): [8.0, 80.0, 9.0], clear.Arm(clear.HALO, 8): [1.0, 10.0, 1.0]}
    case.runs = {arm: [clear.Run(seconds, None) for seconds in row] for arm, row in times.items()}
    goal = clear._goals(cases)[0]
    assert goal["value"] == 8 and goal["met"]


def test_the_row_major_kernel_masks_as_we_do():
    layout, pattern = TokenLayout(5, 9, before=7), Disc(2.5)
    q, k, v = (torch.randn(1, layout.tokens, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    mask[layout.grid, layout.grid] = pattern.visible(layout)
    want = local_attention(q, k, v, layout, pattern, backend="reference")
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    got = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    near = clear.near_rows(layout, pattern)
    i, j = torch.meshgrid(torch.arange(layout.tokens), torch.arange(layout.tokens), indexing="ij")
    assert torch.equal(near(None, None, i, j), mask)


def test_an_arm_that_cannot_run_is_told_with_its_reason_and_tried_once(monkeypatch, capsys):
    tried = []

    def fails(*_):
        tried.append(1)
        raise RuntimeError("no compiler here\nmore")

    monkeypatch.setattr(clear, "row_major", fails)
    case = clear.Case("operator", 4, 1, 16, arms=(clear.Arm(clear.DENSE), clear.Arm(clear.ROWS, 2)))
    for _ in range(2):
        one_round(case, partial(clear.time_arm, device=CPU, dtype=torch.float32))
    told = clear._told(case)
    assert (told["rounds"], list(told["arms"]), len(tried)) == (2, ["dense"], 1)
    assert told["left_out"] == {"flex, row-major, r=2": "RuntimeError: no compiler here"}
    result = clear.run(quick=True, device="cpu")
    row = "| operator | 16 | 1 x 16 | flex, row-major, r=2 | RuntimeError: no compiler here | – | – | – |"
    assert row in clear.table({**result, "cases": [told]})
    case.arms = (clear.Arm(clear.HALO, 2),)
    monkeypatch.setattr(clear, "op_work", fails)
    with pytest.raises(RuntimeError, match="no compiler"):  # our own arms must run
        one_round(case, partial(clear.time_arm, device=CPU, dtype=torch.float32))
