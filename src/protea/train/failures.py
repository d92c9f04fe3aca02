"""How the processes of one run fail together: with one message, of the first process, and one exit code.

Each process has a thread that tells the others, through the store that all share, that it lives and where it is. The
first failure of any process goes into the store. The first process then says it, and all end, even those that wait in
a collective operation which will never complete. A process that makes no progress for too long is such a failure, too.

To find the process that hangs, each counts, for every group of processes that wait for one another, how often it was
there. Others wait for a process that is behind them, and a process waits for those that it is ahead of.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store

from protea import errors
from protea.errors import ProteaError, TrainingError
from protea.text import printable

INTERRUPTED: Final = 130
_CONTINUE: Final = "the same command continues from the newest checkpoint"
_FAILURE: Final = "failure"
_TOLD: Final = "told"
_LEFT: Final = "left"
_FIRST: Final = "pulse 0"
_ALL: Final = "all"
_PAUSE: Final = 0.25
_SILENT_SECONDS: Final = 3.0
"""A process that has not told for this long that it lives has ended, or hangs."""

_TELL_SECONDS: Final = 15.0
"""How long the others wait for the first process to say what failed."""


class Failure(NamedTuple):
    """What ends a run: the process, the class of the error, its message, and the exit code."""

    rank: int
    kind: str
    message: str
    code: int

    def error(self) -> BaseException:
        """The error, as if this process had it."""
        if self.kind == KeyboardInterrupt.__name__:
            return KeyboardInterrupt()
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, ProteaError):
            return kind(self.message)
        return TrainingError(f"rank {self.rank}: {self.message}")


def failure_of(error: BaseException, rank: int) -> Failure:
    """A failure from the error that a process has."""
    if isinstance(error, KeyboardInterrupt):
        return Failure(rank, KeyboardInterrupt.__name__, "interrupted", INTERRUPTED)
    if isinstance(error, ProteaError):
        return Failure(rank, type(error).__name__, str(error), error.exit_code)
    return Failure(rank, "", f"{type(error).__name__}: {error}", 1)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that a collective operation could not complete."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def late(counts: Mapping[int, Mapping[str, int]]) -> list[int]:
    """The processes for which others wait, and which wait for nobody: who hangs.

    ``counts`` says how often each came to where those of a group wait for one another, by the group's name.
    """

    def ahead(one: int, other: int) -> bool:
        return any(number > counts[other].get(group, number) for group, number in counts[one].items())

    return [
        rank
        for rank in counts
        if any(ahead(other, rank) for other in counts) and not any(ahead(rank, other) for other in counts)
    ]


class Watch:
    """Watches over one process of several; ``seconds`` is the longest time without progress."""

    def __init__(self, store: Store, rank: int, size: int, seconds: float) -> None:
        self._store, self._rank, self._size, self.seconds = store, rank, size, seconds
        self._place, self._since = "the start", time.monotonic()
        self._arrivals: dict[str, int] = {_ALL: 0}
        self._groups: dict[str, Any] = {}
        self._patient = False
        self._ending, self._stopped = threading.Lock(), threading.Event()
        self._beats, self._first, self._heard = 0, b"", time.monotonic()
        self._beat()
        # A client of its own: the other one may wait for a key, and then answers nobody else.
        own: Any = store
        self._thread = threading.Thread(target=self._run, args=(own.clone(),), name="watch", daemon=True)
        self._thread.start()

    def visit(self, place: str = "") -> None:
        """Note progress, and where in the run it is if that changed."""
        self._since = time.monotonic()
        self._place = place or self._place

    def arrive(self, group: str = _ALL) -> None:
        """Note that the process comes to where those of a group wait for one another."""
        self._arrivals[group] = self._arrivals.get(group, 0) + 1
        self.visit()

    def follow(self, groups: Iterable[dist.ProcessGroup]) -> None:
        """Let PyTorch count the operations of these groups, all of which their processes do together."""
        self._groups = {group.group_name: group for group in groups}

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Allow any time for what happens inside."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
            self.visit()

    def stop(self) -> None:
        """All processes are done: end the thread; the first process leaves last, since it may hold the store."""
        self._stopped.set()
        self._thread.join()
        self._store.add(_LEFT, 1)
        if self._rank == 0:
            self._wait(lambda: self._store.add(_LEFT, 0) >= self._size, _TELL_SECONDS)

    def end(self, error: BaseException) -> NoReturn:
        """This process failed: raise what it is to end with, after the first process said the reason."""
        self._ending.acquire()  # for good: the thread leaves the end to this method
        try:
            end = self._told(self._first_failure(error), error)
        except (dist.DistError, RuntimeError):
            # The store is gone, and with it the process that held it. One of the others says so.
            end = TrainingError(f"rank 0 of {self._size} ended, at {self._place}; {_CONTINUE}")
            end = end if self._rank == 1 else SystemExit(1)
        self._stopped.set()
        self._thread.join()
        if end is error:
            raise error
        raise end from None

    def _first_failure(self, error: BaseException) -> Failure:
        if is_lost_connection(error):
            # The process that failed says more.
            self._wait(lambda: self._store.check([_FAILURE]), _SILENT_SECONDS)
            if not self._store.check([_FAILURE]):
                error = self._reason(error)
        return self._propose(self._store, failure_of(error, self._rank))

    def _propose(self, store: Store, failure: Failure) -> Failure:
        """Write a failure to the store; returns the one that came first."""
        return Failure(*json.loads(store.compare_set(_FAILURE, "", json.dumps(failure))))

    def _told(self, failure: Failure, error: BaseException) -> BaseException:
        own = failure.rank == self._rank
        self._listen(self._store)
        speaks = self._store.compare_set(_TOLD, "", str(self._rank)) == str(self._rank).encode()
        self._store.add(_LEFT, 1)
        if self._rank == 0:
            self._wait(lambda: self._store.add(_LEFT, 0) >= self._size, _SILENT_SECONDS)
        lost = is_lost_connection(error)
        if not speaks:
            # An error of Protea itself shows its traceback, too.
            return SystemExit(failure.code) if lost or isinstance(error, ProteaError | KeyboardInterrupt) else error
        return error if own and not lost else failure.error()

    def _listen(self, store: Store) -> None:
        """Wait for the first process, if this is another one, to say what failed; not if it has ended itself."""
        end = time.monotonic() + _TELL_SECONDS
        while self._rank and not store.check([_TOLD]) and time.monotonic() < min(end, self._heard + _SILENT_SECONDS):
            time.sleep(_PAUSE)
            self._hear(store)

    def _hear(self, store: Store) -> None:
        """Note when the first process beats."""
        pulse = store.get(_FIRST) if store.check([_FIRST]) else b""
        if pulse != self._first:
            self._first, self._heard = pulse, time.monotonic()

    def _run(self, store: Store) -> None:
        try:
            while not self._stopped.wait(_PAUSE):
                self._beat(store)
                self._hear(store)
                if store.check([_FAILURE]):
                    self._leave(store, Failure(*json.loads(store.get(_FAILURE))))
                if not self._patient and time.monotonic() - self._since > self.seconds:
                    self._propose(store, failure_of(self._reason(None, store), self._rank))
        except (dist.DistError, RuntimeError):
            # The store is gone. The main thread notices it where it waits for others, if it is not stuck there.
            if not self._stopped.wait(_TELL_SECONDS) and self._ending.acquire(blocking=False):
                os._exit(1)

    def _leave(self, store: Store, failure: Failure) -> None:
        """Another process failed, or the main thread hangs: end this process, if the main thread does not."""
        if not self._ending.acquire(timeout=_PAUSE):
            return
        self._listen(store)
        if store.compare_set(_TOLD, "", str(self._rank)) == str(self._rank).encode():
            kind = "" if failure.code == INTERRUPTED else "error: "
            print(f"protea: {kind}{printable(str(failure.error()) or failure.message)}", file=sys.stderr, flush=True)
        store.add(_LEFT, 1)
        if self._rank == 0:
            self._wait(lambda: store.add(_LEFT, 0) >= self._size, _SILENT_SECONDS)
        os._exit(failure.code)

    def _beat(self, store: Store | None = None) -> None:
        self._beats += 1
        counts = dict(self._arrivals)
        with suppress(RuntimeError):  # a backend may not count
            counts |= {name: group._get_sequence_number_for_group() for name, group in self._groups.items()}
        pulse = json.dumps([self._beats, counts, self._place])
        (store or self._store).set(f"pulse {self._rank}", pulse)

    def _reason(self, error: BaseException | None, store: Store | None = None) -> TrainingError:
        """Who does not answer, and where it was."""
        store = store or self._store
        before = self._pulses(store)
        self._wait(lambda: self._beat(store), _SILENT_SECONDS)
        after = self._pulses(store)
        absent = [rank for rank in range(self._size) if rank not in after]
        silent = [rank for rank, pulse in after.items() if rank != self._rank and pulse == before.get(rank)]
        for rank in absent:
            return TrainingError(f"rank {rank} of {self._size} did not start; start all processes again")
        for rank in silent:
            place = after[rank][2]
            return TrainingError(f"rank {rank} of {self._size} ended or hangs, at {place}; {_CONTINUE}")
        for rank in late({rank: counts for rank, (_, counts, _) in after.items()}):
            place, limit = after[rank][2], f"parallel.timeout is {self.seconds:g} seconds"
            return TrainingError(f"rank {rank} of {self._size} hangs at {place}, and the others wait for it: {limit}")
        why = f": {' '.join(str(error).split())}" if error is not None else ""
        return TrainingError(
            f"the {self._size} processes wait for one another at {self._place}, for longer than parallel.timeout, "
            f"{self.seconds:g} seconds{why}; {_CONTINUE}"
        )

    def _pulses(self, store: Store) -> dict[int, tuple[int, dict[str, int], str]]:
        keys = {rank: f"pulse {rank}" for rank in range(self._size)}
        return {rank: tuple(json.loads(store.get(key))) for rank, key in keys.items() if store.check([key])}

    def _wait(self, done: Callable[[], Any], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            time.sleep(_PAUSE)
