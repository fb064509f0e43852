"""Damaged samples: others take their places, people are told, and many of them end the run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from reattend.distill import distill
from reattend.distill.shards import DamagedSample, Samples
from reattend.distill.sparing import Damages, Sparing


@pytest.fixture
def folder(flux_samples: Path, tmp_path: Path) -> Path:
    """A copy of the 12 samples, to be damaged: 8 of 32 x 32 pixels in shards 0 and 2, 4 of 48 x 32 in shard 1."""
    return Path(shutil.copytree(flux_samples, tmp_path / "samples"))


def flip(folder: Path, shard: int, place: int) -> None:
    """Turn one bit of one sample's latents."""
    file = folder / f"shard-{shard:05d}.safetensors"
    with safe_open(file, framework="pt") as opened:
        value = opened.get_tensor(f"{place}.latents")
    data = bytearray(file.read_bytes())
    at = bytes(data).index(value.numpy().tobytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_is_found_and_another_sample_of_the_size_takes_the_place(folder):
    flip(folder, 1, 2)
    samples = Samples(folder)
    assert not samples.damaged
    with pytest.raises(DamagedSample, match=r"shard-00001.safetensors is damaged: sample 2: .* delete the file"):
        samples[6]
    spared = Sparing(samples)
    item, same = spared[6], spared[5]
    assert bool(item.pop("damaged")) and not bool(same.pop("damaged"))
    assert any(torch.equal(item["latents"], samples[i]["latents"]) for i in (4, 5, 7))
    assert torch.equal(same["latents"], samples[5]["latents"])
    assert torch.equal(Sparing(Samples(folder))[6]["latents"], item["latents"])  # always the same one


def test_the_run_goes_on_tells_it_and_is_still_exact(folder, flux, config, caplog):
    flip(folder, 0, 1)
    settings = config(data=folder, steps=6, log_every=1)
    assert distill(settings, pipe=flux).finished
    (told,) = [message for message in caplog.messages if "damaged" in message]
    assert told.startswith(f"sample 1 of {folder / 'shard-00000.safetensors'} is damaged: other samples take its place")
    assert "(1 damaged of 12 up to now)" in told
    logged = [json.loads(line) for line in (settings.out / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["damaged_samples"] == 1
    parts = replace(settings, out=settings.out.with_name("parts"), workers=1)
    distill(replace(parts, steps=3), pipe=flux)
    distill(parts, pipe=flux)
    a, b = (load_file(run.out / "student" / "student.safetensors") for run in (settings, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_many_damaged_samples_end_the_run(folder, flux, config):
    for place in range(2):
        flip(folder, 0, place)
    with pytest.raises(
        ValueError, match=r"2 of 12 samples in .* are damaged, the last in shard-00000.safetensors; that is"
    ):
        distill(config(data=folder, steps=6), pipe=flux)


def test_a_file_that_cannot_be_opened_counts_with_all_its_samples(folder, caplog, monkeypatch):
    file = folder / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    samples = Samples(folder)
    assert samples.damaged == {4, 5, 6, 7}
    with pytest.raises(ValueError, match="4 of 12 samples"):
        Damages(samples)
    monkeypatch.setattr("reattend.distill.sparing.MOST", 0.5)
    caplog.clear()
    damages = Damages(samples)
    assert [message.partition(" is damaged")[0] for message in caplog.messages] == [str(file)]  # told once
    with pytest.raises(ValueError, match="all samples of one size in .* are damaged"):
        Sparing(samples)[5]
    batch = damages.taken({"latents": torch.zeros(2), "damaged": torch.tensor([False, True])}, [0, 1])
    assert list(batch) == ["latents"] and len(damages.met) == 5


def test_samples_that_are_not_there_are_no_damage(folder):
    (folder / "shard-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="is not finished: 1 of 4 files are missing, the first is shard-00002"):
        Samples(folder)
