"""A call has so much time and no more, and one that never returns keeps no process from ending."""

import subprocess
import sys
import threading

import pytest

from pivot_plugin.deadline import Overdue, within

NEVER = """
import threading
from pivot_plugin.deadline import Overdue, within
try:
    within(0.05, threading.Event().wait)
except Overdue:
    print("overdue")
"""


def test_what_a_call_returns_or_raises_in_time_is_returned_or_raised() -> None:
    assert within(10, lambda: [1, 2]) == [1, 2]
    assert within(10, lambda: None) is None
    assert within(10, lambda: threading.current_thread().name, "reward length") == "reward length"
    for error in (ZeroDivisionError("by zero"), TimeoutError("of its own"), KeyboardInterrupt()):

        def fails(error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            within(10, fails)
        # a time limit that the call itself has is not this one
        assert caught.value is error and not isinstance(caught.value, Overdue)


def test_a_call_that_takes_longer_goes_on_by_itself() -> None:
    may_end, ended = threading.Event(), threading.Event()

    def slow() -> None:
        may_end.wait(30)
        ended.set()

    with pytest.raises(Overdue, match="no answer within 0 s"):
        within(0.05, slow)
    assert not ended.is_set()
    may_end.set()
    assert ended.wait(10)


def test_a_call_that_never_returns_keeps_no_process_from_ending() -> None:
    run = subprocess.run([sys.executable, "-c", NEVER], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "overdue"
