"""Films made in tests: by one process, or by ranks that are threads."""

from __future__ import annotations

import copy
import threading

import tiny
import torch
from lockstep import lockstep

from reattend.pipelines import Cancelled, CancelToken, filming, long_video

EXACT = 1e-5  # fp32, relative to the largest value: the same sums in another order


class Watch:
    """Keeps the latents after each step; asks for a stop after some."""

    def __init__(self, stop_after: int | None = None):
        self.token, self.stop_after, self.latents, self.events = CancelToken(), stop_after, {}, []

    def __call__(self, event) -> None:
        self.events.append(event)
        if event.latents is not None:
            self.latents[event.step] = event.latents.clone()
        if event.step == self.stop_after:
            self.token.request()


def make(pipe, wanted, out, stop_after=None, **more) -> Watch:
    watch = Watch(stop_after)
    try:
        long_video(wanted, out, pipe=pipe, on_step=watch, cancel=watch.token, clip=3, **more)
    except Cancelled:
        assert stop_after is not None
    return watch


def make_on_ranks(
    monkeypatch, size, wanted, out, change=lambda pipe: None, build=tiny.animatediff, each=lambda rank: {}, **more
) -> dict[int, torch.Tensor]:
    """The film's latents after each step, made by ranks that are threads.

    wanted: the recipe, or a function of the rank.
    change: what is done to each rank's pipeline before.
    build: gives a pipeline to copy.
    each: further arguments of a rank.
    """
    comms: dict[int, object] = {}
    monkeypatch.setattr(filming.Comm, "of_group", lambda group=None: comms[threading.get_ident()])
    pipes = [tiny.fresh(build()) for _ in range(size)]

    def work(comm):
        comms[threading.get_ident()] = comm
        change(pipes[comm.rank])
        pipes[comm.rank].tokenizer = copy.deepcopy(pipes[comm.rank].tokenizer)  # not made for threads
        mine = wanted(comm.rank) if callable(wanted) else wanted
        return make(pipes[comm.rank], mine, out, **more, **each(comm.rank)).latents

    made = lockstep(size, work)
    monkeypatch.undo()
    return {step: torch.cat([latents[step] for latents in made], dim=2) for step in made[0]}


def close(got, want) -> None:
    torch.testing.assert_close(got, want, atol=EXACT * float(want.abs().max()), rtol=0)
