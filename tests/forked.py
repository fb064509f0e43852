"""Ranks as processes, with the environment that torchrun gives, but forked from one that has imported everything.

A short job spends nearly all its time importing: torchrun itself once and every rank again. Here it is once for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

STARTER = """
import importlib, json, os, socket, sys, traceback

size, folder, modules, work = json.loads(sys.argv[1])
sys.path.insert(0, folder)
for name in modules:
    importlib.import_module(name)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size))
ranks = []
for rank in range(size):
    ranks.append(os.fork())
    if ranks[-1] == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        code = 1
        try:
            exec(work, {"__name__": "__main__"})
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in ranks]))
"""


def forked(size: int, work: str, modules: Sequence[str], timeout: float = 280) -> subprocess.CompletedProcess:
    """Run the Python text `work` in `size` processes that have `modules` imported; the exit code is 0 if all are well.

    No module may start threads when it is imported.
    """
    arguments = json.dumps([size, str(Path(__file__).parent), list(modules), work])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", STARTER, arguments], capture_output=True, text=True, timeout=timeout, env=environment
    )
