"""Signals that ask a job to stop."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from reattend.pipelines.events import CancelToken, stoppable


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once_and_signals_are_given_back(number):
    before, token, said = signal.getsignal(number), CancelToken(), []

    def work():
        with stoppable(token, said.append):
            os.kill(os.getpid(), number)
            assert token.requested and said == [number]
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(number) is before and said == [number]


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: stoppable(CancelToken(), print).__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
