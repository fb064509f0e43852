"""Pictures in the making go the sampler's way, and the target is that of a guided sampler with half steps."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from reattend.emoji_world import batches, guiding


def drawing_of(count: int, passed: int, seed: int) -> guiding.Drawing:
    """Random pictures that have `passed` of ten sampler steps behind them."""
    draw = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn((2, count, 4, 4, 4), generator=draw)
    times = guiding.sampler_times(torch.tensor(passed / 10)).repeat(count)
    return guiding.Drawing(batches.Batch(clean, noise, times, [], 0, ids=ids_of(range(1, 1 + count))))


def ids_of(words: Iterable[int]) -> dict[str, torch.Tensor]:
    """Captions of one word."""
    return {"text_encoder": torch.tensor(list(words)).view(-1, 1)}


EMPTY = ids_of([0])


def curved(mixed: torch.Tensor, ids: dict[str, torch.Tensor], times: torch.Tensor) -> torch.Tensor:
    """A velocity that depends on the picture, the words and the time."""
    return ids["text_encoder"].view(-1, 1, 1, 1) * times.view(-1, 1, 1, 1) - 0.5 * mixed


def sampler(steps: int) -> FlowMatchEulerDiscreteScheduler:
    """As FluxPipeline sets it."""
    stock = FlowMatchEulerDiscreteScheduler(shift=guiding.SHIFT)
    stock.set_timesteps(steps, sigmas=np.linspace(1, 1 / steps, steps))
    return stock


@pytest.mark.parametrize("steps", guiding.STEPS)
def test_pictures_in_the_making_go_the_way_of_the_sampler(steps: int) -> None:
    stock, drawing = sampler(steps), drawing_of(2, passed=0, seed=1)
    drawing.steps[:] = steps
    mixed = drawing.mixed
    for t in stock.timesteps:
        torch.testing.assert_close(drawing.stops()[0], t.repeat(2) / 1000)
        velocity = curved(mixed, drawing.ids, t.repeat(2) / 1000)
        mixed = stock.step(velocity, t, mixed).prev_sample
        drawing.move(curved(drawing.mixed, drawing.ids, drawing.stops()[0]))
    torch.testing.assert_close(drawing.mixed, mixed, atol=1e-5, rtol=0)  # rounding of ten or twenty steps in fp32


def test_finished_pictures_make_room_for_new_ones() -> None:
    drawing = drawing_of(2, passed=9, seed=1)
    drawing.passed[1] = 3
    drawing.move(torch.ones(2, 4, 4, 4))
    kept = drawing.mixed[1].clone()
    clean, noise = torch.zeros(2, 2, 4, 4, 4)
    drawing.renew(batches.Batch(clean, noise + 7, torch.rand(2), [], 1, ids=ids_of([8, 9])))
    assert drawing.passed.tolist() == [0, 4] and drawing.ids["text_encoder"].tolist() == [[8], [2]]
    assert drawing.steps.tolist() == [20, 10]  # those that begin in odd training steps take smaller ones
    assert (drawing.mixed[0] == 7).all() and torch.equal(drawing.mixed[1], kept)
    assert drawing.stops()[0][0] == 1


def test_the_first_pictures_stand_at_the_sampler_step_next_to_their_time() -> None:
    stops = guiding.sampler_times(torch.arange(10) / 10)
    times = torch.tensor([1 - 1e-6, stops[3], stops[3] - 1e-4, stops[9] - 0.1])
    clean, noise = torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2)
    drawing = guiding.Drawing(batches.Batch(clean, noise, times, [], 0))
    assert drawing.passed.tolist() == [0, 3, 3, 9]
    torch.testing.assert_close(drawing.mixed[:, 0, 0, 0], stops[[0, 3, 3, 9]])


@pytest.mark.parametrize(("passed", "guidance"), [(2, 3.0), (5, 3.0), (6, 1.0)])
def test_the_target_is_two_short_steps_of_a_sampler_that_is_guided_where_it_is_noisy(
    passed: int, guidance: float
) -> None:
    drawing, stock = drawing_of(2, passed, seed=2), sampler(20)
    mixed = drawing.mixed
    for t in stock.timesteps[2 * passed : 2 * passed + 2]:
        without, asked = (curved(mixed, ids, t.repeat(2) / 1000) for ids in (ids_of([0, 0]), drawing.ids))
        mixed = stock.step(without + guidance * (asked - without), t, mixed).prev_sample
    drawing.move(guiding.guided_mean(drawing, curved, 3.0, EMPTY))
    torch.testing.assert_close(drawing.mixed, mixed, atol=1e-5, rtol=0)
