"""A process of `reattend video` under torchrun is killed in the middle: the other one ends, and says who is missing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from reattend.pipelines.checkpoint import parts_folder
from reattend.pipelines.film import partial

PATIENCE = 120  # seconds, as the machine may be busy
FILM = ["a red cat", "--frames", "6", "--steps", "900", "--width", "32", "--height", "24", "--seed", "3"]
SCOPES = ["--attention", "dual-scope", "window=3", "anchors=2"]


def rank_of(launcher: int, rank: int) -> int:
    """The process that torchrun started as this rank."""
    for children in Path(f"/proc/{launcher}/task").glob("*/children"):
        for child in children.read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
def test_the_process_that_is_left_ends_with_the_name_of_the_one_that_was_killed(tmp_path):
    model, out = tmp_path / "tiny-video", tmp_path / "cat.mp4"
    tiny.animatediff().save_pretrained(model)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["reattend.ui.cli", "video", *FILM, *SCOPES, "--model", str(model), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        end = time.monotonic() + PATIENCE
        while not parts_folder(out).exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
        time.sleep(2)  # it is held before the first step; nine hundred take longer
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        said, _ = process.communicate(timeout=PATIENCE)
    finally:
        with contextlib.suppress(ProcessLookupError):  # torchrun, and ranks it may have left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 1, said
    assert "reattend: rank 0 waited in vain for rank 1 of 2 in" in said, said
    assert "Ctrl-C" not in said
    assert not out.exists() and not partial(out).exists() and not parts_folder(out).exists()
