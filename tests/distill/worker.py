"""One process of a run, started by torchrun: `worker.py FOLDER`, on the samples and configuration in the folder."""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch
import torch.distributed as dist

from reattend.distill import DistillConfig, distill, make_dataset
from reattend.distill.shards import Samples
from reattend.pipelines import CancelToken


def main() -> None:
    faulthandler.dump_traceback_later(250, exit=True)  # a hanging process says where
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pipe = tiny.fresh(tiny.flux_pipeline())
    part = (dist.get_rank(), dist.get_world_size())
    made = folder / "made"
    make_dataset(
        pipe, made, prompts=["a cat", "a dog"], samples=4, steps=1, shard=1, sizes=[(32, 32)], text_length=8, part=part
    )
    dist.barrier()
    assert len(Samples(made)) == 4
    config = DistillConfig.read(folder / "config.json")
    for name in ("ddp", "fsdp"):
        pipe = tiny.fresh(tiny.flux_pipeline())
        there = replace(config, parallel=name, out=folder / name)
        token = CancelToken()
        ended = distill(there, pipe=pipe, cancel=token, on_step=lambda event, token=token: token.request())
        assert not ended.finished  # a stop on one process stops all, after the step it was in or the next
        assert ended.step < config.steps
        if name == "fsdp":
            pipe = tiny.fresh(tiny.flux_pipeline())  # a sharded model is of no further use
        assert distill(there, pipe=pipe).finished
    begun = replace(config, out=folder / "begun")  # by one process
    assert distill(begun, pipe=tiny.fresh(tiny.flux_pipeline())).finished
    pipe = copy.deepcopy(tiny.flux_pipeline()).to(torch.bfloat16)
    half = replace(config, parallel="fsdp", precision="bfloat16", steps=2, out=folder / "fsdp-bfloat16")
    assert distill(half, pipe=pipe).finished
    del pipe
    gc.collect()  # sharded modules that outlive their group keep the interpreter from ending
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
