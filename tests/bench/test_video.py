"""The benchmark of films runs every arm, and tells what was sent and what a clip needs."""

from __future__ import annotations

import copy
import json

import pytest
import tiny
import torch

from reattend.attn_processors import install
from reattend.attn_processors.comm import Comm
from reattend.bench import video
from reattend.bench.measure import Run
from reattend.pipelines.stream import streamed

RANKED = {"device": "cpu", "frames": 64, "seconds_per_frame_and_step": 0.1, "sent": 10, "foretold": 12}
PREDICTED = {"ranks": 2, "frames": 48, "sent_mb_by_the_busiest": 1.0, "seconds_per_step": 1.0, "efficiency": 0.5}


@pytest.mark.slow
def test_a_quick_run_reports_every_arm_in_a_file_and_a_table(tmp_path, capsys):
    path = tmp_path / "video.json"
    result = video.run(quick=True, out=path, device="cpu")
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert [(row["arm"], row["frames"]) for row in result["cases"]] == [
        ("ours", 17), ("FreeNoise", 17)
    ]  # fmt: skip
    assert [(row["ranks"], row["device"]) for row in result["ranks"]] == [(1, "cpu"), (2, "cpu")]
    assert result["ranks"][0]["sent"] == 0 and result["ranks"][1]["sent"] == result["ranks"][1]["foretold"] > 0
    printed = capsys.readouterr().out
    assert "bytes sent beyond or short of those foretold: 0 (goal: at most 0), met" in printed
    assert "from 256 to 1,024 frames: not measured (goal: at most 0.05)" in printed
    assert result["left_out"] == {}


def test_films_that_were_not_measured_are_told_with_the_reason(monkeypatch, capsys):
    def pretended(arm):
        return lambda pipe, frames, device: video._told(arm, frames, Run(10.0, None)) | {"working_set_mib": frames}

    monkeypatch.setattr(video, "build", lambda device: tiny.animatediff())
    monkeypatch.setattr(video, "ours", pretended("ours"))
    monkeypatch.setattr(video, "peer", pretended("FreeNoise"))
    monkeypatch.setattr(video, "on_ranks", lambda ranks, frames: {**RANKED, "ranks": ranks})
    monkeypatch.setattr(video, "predict", lambda ranks: PREDICTED)
    result = video.run(minutes=60, device="cpu")
    assert [(row["arm"], row["frames"]) for row in result["cases"]] == [
        ("ours", 16), ("FreeNoise", 16), ("ours", 64), ("FreeNoise", 64), ("ours", 256), ("FreeNoise", 256), ("ours", 1024),
    ]  # fmt: skip
    assert result["left_out"] == {"FreeNoise, 1024 frames": "it holds all frames at once"}
    growth, bytes_sent = result["goals"]
    assert (growth["value"], growth["met"], bytes_sent["value"], bytes_sent["met"]) == (3.0, False, 4, False)
    assert "FreeNoise, 1024 frames: left out, it holds all frames at once" in capsys.readouterr().out
    hurried = video.run(minutes=2, device="cpu")
    assert hurried["left_out"]["ours, 256 frames"] == "no time left" and hurried["goals"][0]["met"] is None


def test_a_slow_arm_or_a_slow_start_leaves_out_no_film_of_the_other(monkeypatch):
    def pretended(arm, seconds):  # by frames
        return lambda pipe, frames, device: (
            video._told(arm, frames, Run(seconds(frames), None)) | {"working_set_mib": 1}
        )

    calls = []
    monkeypatch.setattr(video, "build", lambda device: tiny.animatediff())
    monkeypatch.setattr(video, "call", lambda model, frames, device: calls.append(frames))
    monkeypatch.setattr(video, "ours", pretended("ours", lambda frames: 20.0 if frames == 16 else frames / 100))
    monkeypatch.setattr(video, "peer", pretended("FreeNoise", lambda frames: float(frames)))
    monkeypatch.setattr(video, "on_ranks", lambda ranks, frames: {**RANKED, "ranks": ranks})
    monkeypatch.setattr(video, "predict", lambda ranks: PREDICTED)
    result = video.run(minutes=4.2, device="cpu")
    assert calls == [16]  # one call that is not timed
    assert result["left_out"] == {
        "FreeNoise, 256 frames": "no time left",
        "FreeNoise, 1024 frames": "it holds all frames at once",
    }
    assert result["goals"][0]["met"]


def test_an_arm_that_outgrows_the_gpu_costs_no_row_and_is_not_tried_again(monkeypatch, capsys):
    tried = []

    def peer(pipe, frames, device):
        tried.append(frames)
        if frames > 16:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return video._told("FreeNoise", frames, Run(1.0, None))

    monkeypatch.setattr(video, "build", lambda device: tiny.animatediff())
    monkeypatch.setattr(video, "call", lambda *_: None)
    ours = lambda pipe, frames, device: video._told("ours", frames, Run(frames / 10, None)) | {"working_set_mib": 1}  # noqa: E731
    monkeypatch.setattr(video, "ours", ours)
    monkeypatch.setattr(video, "peer", peer)
    monkeypatch.setattr(video, "on_ranks", lambda ranks, frames: {**RANKED, "ranks": ranks})
    monkeypatch.setattr(video, "predict", lambda ranks: PREDICTED)
    result = video.run(minutes=60, device="cpu")
    assert tried == [16, 64] and [row["frames"] for row in result["cases"]] == [16, 16, 64, 256, 1024]
    assert result["left_out"] == {
        "FreeNoise, 64 frames": "it does not fit into the memory of the GPU",
        "FreeNoise, 256 frames": "a shorter film did not fit into the memory of the GPU",
        "FreeNoise, 1024 frames": "it holds all frames at once",
    }
    # 0.05 s a frame and step, 288 frames a device and 20 steps
    assert result["whole_run"]["minutes"] == pytest.approx(0.05 * 288 * 20 / 60, rel=0.01)
    assert "2,304 frames on 8 devices like this one take 4.8 minutes for 20 steps" in capsys.readouterr().out


def test_the_meter_sees_what_lives_at_once():
    with video.Meter() as meter:
        x = torch.zeros(1000)  # 4,000 bytes
        for _ in range(5):
            x = x + 1  # the old one goes when the new one is there
    assert meter.most == 8000 and meter.now == 4000


def test_the_memory_of_a_view_of_what_was_given_is_not_what_a_part_made():
    film = torch.zeros(100, 1000)
    clip = film[2:4]
    with video.working_set() as found:
        video.stream.run_part(lambda x: x.view(-1) + 1, [clip], {})
    assert found["bytes"] == 2 * 8000  # the clip, and as much made of it


def test_a_film_is_weighed_without_gradients(monkeypatch):
    seen = []
    monkeypatch.setattr(
        video.stream,
        "run_part",
        lambda forward, *given: seen.append(torch.is_grad_enabled()) or forward(*given[0], **given[1]),
    )
    model = copy.deepcopy(tiny.animatediff())
    video.ours(model, 17, torch.device("cpu"))
    assert seen and not any(seen)


def test_the_working_set_is_that_of_a_clip():
    model, most = copy.deepcopy(tiny.animatediff().unet), {}
    install(model, "dual-scope", window=4, anchors=2)
    for frames in (32, 64):
        with streamed(model, frames, clip=4, comm=Comm()), video.working_set() as found:
            tiny.denoise_video(model, frames)
        most[frames] = found["bytes"]
    assert 0 < most[64] < 1.1 * most[32]  # the first and the last window reach fewer frames


def test_the_prediction_has_the_sizes_of_the_full_model():
    two, eight = video.predict(2), video.predict(8)
    # 191 MB per exchanged frame: 8 frames of a halo and 8 of 16 anchors go one way between two ranks.
    assert two["sent_mb_by_the_busiest"] == pytest.approx(16 * 191, rel=0.01)
    assert 0 < eight["efficiency"] < two["efficiency"] < 1
    # What all share is passed on, so the busiest of many sends little more than one of a few.
    assert video.predict(256)["sent_mb_by_the_busiest"] < 1.25 * eight["sent_mb_by_the_busiest"]
