"""SHA-256 of a file as it is written, which several threads compare with what is on disk."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from psoft_export.checkpoint.uncached import UncachedReader
from psoft_export.errors import OutputError

_READ_BYTES = 2**20


@dataclass(frozen=True)
class Stretch:
    """Bytes of a file; the hash of all that is before them, and of all to their end."""

    start: int
    end: int
    before: "hashlib._Hash"
    after: "hashlib._Hash"

    def reads_back(self, path: Path) -> bool:
        """Whether the file at `path` holds there what was written; read past the page cache.

        Raises:
            OutputError: it cannot be read.
        """
        found = self.before.copy()
        try:
            with path.open("rb", buffering=0) as file:
                reader = UncachedReader(file.fileno(), _READ_BYTES)
                for start in range(self.start, self.end, _READ_BYTES):
                    found.update(reader.read(start, min(_READ_BYTES, self.end - start)))
        except EOFError:
            return False
        except OSError as cause:
            raise OutputError(f"{path}: cannot be read ({cause.strerror})") from cause
        return found.digest() == self.after.digest()


class WrittenHash:
    """SHA-256 of bytes in order, which keeps its state on the way.

    A hash goes on from any of its states, so that stretches of the file can be read back as they
    are on disk, and side by side; together they say as much as the hash of the whole.
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
        self._given = 0

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

    def stretches(self, until: int) -> list[Stretch]:
        """Those that were not given yet and end at byte `until` or before."""
        given = []
        while self._given + 1 < len(self._states) and self._states[self._given + 1][0] <= until:
            (start, before), (end, after) = self._states[self._given : self._given + 2]
            given.append(Stretch(start, end, before, after))
            self._given += 1
        return given

    def end(self) -> None:
        """Let the last stretch end with the last byte so far."""
        self._states.append((self._count, self._hash.copy()))
