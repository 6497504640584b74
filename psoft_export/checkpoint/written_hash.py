"""Hashes of a file as it is written: SHA-256 of the whole, and what compares it with the disk."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import xxhash

from psoft_export.checkpoint.uncached import UncachedReader
from psoft_export.errors import OutputError

_READ_BYTES = 2**20


@dataclass(frozen=True)
class Stretch:
    """Bytes of a file, and their XXH3-128: enough against accidents, at the speed of memory."""

    start: int
    end: int
    digest: bytes

    def reads_back(self, path: Path) -> bool:
        """Whether the file at `path` holds there what was written; read past the page cache.

        Raises:
            OutputError: it cannot be read.
        """
        found = xxhash.xxh3_128()
        try:
            with path.open("rb", buffering=0) as file:
                reader = UncachedReader(file.fileno(), _READ_BYTES)
                for start in range(self.start, self.end, _READ_BYTES):
                    found.update(reader.read(start, min(_READ_BYTES, self.end - start)))
        except EOFError:
            return False
        except OSError as cause:
            raise OutputError(f"{path}: cannot be read ({cause.strerror})") from cause
        return found.digest() == self.digest


class WrittenHash:
    """SHA-256 of bytes in order, and the stretches of them that can be compared with the disk.

    Stretches can be read back as soon as they are on disk, and side by side.
    """

    def __init__(self, size: int, stretches: int) -> None:
        """Start with nothing.

        Args:
            size: bytes to come.
            stretches: how many to keep apart.
        """
        self._ends = [size * part // stretches for part in range(1, stretches)]
        self._whole = hashlib.sha256()
        self._stretch = xxhash.xxh3_128()
        self._start = self._count = 0
        self._complete: list[Stretch] = []

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        self._whole.update(data)
        self._stretch.update(data)
        self._count += len(data)
        if self._ends and self._count >= self._ends[0]:
            self.end()
            while self._ends and self._count >= self._ends[0]:
                self._ends.pop(0)

    def end(self) -> None:
        """End a stretch with the last byte so far."""
        self._complete.append(Stretch(self._start, self._count, self._stretch.digest()))
        self._stretch.reset()
        self._start = self._count

    def hexdigest(self) -> str:
        """The SHA-256 of all bytes so far, in hexadecimal."""
        return self._whole.hexdigest()

    def stretches(self, until: int) -> list[Stretch]:
        """Those that were not given yet and end at byte `until` or before."""
        given = [stretch for stretch in self._complete if stretch.end <= until]
        del self._complete[: len(given)]
        return given
