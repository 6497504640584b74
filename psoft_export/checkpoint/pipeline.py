"""Two small helpers that let reading, computing and writing overlap, a bounded number ahead."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Generic, TypeVar, cast

T = TypeVar("T")
_END = object()


def read_ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """Iterate over `items` in another thread, at most `depth` of them ahead of the caller.

    An item is not asked for before there is room for it, so `depth` bounds the memory. An error
    there is raised here, at its place in the sequence. Leaving the loop early stops the thread
    before the next item.
    """
    results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        iterator = iter(items)
        try:
            while True:
                room.acquire()
                if stop.is_set():
                    break
                results.put((next(iterator), None))
        except BaseException as error:
            results.put((None, error))  # StopIteration too: it ends the loop below
        finally:
            if isinstance(iterator, Generator):
                iterator.close()  # runs its clean-up here, in the thread that ran it

    thread = threading.Thread(target=work, name="psoft-read", daemon=True)
    thread.start()
    try:
        while True:
            item, error = results.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield cast(T, item)
            del item  # the caller is done with it; do not keep it while waiting for the next
    finally:
        stop.set()
        room.release()
        thread.join()


class WriteBehind(AbstractContextManager["WriteBehind[T]"], Generic[T]):
    """Calls `consume` for each item in another thread, at most `depth` items behind.

    An error there is raised by the next `put`, or at the end of the `with` block.
    """

    def __init__(self, consume: Callable[[T], None], depth: int) -> None:
        """Start the thread."""
        self._consume = consume
        self._items: queue.Queue[object] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="psoft-write", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Hand over one item; waits while `depth` are outstanding."""
        if self._error is not None:
            raise self._error
        self._items.put(item)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._items.put(_END)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (item := self._items.get()) is not _END:
            if self._error is None:
                try:
                    self._consume(item)  # type: ignore[arg-type]
                except BaseException as error:
                    self._error = error
