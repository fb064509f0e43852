"""The processes of a run, by accelerate: who is who, what they sum, and how the model is shared.

Started by torchrun or `accelerate launch`, else one process. "ddp": every process holds the model, gradients are averaged.
"fsdp": torch's `fully_shard` (FSDP2) cuts the weights of every block over the processes; we call it ourselves, because
accelerate leaves its FSDP plug-in out on a CPU without a word.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import DistillConfig

__all__ = ["Ranks", "check_device"]

TIMEOUT = timedelta(
    days=1
)  # ranks wait for one another while samples or pictures are made, some much longer than others
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # ours -> accelerate's


class Ranks:
    """This process among those of the run. Every method that speaks of all processes is called by all of them."""

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.rank, self.size = accelerator.process_index, accelerator.num_processes

    @classmethod
    @contextlib.contextmanager
    def joined(cls, config: DistillConfig) -> Iterator[Ranks]:
        """Join the processes there are, for the length of a with block."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import InitProcessGroupKwargs

        check_device(config.precision)
        _check_launch(config)
        there = dist.is_initialized()
        alone = int(os.environ.get("WORLD_SIZE", "1")) < 2
        if config.parallel == "fsdp" and alone:
            raise ValueError(
                "parallel='fsdp' shares one model between processes, and this is one: start it with torchrun "
                "--nproc-per-node N -m reattend.ui.cli distill run ..., or use parallel='ddp'"
            )
        if missing := sorted(set(config.trackers) - {str(name.value) for name in get_available_trackers()}):
            raise ValueError(
                f"tracker {missing[0]!r} is not installed; pip install {missing[0]}, or take it out of trackers"
            )
        AcceleratorState._reset_state()  # it keeps the precision of the last run in this process
        with _without_cudnn_attention():
            accelerator = Accelerator(
                cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available(),
                mixed_precision=PRECISIONS[config.precision],
                log_with=list(config.trackers) or None,
                project_dir=config.out,
                step_scheduler_with_optimizer=False,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
            )
            try:
                yield cls(accelerator)
            finally:
                _finish(accelerator.trackers)
                AcceleratorState._reset_state(reset_partial_state=True)
                if dist.is_initialized() and not there:
                    gc.collect()  # sharded modules that outlive their group keep the interpreter from ending
                    dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def accumulation(self, config: DistillConfig) -> int:
        """Micro batches of each process per step. Raises ValueError if the batch cannot be cut so."""
        together = config.micro_batch * self.size
        if config.batch % together:
            raise ValueError(
                f"a batch of {config.batch} cannot be cut into micro batches of {config.micro_batch} on {self.size} "
                f"processes; choose a batch that is a multiple of {together}, or a smaller micro_batch"
            )
        return config.batch // together

    def places(self, config: DistillConfig) -> list[list[int]]:
        """For each of this process's micro batches the places of its samples in the batch."""
        micro = config.micro_batch
        starts = [(number * self.size + self.rank) * micro for number in range(self.accumulation(config))]
        return [list(range(start, start + micro)) for start in starts]

    def wrapped(self, model: nn.Module, config: DistillConfig) -> nn.Module:
        """The model as the student's forward calls it; with "fsdp" it is sharded in place."""
        if self.size == 1:
            return model
        if config.parallel == "ddp":
            for name, parameter in model.named_parameters():  # else DDP would leave the student's out
                parameter.requires_grad_(".reattend_" in name and ".base." not in name)
            here = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(model, device_ids=here, broadcast_buffers=False)
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(self.device.type, (self.size,))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".reattend_" in name and ".base." not in name)
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for blocks in reversed(lists):  # what is inside first, as fully_shard wants it
            for block in blocks:
                if any(hasattr(part, "processor") for part in block.modules()):
                    fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def syncing(self, wrapped: nn.Module, last: bool) -> Iterator[None]:
        """Gradients of the block are averaged over the processes in its backward if it is the last of a step."""
        if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not last:
            with wrapped.no_sync():
                yield
            return
        if hasattr(wrapped, "set_requires_gradient_sync"):
            wrapped.set_requires_gradient_sync(last)
        yield

    def clip(self, optimizer: Any, parameters: list[nn.Parameter], most: float) -> float:
        """Scale the gradients down to a norm of at most `most`, 0 = leave them; returns the norm before."""
        self.accelerator.unscale_gradients(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, most or math.inf)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def any(self, flag: bool) -> bool:
        """Whether it is True on any process."""
        if self.size == 1:
            return flag
        told = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes."""
        if self.size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def track(self, config: DistillConfig) -> None:
        """Begin reporting to the trackers of the configuration. Raises ValueError in one sentence if one cannot."""
        if not config.trackers:
            return
        values = json.loads(config.to_json())
        plain = {key: value for key, value in values.items() if isinstance(value, (int, float, str))}
        name = config.out.resolve().name
        own = {"wandb": {"name": name, "dir": str(config.out)}, "trackio": {"name": name}}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some greet, and stdout belongs to results
                self.accelerator.init_trackers("reattend-distill", config=plain, init_kwargs=own)
        except Exception as error:  # each has errors of its own: no account, no network, a version that does not fit
            begun = [tracker.name for tracker in self.accelerator.trackers if _began(tracker)]
            which = next((name for name in config.trackers if name not in begun), config.trackers[-1])
            reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
            raise ValueError(
                f"tracker {which!r} cannot begin: {reason}; mend that, or take it out of trackers"
            ) from error

    def memory(self) -> float:
        """MiB at the peak: of the device's allocator on CUDA, of the process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


@contextlib.contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Its gradients are no numbers for masked keys of some lengths (pytorch issue 196678), and torch prefers it on some cards."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _check_launch(config: DistillConfig) -> None:
    """Raise ValueError for what `accelerate launch` can be asked for and a run has fields of its own for."""
    off, share = ("", "0", "false", "no"), "set parallel=fsdp"
    precision = PRECISIONS[config.precision]
    for name, fine, words in (
        ("USE_FSDP", off, share),
        ("USE_DEEPSPEED", off, share),
        ("USE_MEGATRON_LM", off, share),
        ("USE_PARALLELISM_CONFIG", off, share),
        ("GRADIENT_ACCUMULATION_STEPS", ("", "1"), "set micro_batch, and the rest of the batch is accumulated"),
        ("MIXED_PRECISION", ("", "no", precision), "set precision"),
        ("DYNAMO_BACKEND", (*off, "none"), "train without torch.compile"),
    ):
        told = os.environ.get(f"ACCELERATE_{name}", "")
        if told.lower() not in fine:
            raise ValueError(
                f"accelerate was told ACCELERATE_{name}={told}, which a run does not follow; take it out and {words}"
            )


def check_device(precision: str) -> None:
    """Raise ValueError where nothing here trains in these numbers."""
    if precision == "float16" and not torch.cuda.is_available():
        raise ValueError("precision float16 trains on CUDA only, and there is none; use bfloat16 or float32")


def _began(tracker: Any) -> bool:
    """Whether a tracker of accelerate's has a run, which it has on the first process only, once it was started."""
    return hasattr(tracker, "tracker")


def _finish(trackers: list[Any]) -> None:
    """End reporting. Not by `end_training`, which also takes away a process group that was there before."""
    with contextlib.redirect_stdout(sys.stderr):
        for tracker in filter(_began, trackers):
            if tracker.name == "trackio":  # accelerate's ends the run and leaves it current, to be ended again at exit
                sys.modules["trackio"].finish()
            else:
                tracker.finish()
