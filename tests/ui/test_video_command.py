"""`reattend video`, alone and under torchrun: the same film, and trouble with a name."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from reattend.pipelines import Recipe, Video
from reattend.pipelines.checkpoint import latest, parts_folder
from reattend.ui import video_command
from reattend.ui.cli import main
from reattend.ui.ranks import Ranks

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHORT = [
    "--frames",
    "6",
    "--steps",
    "2",
    "--width",
    "32",
    "--height",
    "24",
    "--attention",
    "dual-scope",
    "window=3",
    "anchors=2",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many as each of several processes has: sums then round alike, and films can be compared to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("models") / "tiny-video"
    tiny.animatediff().save_pretrained(where)
    return where


def frames_of(path: Path) -> np.ndarray:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader])


def film_of(folder: Path) -> list[str]:
    """The options of the film that all these tests make."""
    return ["a red cat", "--model", str(folder), "--seed", "3", "--then", "3", "a blue car", *SHORT]


class Interrupting(video_command.Bar):
    """Presses Ctrl-C after the first step."""

    def __call__(self, event):
        super().__call__(event)
        if event.step == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "cat.mp4"
    assert main(["video", *film_of(folder), "--out", str(out)]) == 0
    return out


def test_it_writes_a_film_with_its_recipe_and_makes_it_again(alone, tmp_path, capsys):
    made = Recipe.read(alone)
    assert made.video == Video(frames=6, fps=8, later=((3, "a blue car"),)) and made.seed == 3
    sheet = ["--sheet", str(tmp_path / "sheet.png")]
    assert main(["video", "--recipe", str(alone), "--out", str(tmp_path), *sheet, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with Image.open(told["sheet"]) as sheet:
        assert sheet.format == "PNG" and sheet.width > sheet.height > 150  # six frames in two rows
    assert Path(told["film"]).name == "a-red-cat-3.mp4" and told["recipe"]["video"]["fps"] == 8 and told["sent"] == 0
    assert np.array_equal(frames_of(Path(told["film"])), frames_of(alone))


def test_two_processes_make_the_film_of_one(alone, folder, tmp_path):
    out = tmp_path / "cat.mp4"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["reattend.ui.cli", "video", *film_of(folder), "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # one process speaks
    assert json.loads(line)["sent"] > 0
    assert np.array_equal(frames_of(out), frames_of(alone))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a cat", "--out", "cat.gif"], "ends in .mp4"),
        (["a cat", "--frames", "0"], "frames is out of range"),
        (["a cat", "--then", "soon", "a car"], "--then cannot read 'soon a car'"),
        (["a cat", "--then", "70", "a car"], "need frames that grow, from 1 to 63"),
        (["a cat", "--sheet", "sheet.jpg"], "the contact sheet is written as PNG: got 'sheet.jpg'"),
        (["a cat", "--clip", "0"], "--clip must be more than 0"),
        (["a cat", "--timeout", "-1"], "--timeout must be more than 0"),
        (["a cat", "--attention", "agent", "ratio=2"], "ratio must be in [0, 1)"),
        (["--resume", "cat.mp4"], "there is no unfinished film cat.mp4"),
        (["a cat", "--resume", "cat.mp4"], "leave out prompt"),
        *[
            (["--resume", "cat.mp4", f"--{name}", *values], f"leave out {name}")
            for name, *values in (
                ("negative", "a dog"),
                ("width", "32"),
                ("height", "32"),
                ("guidance", "3"),
                ("attention", "dual-scope"),
                ("then", "3", "a car"),
                ("blend", "0"),
                ("fps", "8"),
                ("linear", "student"),
                ("dtype", "float32"),
                ("out", "dog.mp4"),
                ("seed", "0"),
            )
        ],
        ([], "no prompt was given"),
    ],
    ids=str,
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["video", *argv]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_film_is_made_from_another_and_goes_on(alone, tmp_path, monkeypatch, capsys):
    model = tmp_path / "video-to-video"
    tiny.animatediff_inputs("VideoToVideo").save_pretrained(model)
    size = ["--steps", "4", "--width", "32", "--height", "24", "--seed", "3"]
    argv = ["video", "a blue car", "--model", str(model), *size, "--video", str(alone), "--strength", "0.5"]
    whole, out = tmp_path / "whole.mp4", tmp_path / "car.mp4"
    assert main([*argv, "--out", str(whole)]) == 0
    made = Recipe.read(whole)
    assert made.video.frames == 6 and made.video.strength == 0.5 and set(made.video.pictures) == {"video"}
    again = tmp_path / "again.mp4"
    assert main(["video", "--recipe", str(whole), "--video", str(alone), "--out", str(again)]) == 0
    assert np.array_equal(frames_of(again), frames_of(whole))

    with monkeypatch.context() as patch:
        patch.setattr(video_command, "Bar", Interrupting)
        assert main([*argv, "--out", str(out)]) == 130
    assert f"--resume {out} --video {alone}\n" in capsys.readouterr().err
    assert main(["video", "--resume", str(out)]) == 2
    assert "needs video: give the film to start from" in capsys.readouterr().err
    assert main(["video", "--resume", str(out), "--video", str(alone)]) == 0
    assert np.array_equal(frames_of(out), frames_of(whole))
    assert main([*argv, "--frames", "5", "--out", str(tmp_path / "five.mp4")]) == 2
    assert "video has 6 pictures, but the film has 5 frames" in capsys.readouterr().err


def test_pictures_are_counted_but_not_read_and_those_for_a_few_frames_are_not_counted(tmp_path):
    poses = tmp_path / "my poses"
    poses.mkdir()
    for i in range(3):
        (poses / f"{i}.png").write_text("no picture")
    command = video_command.Video(prompt="a cat", conditioning_frames=(poses, poses), video=None)
    assert command.to_recipe().video.frames == 3
    assert command._picture_options() == ["--conditioning-frames", str(poses)] * 2
    file = tmp_path / "cat.json"
    file.write_text(Recipe(prompt="a cat", video=Video(frames=7, controlnet_frame_indices=(1, 5, 6))).to_json())
    again = video_command.Video(recipe=file, conditioning_frames=(poses,))
    assert again.to_recipe().video.frames == 7


def test_pictures_for_the_nets_of_a_model(tmp_path, monkeypatch, capsys):
    one, sparse = tiny.fresh(tiny.animatediff_inputs("ControlNet")), tiny.fresh(tiny.animatediff_sparse())
    one.register_modules(controlnet=diffusers.MultiControlNetModel([one.controlnet]))
    poses, empty, out = tmp_path / "poses", tmp_path / "empty", tmp_path / "cat.mp4"
    for folder in (poses, empty):
        folder.mkdir()
    for i in range(2):
        Image.new("RGB", (32, 24), (99 * i, 0, 0)).save(poses / f"{i}.png")
    argv = [
        "video",
        "a cat",
        "--steps",
        "1",
        "--width",
        "32",
        "--height",
        "24",
        "--out",
        str(out),
        "--conditioning-frames",
    ]
    monkeypatch.setattr("reattend.pipelines.load", lambda *_, **__: sparse)
    assert main([*argv, str(poses)]) == 2
    assert (
        "takes pictures for a few frames, which do not tell how long the film is; give --frames"
        in capsys.readouterr().err
    )
    (poses / "1.png").rename(tmp_path / "1.png")
    assert main([*argv, str(poses), "--frames", "3"]) == 0  # one picture, which is the first frame's
    made = Recipe.read(out).video
    assert made.frames == 3 and made.controlnet_frame_indices == (0,)
    (tmp_path / "1.png").rename(poses / "1.png")
    assert main([*argv, str(empty)]) == 2
    assert f"the folder {empty} holds no pictures" in capsys.readouterr().err
    monkeypatch.setattr("reattend.pipelines.load", lambda *_, **__: one)
    assert main([*argv, str(poses), "--conditioning-frames", str(poses)]) == 2
    assert "has one ControlNet here, got 2 times conditioning_frames" in capsys.readouterr().err
    assert main([*argv, str(poses)]) == 0
    assert Recipe.read(out).video.frames == 2


def test_pictures_and_films_do_not_take_each_others_recipes(alone, folder, sd_folder, tmp_path, capsys):
    assert main(["image", "--recipe", str(alone), "--model", str(sd_folder), "--out", str(tmp_path)]) == 2
    assert "the recipe is that of a film" in capsys.readouterr().err
    assert main(["video", "a cat", "--model", str(sd_folder), "--out", str(tmp_path)]) == 2
    assert "makes no film; use an AnimateDiff pipeline" in capsys.readouterr().err


def test_only_ctrl_c_is_told_of_ctrl_c(capsys):
    video_command._keeping(Ranks(), signal.SIGINT)
    assert "keeping what is done; Ctrl-C once more stops at once" in capsys.readouterr().err
    video_command._keeping(Ranks(), signal.SIGTERM)  # as of torchrun when another process has died
    said = capsys.readouterr().err
    assert "asked to end" in said and "Ctrl-C" not in said
    video_command._keeping(Ranks(1, 2), signal.SIGTERM)
    assert capsys.readouterr().err == ""


def test_ctrl_c_keeps_what_is_done_and_resume_finishes_it(alone, folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "cat.mp4"
    argv = ["video", *film_of(folder), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(video_command, "Bar", Interrupting)
        assert main(argv) == 130
    assert f"--resume {out}" in capsys.readouterr().err and latest(parts_folder(out)).step == 1
    assert main(["video", "--resume", str(out)]) == 0
    assert np.array_equal(frames_of(out), frames_of(alone)) and not parts_folder(out).exists()


JOB = """
import datetime, os, signal, sys
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import tiny
from reattend.pipelines import Recipe, Video, load, long_video

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
rank, folder, out, how = dist.get_rank(), *sys.argv[2:5]
recipe = Recipe(prompt="a red cat", seed=3, steps=3, width=32, height=24, model=folder, video=Video(frames=6),
                attention=({"name": "dual-scope", "window": 3, "anchors": 2},))

def on_step(event):
    if rank == 1 and event.step == 2:
        print("now", flush=True)
        os.kill(os.getpid(), getattr(signal, how))

try:
    long_video(recipe, out, on_step=on_step, save_every=0)
except RuntimeError as error:
    print(error, flush=True)
    os._exit(1)
"""


def processes(tmp_path: Path, folder: Path, how: str) -> list[subprocess.Popen]:
    """Two ranks without an agent around them, one of which gets a signal after its second step."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        str(script),
        str(Path(tiny.__file__).parent),
        str(folder),
        str(tmp_path / "cat.mp4"),
        how,
    ]
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT, **settings, "RANK": str(rank)})
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"], ids=["dead", "frozen"])
def test_a_dead_or_frozen_rank_ends_the_other_with_its_name_and_the_film_can_be_finished(folder, tmp_path, how):
    ranks = processes(tmp_path, folder, how)
    try:
        assert ranks[1].stdout.readline() == "now\n"
        began = time.monotonic()
        said, _ = ranks[0].communicate(timeout=200)
        assert time.monotonic() - began < 60  # the time-out is 20 s, and the machine may be busy
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode == 1
    assert "rank 0 waited in vain for rank 1 of 2 in" in said
    out = tmp_path / "cat.mp4"
    assert latest(parts_folder(out)).step in (1, 2) and not out.exists()
    assert main(["video", "--resume", str(out)]) == 0
    assert len(frames_of(out)) == 6
