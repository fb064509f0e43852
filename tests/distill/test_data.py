"""Samples: the same from any number of processes, resumable, and checked."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open

from reattend.distill import make_dataset
from reattend.distill.batches import Batches
from reattend.distill.data import captioned_pictures, read_prompts
from reattend.distill.shards import Samples
from reattend.distill.validation import picture, pictures
from reattend.pipelines.filling_in import chosen_length
from reattend.pipelines.load import GUIDANCE, load

QUICK = {"steps": 1, "text_length": 16, "sizes": [(32, 32)]}
ROUNDING = 1e-5  # a batch of another size, fp32


def test_items_are_what_the_pipeline_makes(flux, flux_samples):
    samples = Samples(flux_samples)
    assert len(samples) == 12
    assert {size: list(indices) for size, indices in samples.groups().items()} == {
        (32, 32): [0, 1, 2, 3, 8, 9, 10, 11], (48, 32): [4, 5, 6, 7],
    }  # fmt: skip
    item = samples[5]
    text, pooled, _ = flux.encode_prompt("two hats on sand", prompt_2=None, max_sequence_length=16)
    torch.testing.assert_close(item["text"], text[0], atol=ROUNDING, rtol=0)
    torch.testing.assert_close(item["pooled"], pooled[0], atol=ROUNDING, rtol=0)
    assert item["latents"].shape == (8 * 12, 16)
    assert samples.empty["text"].shape == item["text"].shape
    assert torch.equal(pickle.loads(pickle.dumps(samples))[5]["latents"], item["latents"])


def test_processes_share_the_shards_and_what_is_missing_is_made_again(flux, tmp_path):
    made = {"prompts": ["a", "b", "c"], "samples": 5, "shard": 2, **QUICK}
    one = Samples(make_dataset(flux, tmp_path / "one", **made))
    make_dataset(flux, tmp_path / "two", part=(1, 2), **made)
    with pytest.raises(
        ValueError, match="is not finished: 2 of 4 files are missing, the first is shard-00000.safetensors; run"
    ):
        Samples(tmp_path / "two")
    told = []
    make_dataset(flux, tmp_path / "two", part=(0, 2), on_progress=lambda *pair: told.append(pair), **made)
    assert told[-1] == (3, 3)
    two = Samples(tmp_path / "two")
    assert all(torch.equal(one[i]["latents"], two[i]["latents"]) for i in range(5))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("shard-*")}
    next(iter(files)).write_bytes(b"broken")
    (tmp_path / "two" / "empty.safetensors").write_bytes(b"broken")
    make_dataset(flux, tmp_path / "two", **made)
    assert torch.equal(Samples(tmp_path / "two").empty["text"], one.empty["text"])
    assert sum(path.stat().st_mtime_ns != before for path, before in files.items()) == 1
    assert torch.equal(Samples(tmp_path / "two")[0]["latents"], one[0]["latents"])


def test_a_sample_does_not_depend_on_the_batch_it_was_made_in(flux, tmp_path):
    a, b = (
        Samples(make_dataset(flux, tmp_path / str(batch), prompts=["a", "b", "c"], batch=batch, **QUICK))
        for batch in (1, 3)
    )
    for i in range(3):
        torch.testing.assert_close(a[i]["latents"], b[i]["latents"], atol=ROUNDING, rtol=0)


def test_pictures_that_cannot_be_read_are_left_out_and_told_unless_they_are_many(flux, tmp_path, caplog):
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:1500])  # opens, and ends in the middle
    samples = Samples(make_dataset(flux, tmp_path / "out", pictures=tmp_path, text_length=16, sizes=[(32, 32)]))
    assert len(samples) == 3
    with safe_open(tmp_path / "out" / "shard-00000.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["captions"]) == ["picture 0", "picture 2", "picture 3"]
    (told,) = caplog.messages
    assert "left out: cannot read the picture" in told and "1.png" in told and "(1 of 4 pictures up to now)" in told
    (tmp_path / "3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2 of 4 pictures in .* cannot be read, the last is 3.png; more than 5%"):
        make_dataset(flux, tmp_path / "two", pictures=tmp_path, text_length=16, sizes=[(32, 32)])
    assert not (tmp_path / "two").exists()


def test_pictures_go_to_the_nearest_size_and_are_encoded(flux, tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("wide", (96, 60)), ("square", (40, 40))):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "wide.txt").write_text("a wide one\n")
    with pytest.raises(ValueError, match=r"1 of 2 pictures in .* have no caption, for example square.png"):
        make_dataset(flux, tmp_path / "out", pictures=tmp_path / "in", **QUICK)
    (tmp_path / "in" / "metadata.jsonl").write_text(json.dumps({"file_name": "square.png", "text": "a square"}) + "\n")
    assert [caption for _, caption in captioned_pictures(tmp_path / "in")] == ["a square", "a wide one"]
    sizes = [(48, 32), (32, 32)]
    samples = Samples(make_dataset(flux, tmp_path / "out", pictures=tmp_path / "in", text_length=16, sizes=sizes))
    assert {size: len(indices) for size, indices in samples.groups().items()} == {(48, 32): 1, (32, 32): 1}
    with safe_open(tmp_path / "out" / "shard-00000.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["captions"]) == ["a wide one"]
    square = samples[1]["latents"]
    with Image.open(tmp_path / "in" / "square.png") as picture:
        pixels = torch.from_numpy(np.array(picture.resize((32, 32), Image.Resampling.LANCZOS))).permute(2, 0, 1)
    want = flux.vae.encode(pixels[None] / 127.5 - 1).latent_dist.mean
    want = (want - flux.vae.config.shift_factor) * flux.vae.config.scaling_factor
    got = flux._unpack_latents(square[None], 32, 32, flux.vae_scale_factor)
    torch.testing.assert_close(got, want, atol=ROUNDING, rtol=0)


def test_pictures_are_turned_as_their_cameras_say(flux, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    lying, made = Image.Exif(), []
    lying[0x0112] = 6  # to be turned clockwise by a quarter
    for name, turned in (("upright", 0), ("lying", 1)):
        folder = tmp_path / name
        folder.mkdir()
        exif = {"exif": lying} if turned else {}
        Image.fromarray(np.rot90(pixels, turned)).save(folder / "a.png", **exif)
        (folder / "a.txt").write_text("a")
        sizes = [(32, 48), (48, 32)]
        made.append(Samples(make_dataset(flux, folder / "out", pictures=folder, text_length=16, sizes=sizes)))
    assert [list(samples.groups()) for samples in made] == [[(48, 32)]] * 2
    assert torch.equal(made[0][0]["latents"], made[1][0]["latents"])


def test_pictures_are_made_with_the_text_that_is_kept(flux, sd, tmp_path, monkeypatch):
    """Of a tokenizer that reads 24 tokens the stock call still takes 512, and pads."""
    monkeypatch.setattr(flux.tokenizer_2, "model_max_length", 24)
    samples = Samples(make_dataset(flux, tmp_path / "own", prompts=["a cat"], **(QUICK | {"text_length": None})))
    assert samples.about["text_length"] == 24 and samples[0]["text"].shape[0] == 24
    same = Samples(make_dataset(flux, tmp_path / "told", prompts=["a cat"], **(QUICK | {"text_length": 24})))
    assert torch.equal(samples[0]["latents"], same[0]["latents"])
    asked: list[int] = []
    call = type(flux).__call__

    @functools.wraps(call)  # its signature says what it takes
    def heard(pipe, **how):
        asked.append(how["max_sequence_length"])
        return call(pipe, **how)

    monkeypatch.setattr(type(flux), "__call__", heard)
    picture(flux, "a cat", (32, 32), 1, seed=0)
    assert asked == [24]
    with pytest.raises(
        ValueError, match="StableDiffusionPipeline has one text length, got text_length=24; leave it out"
    ):
        chosen_length(sd, 24)


def test_captions_that_are_no_text_are_told(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"cannot read captions from .*a.txt .*; make it UTF-8 text"):
        captioned_pictures(tmp_path)
    (tmp_path / "a.txt").write_text("a" * 20_000)
    with pytest.raises(ValueError, match="the caption of a.png is too long: got 20000 characters"):
        captioned_pictures(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"cannot read captions from .*metadata.jsonl"):
        captioned_pictures(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": None}, "give either prompts or a folder of pictures"),
        ({"prompts": []}, "there are no prompts"),
        ({"sizes": [(36, 32)]}, "width does not work: got 36 pixels"),
        ({"steps": 0}, "steps is out of range: got 0"),
        ({"samples": 0}, "samples is out of range: got 0"),
        ({"text_length": 0}, "text_length is out of range: got 0"),
        ({"guidance": -1.0}, "guidance is out of range: got -1"),
        ({"part": (2, 2)}, r"part is \(rank, ranks\) with 0 <= rank < ranks, got \(2, 2\)"),
        ({"samples": -1, "prompts": None, "pictures": "x"}, "samples is out of range: got -1"),
    ],
)
def test_bad_input_is_one_sentence(flux, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_dataset(flux, tmp_path, **({"prompts": ["a"], **QUICK} | changes))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_samples_is_not_mixed_in(flux, tmp_path):
    make_dataset(flux, tmp_path, prompts=["a"], **QUICK)
    with pytest.raises(ValueError, match=r"holds samples made in another way \(seed differs\)"):
        make_dataset(flux, tmp_path, prompts=["a"], seed=1, **QUICK)
    with pytest.raises(ValueError, match=r"make samples with: reattend distill data"):
        Samples(tmp_path / "nothing")


def test_teachers_whose_latents_are_no_numbers_are_told(flux, tmp_path):
    with torch.no_grad():
        flux.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the teacher made latents that are no numbers"):
        make_dataset(flux, tmp_path, prompts=["a"], **QUICK)
    assert not list(Path(tmp_path).glob("shard-*"))


def test_pipelines_that_cannot_be_trained_are_named(tmp_path):
    class KolorsPipeline:
        pass

    with pytest.raises(
        TypeError, match="KolorsPipeline cannot be distilled yet; FluxPipeline, StableDiffusion3Pipeline"
    ):
        make_dataset(KolorsPipeline(), tmp_path, prompts=["a"])


def test_prompts_are_lines(tmp_path):
    (tmp_path / "prompts.txt").write_text("# comment\n a cat \n\nein Hund\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "ein Hund"]
    (tmp_path / "prompts.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "prompts.txt")


def test_batches_visit_every_sample_once_an_epoch_in_one_size_each():
    groups = {(32, 32): np.arange(9), (48, 32): np.arange(9, 13)}
    batches = Batches(groups, 4, seed=3)
    epochs = [[batches.at(step) for step in range(start, start + 3)] for start in (0, 3)]
    for epoch in epochs:
        seen = np.concatenate([indices for _, indices in epoch])
        assert len(set(seen)) == 12 and set(range(9, 13)) <= set(seen)
        assert all(set(indices) <= set(groups[size]) for size, indices in epoch)
    assert not np.array_equal(epochs[0][0][1], epochs[1][0][1])
    again = Batches(groups, 4, seed=3)
    assert np.array_equal(again.at(5)[1], epochs[1][2][1])  # without the ones before


def test_targets_are_those_of_the_model(sd):
    from reattend.distill.denoising import denoising_of

    draw = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 4, 4, 4, generator=draw)
    levels = torch.tensor([0.3])
    for kind, want in (
        ("epsilon", noise),
        ("v_prediction", sd.scheduler.get_velocity(clean, noise, torch.tensor([300]))),
    ):
        sd.scheduler.register_to_config(prediction_type=kind)
        noisy, target = denoising_of(sd).corrupt(clean, noise, levels)
        torch.testing.assert_close(noisy, sd.scheduler.add_noise(clean, noise, torch.tensor([300])))
        torch.testing.assert_close(target, want)
    flow = denoising_of(tiny.flux_pipeline())
    noisy, target = flow.corrupt(clean, noise, levels)
    torch.testing.assert_close(noisy - levels * target, clean)
    # the sampler's own shift: levels go where its steps are
    scheduler = tiny.sd3_pipeline().scheduler
    even = torch.linspace(1, 1 / 1000, 5)
    scheduler.set_timesteps(sigmas=even.tolist(), device="cpu")
    torch.testing.assert_close(
        denoising_of(tiny.sd3_pipeline()).warp(even, 64), scheduler.sigmas[:-1], atol=1e-6, rtol=0
    )


def test_a_bundled_model_is_sampled_and_shown_with_its_own_guidance(tmp_path, monkeypatch):
    pipe, asked = load("tiny-sd"), []
    real = type(pipe).__call__

    @functools.wraps(real)  # with the signature
    def recording(self, *args, **kwargs):
        asked.append(kwargs["guidance_scale"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", recording)
    make_dataset(pipe, tmp_path, prompts=["a red cat on sea"], steps=1)
    pictures(pipe, ["a red cat on sea"], (128, 128), steps=1, seeds=[1])
    assert asked == [GUIDANCE["tiny-sd"]] * 2
