"""An iterator that works ahead in a thread of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Final, TypeVar

Item = TypeVar("Item")

_POLL: Final = 0.05
"""Seconds between looks at whether the consumer has gone."""


class _End:
    """Marks the end, and the exception that came instead of another item."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetch(items: Iterator[Item], depth: int) -> Generator[Item]:
    """The same items in the same order, up to ``depth`` of them made in advance.

    An exception arrives where the next item would have. Closing the generator stops the thread after the item it
    is at, and closes ``items``.
    """
    queue: Queue[Item | _End] = Queue(depth)
    stop = Event()

    def put(item: Item | _End) -> None:
        while not stop.is_set():
            try:
                queue.put(item, timeout=_POLL)
            except Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put(item)
                if stop.is_set():
                    break
        except BaseException as error:  # raised again where the item was wanted
            put(_End(error))
        else:
            put(_End())
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = queue.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        try:
            while True:
                queue.get_nowait()
        except Empty:
            pass
        thread.join()
