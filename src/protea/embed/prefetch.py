"""An iterator that works ahead in a thread of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Final, TypeVar

Item = TypeVar("Item")

_POLL: Final = 0.05
"""Seconds between looks at whether the consumer has gone."""


_PATIENCE: Final = 1.0
"""Seconds to wait for a thread that may be waiting for input."""


class _StoppedError(Exception):
    """Ends a chain from within; whoever set ``stop`` is not listening any more."""


class _End:
    """Marks the end, and the exception that came instead of another item."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetch(items: Iterator[Item], depth: int, stop: Event, *, may_block: bool = False) -> Generator[Item]:
    """The same items in the same order, up to ``depth`` of them made in advance.

    An exception arrives where the next item would have. Closing the generator sets ``stop``, waits for the item being
    made, and closes ``items``. Both directions are ``SimpleQueue``, which a signal cannot break off half way; the locks
    of ``Queue`` are Python code, and a KeyboardInterrupt within them leaves them in either state.

    Args:
        items: what to work ahead on.
        depth: how many items wait at most.
        stop: ends all of a chain of prefetching generators at once, each after the item it is at.
        may_block: ``items`` may wait for input that never comes; its thread is then left behind.
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
        except BaseException as error:  # raised again where the item was wanted
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
