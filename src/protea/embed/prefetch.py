"""An iterator that works ahead in its own thread."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Final, NamedTuple, TypeVar

Item = TypeVar("Item")

_POLL: Final = 0.05  # seconds between two checks whether the consumer has stopped
_PATIENCE: Final = 1.0  # seconds to wait for the end of a thread that may itself wait for input


class _StoppedError(Exception):
    """Ends a chain of prefetching generators after ``stop`` was set."""


class _End(NamedTuple):
    error: BaseException | None


def prefetch(items: Iterator[Item], depth: int, stop: Event, *, may_block: bool = False) -> Generator[Item]:
    """Yield the same items in the same order; a thread makes up to ``depth`` of them in advance.

    An exception is raised in place of the next item. Closing the generator sets ``stop``, waits for the current item
    and closes ``items``. The queues are ``SimpleQueue``, whose operations a signal cannot interrupt; ``Queue`` has
    locks in Python code, and a KeyboardInterrupt inside them would leave them locked.

    ``stop`` ends all generators of a chain, each after its current item. With ``may_block``, ``items`` may wait for
    input that never comes, and its thread is not waited for.
    """
    queue: SimpleQueue[Item | _End] = SimpleQueue()
    places: SimpleQueue[None] = SimpleQueue()
    for _ in range(depth):
        places.put(None)

    def put(item: Item) -> None:
        while not stop.is_set():
            try:
                places.get(timeout=_POLL)
            except Empty:
                continue
            queue.put(item)
            return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    break
        except BaseException as error:  # raised again in the consumer
            queue.put(_End(error))
        else:
            queue.put(_End(_StoppedError() if stop.is_set() else None))
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    ended = False
    try:
        while True:
            try:
                item = queue.get(timeout=_POLL)
            except Empty:
                if stop.is_set():
                    raise _StoppedError from None
                continue
            if isinstance(item, _End):
                ended = True
                if item.error is not None:
                    raise item.error
                return
            places.put(None)
            yield item
    finally:
        if not ended:
            stop.set()
        thread.join(_PATIENCE if may_block else None)
