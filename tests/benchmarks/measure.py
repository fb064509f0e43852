"""Time and peak memory of one run, and what it ran on: shared by the benchmarks.

Peak memory is what a run needs on top of what was in use when it began. On CUDA the allocator tells it. On Linux it is
the growth of the resident set: the kernel's high-water mark (VmHWM) is reset before the run, after free heap pages went
back. Elsewhere there is no such number, and it is None rather than a guess.

Pages that went back must be fetched again, which work that repeats does not do: where that takes a share of the time, a run
is weighed once (`measured`), and others are timed (`timed`).
"""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["Run", "measured", "surroundings", "timed"]

PACKAGES = ("reattend", "torch", "diffusers", "tomesd")


@dataclass(frozen=True)
class Run:
    """One run: wall-clock seconds, and MiB at the peak above the start (None where it cannot be told)."""

    seconds: float
    peak_mib: float | None


def measured(work: Callable[[], Any], device: torch.device) -> Run:
    """Run `work` once, without gradients."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before: float | None = torch.cuda.memory_allocated(device)
    else:
        before = _reset_resident_peak()
    seconds = timed(work, device)
    peak = torch.cuda.max_memory_allocated(device) if cuda else _status("VmHWM")
    return Run(seconds, None if before is None or peak is None else max(0.0, peak - before) / 2**20)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one run of `work`, without gradients."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.no_grad():
        work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def surroundings(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions, JSON-able."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _reset_resident_peak() -> float | None:
    """Bytes resident now, with the high-water mark set to it; None where the system cannot do that."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    try:
        reset.write_text("5")  # see proc(5)
    except OSError:  # some containers forbid it
        return None
    return _status("VmRSS")


def _status(key: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = (line.split() for line in status.read_text().splitlines())
    return next((float(words[1]) * 1024 for words in lines if words[0] == f"{key}:"), None)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
