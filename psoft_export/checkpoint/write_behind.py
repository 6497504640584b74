"""Writing in a thread of its own, a bounded number of items behind."""

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

T = TypeVar("T")
_END = object()


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
