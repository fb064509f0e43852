from __future__ import annotations

import importlib
import json

import diffusers
import pytest
import torch

from reattend.ui import doctor
from reattend.ui.cli import main


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_backends_that_work_are_told_from_those_that_do_not(found):
    states = found["attention_backends"]
    assert set(states) == {backend.value for backend in diffusers.AttentionBackendName}
    assert states["native"] == "works"
    assert states["_native_math"] == "works"
    assert states["flash_hub"].startswith("not tried")


def test_a_backend_that_computes_something_else_does_not_work(monkeypatch):
    monkeypatch.setattr(doctor, "dispatch_attention_fn", lambda q, k, v: q)
    assert "not close" in doctor.why_not(diffusers.AttentionBackendName.NATIVE, torch.device("cpu"))


def test_xformers_on_a_cpu_is_told_to_need_more():
    assert doctor.why_not(diffusers.AttentionBackendName.XFORMERS, torch.device("cpu"))


def test_versions_devices_and_models_are_told(found, sd_folder, monkeypatch):
    assert found["packages"]["torch"] == torch.__version__
    assert "cpu" in found["devices"]
    assert found["device"] in ("cpu", "cuda", "mps")
    monkeypatch.setattr(importlib.import_module("reattend.pipelines.load"), "TINY", sd_folder.parent)
    assert doctor.examine()["models"]["tiny-sd"] > 0.1


def test_what_is_missing_comes_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "no-such-package", "ui")
    assert 'pip install "reattend[ui]"   # no-such-package' in doctor.examine()["install"]


def test_the_table_has_every_part_and_no_line_is_very_long(found):
    text = doctor.table(found)
    for title in ("Packages", "Devices", "Attention backends", "Bundled models"):
        assert title in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command_prints_it(capsys, found, monkeypatch, options):
    monkeypatch.setattr(doctor, "examine", lambda: found)
    assert main(["doctor", *options]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == found if options else out == doctor.table(found) + "\n"
