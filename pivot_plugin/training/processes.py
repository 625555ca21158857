"""The processes of one run: they begin alike, and when one fails all end, with the first one's message.

A process that fails alone leaves the others in a collective, where they wait for minutes or end with the words of a
broken connection. So the first to fail says so in the store by which torch's processes have found each other. In every
process a thread looks there twice a second, and calls its process out of what it does; one that waits in a collective
returns when the failed one has left, and is ended where it does not. torchelastic's error file, where a launcher has
named one, is written by the first alone, so that its summary ends with that message too.

A process that was killed says nothing. Its connections break, and the threads' beats tell whose.
"""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from pivot_plugin.errors import PeerError, PivotError, SettingsError, TrainingError, said
from pivot_plugin.files import first_difference

FAILURE, HEARD, INTERRUPTED, STOP_AFTER = "failure", "heard", "interrupted", "stop-after"
SECONDS_BETWEEN_LOOKS = 0.5
# that a failed process waits for the others to hear of it, before it leaves and perhaps takes the store along
SECONDS_TO_BE_HEARD = 5.0
# after which a process is ended that does not end by itself
SECONDS_TO_LEAVE = 15.0
# in which processes that fail alike have all failed
SECONDS_TO_FAIL_ALIKE = 3.0
# beats that tell a process that is there from one that has gone
SECONDS_OF_BEATS = 2.5
# that the others wait for the first to fail to print what it has to say
SECONDS_FOR_WORDS = 1.5


@dataclass(frozen=True)
class Failure:
    """What the first process to fail has to say.

    Attributes:
        rank: its number.
        host: where it runs.
        kind: class of the error.
        finding, remedy: as for `PivotError`.
    """

    rank: int
    host: str
    kind: str
    finding: str
    remedy: str

    def as_seen_by_others(self, count: int) -> PeerError:
        """The error of the processes that it takes along.

        Args:
            count: of processes.
        """
        interrupted = self.kind == KeyboardInterrupt.__name__
        return PeerError(
            f"Process {self.rank} of {count} on {self.host} has ended the run. {self.finding}",
            self.remedy,
            status=128 + signal.SIGINT if interrupted else 1,
        )


class Processes:
    """The processes that were launched together for one run; a single one needs nothing of all this.

    Args:
        state: accelerate's, of this process.
        store: of all processes; that of torch's process group where None.

    Attributes:
        rank: number of this process.
        count: how many there are.
        in_step: whether all processes have left training at the same place, so that collectives still match.
    """

    def __init__(self, state: PartialState | None, store: Store | None = None) -> None:
        self.rank = state.process_index if state is not None else 0
        self.count = state.num_processes if state is not None else 1
        self.in_step = self.count == 1
        self._host = socket.gethostname()
        self._done = threading.Event()
        self._first: Failure | None = None
        self._stoppable = False
        self._asked_to_stop = False
        self._store: Store | None = None
        if self.count > 1 and store is None and dist.is_initialized():
            store = _get_default_store()
        if self.count > 1 and store is not None:
            # runs come one after another, and every process counts them by itself
            run = store.add(f"pivot/runs/{self.rank}", 1)
            self._store = PrefixStore(f"pivot/{run}", store)

    # Failing together

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do the whole of a run meanwhile, from its checks to its record.

        Raises:
            PeerError: if another process has failed first; it prints nothing where nobody catches it.
            TrainingError: if another process has gone without a word, or for what this package does not raise on
                purpose.
        """
        if self._store is None:
            yield
            return
        self._store.set(f"place/{self.rank}", f"{self._host}, process id {os.getpid()}")
        watcher = threading.Thread(target=self._watch, name="pivot-processes", daemon=True)
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT) if in_main else None
        if in_main:
            signal.signal(signal.SIGINT, self._on_interrupt)
        watcher.start()
        try:
            yield
        except BaseException as error:
            failure = self._failed(error)
            if failure is error:
                raise
            # the words of a broken connection tell nothing
            raise failure from failure.__cause__
        finally:
            self._done.set()
            watcher.join()
            if in_main:
                signal.signal(signal.SIGINT, before)

    def _failed(self, error: BaseException) -> BaseException:
        """The error to end with, after an error of this process."""
        if isinstance(error, PeerError):
            self._tell_of_another_host()
            self._leave_the_word()
            return error
        assert self._store is not None
        if self._first is not None:
            # the watcher has heard of it, and the store may have gone with the process that failed
            self._tell_of_another_host()
            self._leave_the_word()
            return self._first.as_seen_by_others(self.count)
        gone = ""
        if isinstance(error, Exception) and _is_broken_connection(error) and not self._has_failed():
            if gone := self._gone():
                remedy = getattr(error, "remedy", "") or "Go on with resume=True."
                error = TrainingError(f"{gone} without a word: killed, or out of memory.", remedy)
        elif isinstance(error, Exception) and not isinstance(error, PivotError):
            error = _named(error)
        own = self._described(error, f"In process {self.rank} of {self.count}: " if not gone else "")
        try:
            first = Failure(**json.loads(self._store.compare_set(FAILURE, "", json.dumps(asdict(own)))))
        except RuntimeError:
            # with its process went the store
            first = own if self._first is None else self._first
        if first != own:
            self._first = first
            self._has_heard(self._store)
            self._tell_of_another_host()
            self._leave_the_word()
            return first.as_seen_by_others(self.count)
        with suppress(OSError):
            get_error_handler().record_exception(error)
        self._wait_to_be_heard()
        if isinstance(error, PivotError):
            error.finding = own.finding
        return error

    def _described(self, error: BaseException, where: str) -> Failure:
        finding, remedy = (error.finding, error.remedy) if isinstance(error, PivotError) else (said(error), "")
        # some findings name the process by themselves
        named = finding.startswith(f"Process {self.rank} of {self.count} ")
        return Failure(self.rank, self._host, type(error).__name__, finding if named else where + finding, remedy)

    def _has_failed(self) -> bool:
        """Whether a process has said that it failed."""
        if self._first is not None or self._store is None:
            return self._first is not None
        try:
            return bool(self._store.check([FAILURE]))
        except RuntimeError:
            return False

    def _has_heard(self, store: Store) -> None:
        with suppress(RuntimeError):
            store.set(f"{HEARD}/{self.rank}", "")

    def _wait_to_be_heard(self) -> None:
        assert self._store is not None
        until = time.monotonic() + SECONDS_TO_BE_HEARD
        others = [f"{HEARD}/{rank}" for rank in range(self.count) if rank != self.rank]
        with suppress(RuntimeError):
            while not self._store.check(others) and time.monotonic() < until:
                time.sleep(SECONDS_BETWEEN_LOOKS / 5)

    def _leave_the_word(self) -> None:
        """Wait a moment: a launcher ends all when the first has gone, and what failed first is still to be printed.

        Without a launcher nobody does, and the first process takes the store along.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return
        if threading.current_thread() is threading.main_thread():
            # it is leaving already, and may be called out all the same
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(SECONDS_FOR_WORDS)

    def _tell_of_another_host(self) -> None:
        """Say once on every other host what its log would not have."""
        if self._first is not None and self._first.host != self._host and os.environ.get("LOCAL_RANK") == "0":
            print(f"pivot: {self._first.as_seen_by_others(self.count)}", file=sys.stderr, flush=True)

    def _gone(self) -> str:
        """Which processes do not beat any more, as the beginning of a sentence; empty where all do."""
        assert self._store is not None
        try:
            before = self._beats()
            time.sleep(SECONDS_OF_BEATS)
            now = self._beats()
            gone = [rank for rank in range(self.count) if rank != self.rank and now[rank] == before[rank]]
            places = [
                f"process {rank} of {self.count} ({self._store.get(f'place/{rank}').decode()})"
                if self._store.check([f"place/{rank}"])
                else f"process {rank} of {self.count}"
                for rank in gone
            ]
        except RuntimeError:
            launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            return f"{'The launcher of the first host' if launcher else f'Process 0 of {self.count}'} has gone"
        if not gone:
            return ""
        named = " and ".join(places)
        return f"{named[0].upper()}{named[1:]} {'has' if len(gone) == 1 else 'have'} gone"

    def _beats(self) -> list[int]:
        assert self._store is not None
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self.count)]

    def _watch(self) -> None:
        """Beat, and look whether another process has failed; in a thread of its own."""
        assert self._store is not None
        store = self._store.clone()
        while not self._done.wait(SECONDS_BETWEEN_LOOKS):
            try:
                store.add(f"beat/{self.rank}", 1)
                if not store.check([FAILURE]):
                    continue
                first = Failure(**json.loads(store.get(FAILURE)))
                if first.rank == self.rank:
                    continue
                self._first = first
                self._has_heard(store)
            except RuntimeError:
                # where all is done the first process may leave a little earlier
                if self._done.wait(SECONDS_TO_BE_HEARD):
                    return
                self._first = self._first or Failure(
                    0, "another host", TrainingError.__name__, "its store has gone with it.", "Go on with resume=True."
                )
            self._call_out()
            return

    def _call_out(self) -> None:
        """Have this process end: by an exception in what it does, by itself where that does not come."""
        assert self._first is not None
        if signal.getsignal(signal.SIGINT) == self._on_interrupt:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not self._done.wait(SECONDS_TO_LEAVE):
            self._tell_of_another_host()
            sys.stderr.flush()
            os._exit(1)

    def _on_interrupt(self, number: int, frame: Any) -> None:
        if self._first is not None:
            raise _CalledOut
        if self._stoppable and not self._asked_to_stop:
            assert self._store is not None
            self._asked_to_stop = True
            self._store.set(INTERRUPTED, str(self.rank))
            return
        raise KeyboardInterrupt

    # Stopping together

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Train meanwhile: the first keyboard interrupt asks all to stop after a step, a second one does not wait."""
        self._stoppable = self._store is not None
        try:
            yield
        finally:
            self._stoppable = False

    def stops_after(self, step: int, every: int = 1) -> bool:
        """Whether all processes stop after this step; to be asked by each of them at the end of every step.

        The first process decides, for a step that has not begun: no other can have ended that step before, since none
        makes a step without the gradients of all.

        Args:
            step: that has ended.
            every: only after a multiple of so many steps.
        """
        if self._store is None:
            return False
        if self._store.check([STOP_AFTER]):
            return step >= int(self._store.get(STOP_AFTER))
        if self.rank == 0 and self._store.check([INTERRUPTED]):
            self._store.set(STOP_AFTER, str((step // every + 1) * every))
        return False

    def failed_alike(self, error: BaseException) -> bool:
        """Whether every process has failed at the same place, so that collectives still match; a few seconds.

        Args:
            error: of this process.
        """
        if self._store is None or self._first is not None or not isinstance(error, PivotError):
            return self.in_step
        with suppress(RuntimeError):
            last = traceback.extract_tb(error.__traceback__)[-1:]
            self._store.set(f"alike/{self.rank}", f"{type(error).__name__} {[(f.name, f.lineno) for f in last]}")
            keys = [f"alike/{rank}" for rank in range(self.count)]
            until = time.monotonic() + SECONDS_TO_FAIL_ALIKE
            while not self._store.check(keys):
                if time.monotonic() > until:
                    return False
                time.sleep(SECONDS_BETWEEN_LOOKS / 5)
            self.in_step = len(set(self._store.multi_get(keys))) == 1
        return self.in_step

    # Beginning alike

    def decided(self, name: str, value: Any = None) -> Any:
        """What the first process has found, in all of them.

        Args:
            name: of what is decided, once a run.
            value: the first process's, as JSON has it; not looked at elsewhere.
        """
        if self._store is None:
            return value
        key = f"decided/{name}"
        if self.rank == 0:
            self._store.set(key, json.dumps(value, default=str))
            return value
        # not by the store's own waiting, out of which nothing calls
        while not self._store.check([key]):
            self._pause()
        return json.loads(self._store.get(key))

    def _pause(self) -> None:
        """A moment of waiting for others, unless one has failed."""
        if self._first is not None:
            raise self._first.as_seen_by_others(self.count)
        time.sleep(SECONDS_BETWEEN_LOOKS / 25)

    def wait(self, name: str) -> None:
        """Wait for all others, so that a failure of one of them is heard of meanwhile.

        Args:
            name: of the place, once a run.
        """
        if self._store is None:
            return
        self._store.add(f"arrived/{name}", 1)
        while self._store.add(f"arrived/{name}", 0) < self.count:
            self._pause()

    def compare(self, name: str, facts: Mapping[str, Any]) -> None:
        """Make sure that this process begins with what the first one begins with.

        Args:
            name: of what is compared, once a run.
            facts: by name, as JSON has them.

        Raises:
            SettingsError: naming the first fact that differs, with both values.
        """
        own = json.loads(json.dumps(facts, default=_without_address))
        difference = first_difference(self.decided(name, own), own)
        if difference is not None:
            what, there, here = difference
            raise SettingsError(
                f"Process {self.rank} of {self.count} (on {self._host}) has {what}={here!r}, process 0 has {there!r}.",
                "Start every process with the same code, settings, model and data.",
            )


class _CalledOut(BaseException):
    """Raised in what a process does when another has failed; no probe, row or reward may take it for its own error."""


def _is_broken_connection(error: BaseException) -> bool:
    """Whether an error, or what it came from, is one of the connection to other processes."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistError) or "gloo/transport" in str(cause):
            return True
        cause = cause.__cause__
    return False


def _without_address(value: Any) -> Any:
    """What a fact says of something that JSON does not know, the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _named(error: Exception) -> TrainingError:
    named = TrainingError(f"Stopped by {said(error)}.", "What stood in the run's folder before is kept.")
    named.__cause__ = error
    return named
