from __future__ import annotations

import numpy as np
import pytest
import torch

from reattend.emoji_world import layout, world
from reattend.emoji_world.batches import CLOSE_UP, sample_close_up


@pytest.mark.parametrize("count", [1, 2, 3])
def test_labels_of_a_scene_say_what_was_drawn(count: int) -> None:
    rng = np.random.default_rng(count)
    for scene in (world.sample_scene(rng, count) for _ in range(20)):
        labels = {name: each[0].view(16, 16) for name, each in layout.cell_labels([scene], 16, 16).items()}
        found = set()
        for y, x in ((labels["row"] == 1) & (labels["column"] == 1)).nonzero().tolist():  # the upper left corners
            side = int(labels["side"][y, x])
            square = {name: each[y : y + side, x : x + side] for name, each in labels.items()}
            for name in ("kind", "tint", "side"):
                assert (square[name] == square[name][0, 0]).all()
            kind, tint = world.KINDS[square["kind"][0, 0] - 1], layout.TINTS[square["tint"][0, 0] - 1]
            found.add((kind, tint, (x + side / 2) / 16, (y + side / 2) / 16, side / 16))
        assert found == {(one.kind, one.tint, one.x, one.y, one.side) for one in scene.sprites}
        covered = round(sum((one.side * 16) ** 2 for one in scene.sprites))
        assert all((each != layout.NOTHING).sum() == covered for each in labels.values())


def test_labels_of_a_close_up_are_on_its_own_smaller_grid() -> None:
    rng = np.random.default_rng(0)
    for scene in (sample_close_up(rng) for _ in range(20)):
        labels = layout.cell_labels([scene], CLOSE_UP, CLOSE_UP)
        side = round(scene.sprites[0].side * CLOSE_UP)
        assert (labels["kind"] == 1 + world.KINDS.index(scene.sprites[0].kind)).sum() == side**2
        assert labels["row"].max() == side


def test_the_head_reads_hidden_states_that_hold_the_labels() -> None:
    scenes = [world.sample_scene(np.random.default_rng(seed)) for seed in range(4)]
    labels = layout.cell_labels(scenes, 16, 16)
    hidden = torch.cat(
        [torch.nn.functional.one_hot(labels[name], count) for name, count in layout.CLASSES.items()], -1
    ).float()
    head = layout.LayoutHead(hidden.shape[-1])
    start = 0
    with torch.no_grad():
        for name, count in layout.CLASSES.items():
            head.classifiers[name].weight.zero_()
            head.classifiers[name].weight[:, start : start + count] = 50 * torch.eye(count)
            head.classifiers[name].bias.zero_()
            start += count
    assert head(hidden, labels) < 1e-6
    assert head(hidden.flip(0), labels) > 1
