import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from reattend.emoji_world import evaluate as module
from reattend.emoji_world.evaluate import MEASURES, Arm, Evaluation, evaluate, tomesd_arm
from reattend.emoji_world.rates import difference, rate
from reattend.emoji_world.world import draw, is_held_out, sample_captions, sample_scene

STOCK = Arm(name="stock")
AGENT = Arm(name="agent", attention=({"name": "agent", "ratio": 0.5},))


class Painter:
    """Stands in for a pipeline: paints the scene that a caption tells, or a wrong one where an arm says so."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        scenes = []
        while len(scenes) < 200:
            scenes.append(sample_scene(rng))
        # evaluate() draws its captions from the same seed in the same way, so these are among them
        self.scenes = {scene.caption: scene for scene in scenes if is_held_out(scene.caption)}
        self.wrong: set[int] = set()  # seeds whose picture shows nothing
        self.calls: list[tuple[list[str], list[int]]] = []
        self.stop_after: int | None = None
        self.dtype, self.device, self.config, self.components = torch.float32, torch.device("cpu"), {}, {}
        self.scheduler = tiny.sd().scheduler

    def set_progress_bar_config(self, **_: Any) -> None: ...

    def numpy_to_pil(self, values: np.ndarray) -> Any:
        return tiny.sd().numpy_to_pil(values)

    def __call__(
        self, captions: list[str], generator: list[torch.Generator], guidance_scale: float = 7.5, **_: Any
    ) -> Any:
        if self.stop_after == len(self.calls):
            raise KeyboardInterrupt
        seeds = [one.initial_seed() for one in generator]
        self.calls.append((captions, seeds))
        pictures = []
        for caption, seed in zip(captions, seeds, strict=True):
            picture = np.asarray(draw(self.scenes[caption]), np.float32) / 255
            pictures.append(picture * 0 + 0.5 if seed in self.wrong else picture)
        return type("Output", (), {"images": np.stack(pictures)})


@pytest.fixture
def painter() -> Painter:
    return Painter()


def spoiling(name: str, wrong: set[int]) -> Arm:
    @contextlib.contextmanager
    def patch(pipe: Painter) -> Iterator[None]:
        before, pipe.wrong = pipe.wrong, wrong
        try:
            yield
        finally:
            pipe.wrong = before

    return Arm(name=name, patch=patch)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_counts_what_the_pictures_show_and_pairs_the_arms(painter: Painter, tmp_path: Path) -> None:
    result = evaluate(painter, [STOCK, spoiling("half", {1, 3, 5})], out=tmp_path, samples=6, batch=4)
    assert all(found.value == 1 for found in result.rates["stock"].values())
    assert result.rates["half"]["kinds (pictures)"].right == 3
    apart = result.differences["half"]["kinds (pictures)"]
    assert apart.value == -0.5
    assert -1 <= apart.low < -0.5 < apart.high < 0
    assert list(result.differences) == ["half"]


def test_arms_get_the_same_held_out_captions_and_seeds(painter: Painter, tmp_path: Path) -> None:
    evaluate(painter, [STOCK, spoiling("other", set())], out=tmp_path, samples=5, batch=2, seed=0)
    assert painter.calls[0::2] == painter.calls[1::2]
    captions = [caption for call, _ in painter.calls[0::2] for caption in call]
    assert captions == sample_captions(np.random.default_rng(0), 5)
    assert [seed for _, seeds in painter.calls[0::2] for seed in seeds] == [0, 1, 2, 3, 4]


def test_an_interrupted_run_goes_on_and_ends_alike(painter: Painter, tmp_path: Path) -> None:
    arms = [STOCK, spoiling("half", {1, 2})]
    painter.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(painter, arms, out=tmp_path / "a", samples=6, batch=2)
    with (tmp_path / "a" / "results.jsonl").open("a") as file:
        file.write('{"arm": "half", "sam')  # a line that was being written
    painter.stop_after, painter.calls = None, []
    resumed = evaluate(painter, arms, out=tmp_path / "a", samples=6, batch=2)
    assert len(painter.calls) == 3
    whole = evaluate(painter, arms, out=tmp_path / "b", samples=6, batch=2)
    assert resumed == whole
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_samples_can_be_added_and_finished_ones_are_not_made_again(painter: Painter, tmp_path: Path) -> None:
    evaluate(painter, [STOCK], out=tmp_path, samples=3)
    painter.calls = []
    result = evaluate(painter, [STOCK], out=tmp_path, samples=5)
    assert [seeds for _, seeds in painter.calls] == [[3, 4]]
    assert result.samples == 5
    assert len(lines(tmp_path)) == 6


@pytest.mark.parametrize(
    "change", [{"steps": 7}, {"guidance": 2.0}, {"seed": 1}, {"arms": [Arm(name="other")]}], ids=str
)
def test_other_settings_do_not_mix_into_a_results_file(
    painter: Painter, tmp_path: Path, change: dict[str, Any]
) -> None:
    evaluate(painter, [STOCK], out=tmp_path, samples=2)
    before = (tmp_path / "results.jsonl").read_bytes()
    arms = change.pop("arms", [STOCK])
    with pytest.raises(ValueError, match="other settings"):
        evaluate(painter, arms, out=tmp_path, samples=2, **change)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_foreign_results_file_is_left_alone(painter: Painter, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("shopping list\n")
    with pytest.raises(ValueError, match="not a file of results"):
        evaluate(painter, [STOCK], out=tmp_path, samples=2)
    assert (tmp_path / "results.jsonl").read_text() == "shopping list\n"


def test_leaves_a_table_a_summary_and_a_contact_sheet(painter: Painter, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(
        painter,
        [STOCK, spoiling("half", {0})],
        out=tmp_path,
        samples=3,
        batch=2,
        command="make table",
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 6), (4, 6), (5, 6), (6, 6)]
    assert all(words in str(result) for words in (*MEASURES, "stock", "half - stock"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["about"]["command"] == "make table"
    assert summary["about"]["versions"]["torch"] == torch.__version__
    assert summary["rates"]["half"]["background"]["asked"] == 3
    from PIL import Image

    with Image.open(tmp_path / "contact.png") as sheet:
        assert sheet.size == (3 * 132, 2 * 132)
    assert not list(tmp_path.rglob("*.part"))


def _evaluate_tiny(out: Path, arms: list[Arm], batch: int) -> tuple[Evaluation, dict[str, np.ndarray]]:
    from PIL import Image

    result = evaluate(tiny.fresh(tiny.sd()), arms, out=out, samples=3, steps=2, batch=batch)
    pictures = {path.name: np.asarray(Image.open(path), int) for path in sorted((out / "pictures").iterdir())}
    return result, pictures


def test_a_real_pipeline_makes_the_same_pictures_in_any_batch(tmp_path: Path) -> None:
    arms = [STOCK, AGENT, tomesd_arm(0.5)]
    _, alone = _evaluate_tiny(tmp_path / "alone", arms, batch=1)
    _, together = _evaluate_tiny(tmp_path / "together", arms, batch=3)
    assert len(alone) == 9
    for name, picture in alone.items():
        assert abs(picture - together[name]).max() <= 1, name  # grey values; rounding of other matrix shapes


def test_arms_act_and_leave_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = tiny.fresh(tiny.sd())
    processors = dict(pipe.unet.attn_processors)
    classes = [type(layer) for layer in pipe.unet.modules()]
    state = torch.random.get_rng_state()
    evaluate(pipe, [STOCK, AGENT, tomesd_arm(0.5)], out=tmp_path, samples=1, steps=2)
    shown = {path.stem: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert len(set(shown.values())) == 3
    assert pipe.unet.attn_processors == processors
    assert [type(layer) for layer in pipe.unet.modules()] == classes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_weights_do_not_mix_into_a_results_file(tmp_path: Path) -> None:
    pipe = tiny.fresh(tiny.sd())
    evaluate(pipe, [STOCK], out=tmp_path, samples=1, steps=1)
    next(pipe.unet.parameters()).data += 1
    with pytest.raises(ValueError, match="model differ"):
        evaluate(pipe, [STOCK], out=tmp_path, samples=1, steps=1)


@pytest.mark.parametrize(
    ("arms", "more", "words"),
    [
        ([], {}, "at least one"),
        ([STOCK, Arm(name="stock")], {}, "no name twice"),
        ([STOCK], {"samples": 0}, "samples is 0"),
        ([STOCK], {"batch": -1}, "batch is -1"),
        ([STOCK], {"steps": 0}, "steps is 0"),
    ],
)
def test_bad_input_gets_one_sentence_before_any_work(
    painter: Painter, tmp_path: Path, arms: list[Arm], more: dict[str, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        evaluate(painter, arms, out=tmp_path, **more)
    assert not painter.calls
    assert not list(tmp_path.iterdir())


def test_arms_with_unknown_attention_or_unusable_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no attention 'agnet'"):
        Arm(name="x", attention=({"name": "agnet"},))
    with pytest.raises(ValueError, match="arm name"):
        Arm(name="a/b")


def test_not_a_number_pictures_are_an_error(painter: Painter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = type("Output", (), {"images": np.full((1, 16, 16, 3), np.nan)})
    monkeypatch.setattr(Painter, "__call__", lambda *_, **__: broken)
    with pytest.raises(RuntimeError, match="NaN"):
        module.evaluate(painter, [STOCK], out=tmp_path, samples=1)


def test_wilson_intervals_match_known_values() -> None:
    found = rate(9, 10)  # 0.596 to 0.982 in any table of Wilson's interval
    assert (found.value, round(found.low, 3), round(found.high, 3)) == (0.9, 0.596, 0.982)
    assert rate(10, 10).high == pytest.approx(1)
    assert rate(10, 10).low < 0.8
    assert str(rate(0, 0)) == "-"


def test_answers_that_depend_on_each_other_tell_less() -> None:
    rng = np.random.default_rng(0)
    asked = np.full(60, 3)
    alone, together = rng.binomial(3, 0.8, 60), 3 * rng.binomial(1, 0.8, 60)
    pooled = rate(int(together.sum()), 180)
    found = rate(together, asked)
    assert (found.right, found.asked, found.value) == (pooled.right, pooled.asked, pooled.value)
    widened = (found.high - found.low) / (pooled.high - pooled.low)
    assert widened == pytest.approx(3**0.5, rel=0.1)  # three answers that always agree are one
    assert rate(together // 3, asked // 3).low == pytest.approx(found.low, abs=0.02)
    free = rate(alone, asked)
    assert (free.high - free.low) / (rate(int(alone.sum()), 180).high - rate(int(alone.sum()), 180).low) < 1.2
    assert rate(asked, asked) == rate(180, 180)
    assert rate([2, 0], [3, 0]) == rate(2, 3)  # one group tells nothing of the others


def test_paired_differences_ignore_what_both_arms_share() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 400)
    right = base.copy()
    right[:8] = 1 - right[:8]
    found = difference(right, base, np.ones(400))
    assert found.high - found.low < 0.04  # unpaired it would be about 0.14
    assert found == difference(right, base, np.ones(400))
    same = difference(base, base, np.ones(400))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_paired_differences_weigh_pictures_by_their_questions() -> None:
    found = difference(np.array([3, 0]), np.array([0, 1]), np.array([3, 1]))
    assert found.value == 0.5
