"""SHA-256 of a file as it is written, which several threads compare with what is on disk."""

import hashlib
import os
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from psoft_export.checkpoint.safetensors_file import read_fully
from psoft_export.errors import OutputError

_READ_BYTES = 2**20


@dataclass(frozen=True)
class _Stretch:
    """Bytes of a file of `size`; the hash of all that is before them, and of all to their end."""

    size: int
    start: int
    end: int
    before: "hashlib._Hash"
    after: "hashlib._Hash"

    def reads_back(self, path: Path) -> bool:
        """Whether the file at `path` is of that size and holds what was written here.

        Raises:
            OutputError: it cannot be read.
        """
        found, buffer = self.before.copy(), memoryview(bytearray(_READ_BYTES))
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != self.size:
                    return False
                for start in range(self.start, self.end, _READ_BYTES):
                    piece = buffer[: self.end - start]
                    read_fully(file.fileno(), piece, start)
                    found.update(piece)
        except EOFError:
            return False
        except OSError as cause:
            raise OutputError(f"{path}: cannot be read ({cause.strerror})") from cause
        return found.digest() == self.after.digest()


class WrittenHash:
    """SHA-256 of bytes in order, which keeps its state on the way.

    A hash goes on from any of its states, so that stretches of the file can be read back side by
    side; together they say as much as the hash of the whole.
    """

    def __init__(self, size: int, stretches: int) -> None:
        """Start with nothing.

        Args:
            size: bytes to come.
            stretches: how many to keep apart.
        """
        self._ends = [size * part // stretches for part in range(1, stretches)]
        self._hash = hashlib.sha256()
        self._count = 0
        self._states = [(0, self._hash.copy())]

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        self._hash.update(data)
        self._count += len(data)
        kept = len(self._states) - 1
        if kept < len(self._ends) and self._count >= self._ends[kept]:
            self._states.append((self._count, self._hash.copy()))

    def hexdigest(self) -> str:
        """The hash of all bytes so far, in hexadecimal."""
        return self._hash.hexdigest()

    def read_back(self, path: Path, pool: Executor) -> list[Future[bool]]:
        """Compare the file at `path` with all bytes so far, each stretch in a thread of `pool`.

        Returns:
            For each stretch whether that is so; the file holds these bytes, and no others, where
            it is so for all.
        """
        states = [*self._states, (self._count, self._hash.copy())]
        stretches = [
            _Stretch(self._count, start, end, before, after)
            for (start, before), (end, after) in pairwise(states)
        ]
        return [pool.submit(stretch.reads_back, path) for stretch in stretches]
