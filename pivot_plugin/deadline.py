"""A call that is waited for so long and no longer."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Overdue(TimeoutError):
    """A call has not returned in time."""


def within(seconds: float, call: Callable[[], T], name: str | None = None) -> T:
    """What a call returns, if it does so in time.

    Not by `HfApi.run_as_future` or another pool of threads: pools are waited for when the interpreter ends, so that a
    call that never returns would keep the process from ending.

    Args:
        seconds: to wait.
        call: made in a thread of its own; what it raises is raised here.
        name: of that thread.

    Raises:
        Overdue: if it does not return in time; the call goes on by itself.
    """
    answer: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(call())
        # handed over to the caller's thread, whatever it is
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Overdue(f"no answer within {seconds:.0f} s")
    if failure:
        raise failure[0]
    return answer[0]
