"""Queue, worker and session, with work that does what the test says and never waits for a clock."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest

from reattend.pipelines.recipe import Recipe
from reattend.ui.jobs import HISTORY, Made, Progress, Session, Worker, duration, one_line

SOON = 30  # seconds a test waits for another thread before it fails

RECIPE = Recipe(prompt="a car", seed=1)


def made(seed: int = 1) -> Made:
    return Made(Path("car.png"), Path("car.png.json"), Recipe(prompt="a car", seed=seed), 1.0)


def ended(run):
    """Read a run to its end and return its outcome."""
    for _ in run.updates(every=SOON):
        pass
    return run.outcome


@pytest.fixture
def worker_for():
    workers = []

    def make(work):
        workers.append(Worker(work))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def test_a_run_reports_progress_and_ends_with_what_was_made(worker_for):
    go = threading.Event()

    def work(recipe, token, report):
        report(Progress("Drawing", 1, 2, 5.0))
        assert go.wait(SOON)
        return made(recipe.seed)

    run = worker_for(work).submit(RECIPE)
    updates = run.updates(every=SOON)
    progress, age = next(update for update in updates if update[0] is not None)
    assert (progress.step, progress.steps) == (1, 2)
    assert age >= 0
    go.set()
    assert list(updates) == []
    assert run.outcome.state == "done"
    assert run.outcome.made.recipe.seed == 1


def test_runs_are_made_one_after_another_in_their_order(worker_for):
    go, started, order, at_once = threading.Event(), threading.Event(), [], []
    busy = threading.Lock()

    def work(recipe, token, report):
        at_once.append(busy.acquire(blocking=False))
        started.set()
        assert go.wait(SOON)
        order.append(recipe.seed)
        busy.release()
        return made(recipe.seed)

    worker = worker_for(work)
    runs = [worker.submit(Recipe(prompt="a car", seed=seed)) for seed in (3, 1, 2)]
    assert started.wait(SOON)
    assert [worker.ahead(run) for run in runs] == [0, 1, 2]
    go.set()
    assert [ended(run).state for run in runs] == ["done"] * 3
    assert order == [3, 1, 2]
    assert all(at_once)


def test_stop_ends_a_running_job_at_its_next_check(worker_for):
    started, go = threading.Event(), threading.Event()

    def work(recipe, token, report):
        report(Progress("Drawing", 4, 20, 1.0))
        started.set()
        assert go.wait(SOON)
        token.check()
        raise AssertionError("went on after the stop")

    session = Session(worker_for(work))
    run = session.start(RECIPE)
    assert started.wait(SOON)
    assert session.stop()
    go.set()
    assert ended(run).text == "Stopped at step 4 of 20. Nothing was saved."
    assert not session.busy
    assert not session.stop()


def test_stop_ends_a_waiting_job_at_once(worker_for):
    started, go = threading.Event(), threading.Event()

    def work(recipe, token, report):
        started.set()
        assert go.wait(SOON)
        return made()

    worker = worker_for(work)
    first, second = worker.submit(RECIPE), worker.submit(RECIPE)
    assert started.wait(SOON)
    worker.stop(second)
    assert second.outcome.state == "stopped"
    assert first.outcome is None
    go.set()
    assert ended(first).state == "done"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("width is odd"), "Width is odd."),
        (KeyError("tokens"), "This did not work: 'tokens'. The terminal shows the details."),
    ],
)
def test_a_failure_is_one_sentence_and_the_worker_goes_on(worker_for, error, sentence):
    def work(recipe, token, report):
        if recipe.seed == 0:
            raise error
        return made()

    worker = worker_for(work)
    failed = ended(worker.submit(Recipe(prompt="a car", seed=0)))
    assert (failed.state, failed.text) == ("failed", sentence)
    assert ended(worker.submit(RECIPE)).state == "done"


def test_closing_the_worker_stops_all_runs_and_refuses_more(worker_for):
    started = threading.Event()

    def work(recipe, token, report):
        started.set()
        while True:
            token.check()

    worker = worker_for(work)
    runs = [worker.submit(RECIPE), worker.submit(RECIPE)]
    assert started.wait(SOON)
    worker.close()
    assert [ended(run).state for run in runs] == ["stopped", "stopped"]
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(RECIPE)


def test_a_session_makes_one_thing_at_a_time(worker_for):
    go = threading.Event()

    def work(recipe, token, report):
        assert go.wait(SOON)
        return made()

    session = Session(worker_for(work))
    run = session.start(RECIPE)
    with pytest.raises(ValueError, match="already making"):
        session.start(RECIPE)
    go.set()
    ended(run)
    ended(session.start(RECIPE))


def test_a_session_remembers_the_newest_results_first_and_not_all(worker_for):
    session = Session(worker_for(lambda *_: made()))
    for seed in range(HISTORY + 3):
        session.keep(made(seed))
    assert [m.recipe.seed for m in session.history] == list(range(HISTORY + 2, 2, -1))
    assert session.show(1) is session.shown is session.history[1]
    assert session.show(HISTORY) is None
    assert session.show(-1) is None


def test_a_copy_of_a_session_is_a_new_one_on_the_same_worker(worker_for):
    session = Session(worker_for(lambda *_: made()))
    session.keep(made())
    other = copy.deepcopy(session)
    assert other.worker is session.worker
    assert other.history == []


def test_progress_says_step_and_time_left():
    assert Progress("Loading the model").line(age=0.2) == "Loading the model"
    assert Progress("Loading the model").line(age=12.3) == "Loading the model, 12 s"
    assert Progress("Drawing", 7, 20, 30.0).line(age=4.0) == "Step 7 of 20, 26 s left"
    assert Progress("Drawing", 7, 20, 3.0).line(age=9.0) == "Step 7 of 20, 0.0 s left"
    assert Progress("Drawing", 7, 20).fraction == 0.35
    assert Progress("Loading").fraction is None


def test_durations_read_like_people_say_them():
    assert [duration(s) for s in (0.44, 9.96, 61, 7505)] == ["0.4 s", "10 s", "1 min 1 s", "2 h 5 min"]


def test_an_error_becomes_a_sentence_on_one_line():
    assert one_line(ValueError("bad\n  width")) == "Bad width."
    assert one_line(ValueError()) == "ValueError."
