"""Files past the operating system's page cache, where the file system has a way past it.

A checkpoint that is written once, and read back once to see that it is there, gains nothing from
that cache, and filling it is slow where the kernel takes fresh memory for it page by page
(docs/benchmarks.md).
"""

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

# Of one system call through the cache. Larger ones took the kernel two to five times as long
# (ext4, Linux).
WRITE_BYTES = 128 * 2**10
_ALIGNED = 4096  # bytes: where in memory and in a file things past the cache start and end
_BUFFER_BYTES = 4 * 2**20
_FLAG = getattr(os, "O_DIRECT", 0)  # Linux; elsewhere everything goes through the cache


class UncachedFile:
    """A new file that is written in order, while more is taken.

    Attributes:
        on_disk: bytes handed to the disk, or where there is no way past it to the cache.
    """

    def __init__(self, path: Path) -> None:
        """Create it."""
        self.on_disk = 0
        self._handle = path.open("xb", buffering=0)
        self._is_past_cache = _set_past_cache(self._handle.fileno(), True)
        self._buffer, self._other = (mmap.mmap(-1, _BUFFER_BYTES) for _ in range(2))
        self._filled = 0
        self._thread = ThreadPoolExecutor(1, "psoft-disk")
        self._writing: Future[None] | None = None  # of the other buffer

    def write(self, data: memoryview) -> int:
        """Take bytes, not always all; returns how many."""
        count = min(len(data), _BUFFER_BYTES - self._filled)
        # By NumPy, which lets go of Python's lock meanwhile.
        taken = np.frombuffer(self._buffer, np.uint8, count, self._filled)
        np.copyto(taken, np.frombuffer(data[:count], np.uint8))
        self._filled += count
        if self._filled == _BUFFER_BYTES:
            self._wait()
            self._writing = self._thread.submit(self._put, self._buffer, 0, _BUFFER_BYTES)
            self._buffer, self._other, self._filled = self._other, self._buffer, 0
        return count

    def fileno(self) -> int:
        """Its descriptor."""
        return self._handle.fileno()

    def flush(self) -> None:
        """Hand over what was taken; nothing can be written after it."""
        self._wait()
        aligned = self._filled // _ALIGNED * _ALIGNED
        self._put(self._buffer, 0, aligned)
        if aligned < self._filled:
            self._is_past_cache = _set_past_cache(self.fileno(), False)
            self._put(self._buffer, aligned, self._filled)
        self._filled = 0

    def close(self) -> None:
        """Close it, whatever state it is in."""
        self._thread.shutdown()  # nothing is written to a descriptor that is another file's by then
        self._handle.close()

    def _wait(self) -> None:
        """Wait for the other buffer, and raise what went wrong there."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _put(self, buffer: mmap.mmap, start: int, end: int) -> None:
        """Write a part of a buffer."""
        with memoryview(buffer) as view:
            while start < end:
                stop = end if self._is_past_cache else min(end, start + WRITE_BYTES)
                start += self._write(view[start:stop])

    def _write(self, data: memoryview) -> int:
        try:
            written = os.pwrite(self.fileno(), data, self.on_disk)
        except OSError as problem:
            if not self._is_past_cache or problem.errno != errno.EINVAL:
                raise
            written = 0
        if written % _ALIGNED or not written:
            # Refused, or cut short: what follows starts where the way past the cache has no stop.
            self._is_past_cache = _set_past_cache(self.fileno(), False)
        self.on_disk += written
        return written


class UncachedReader:
    """Reads a file in pieces past the cache, into memory that is taken once."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Take memory for pieces of up to `size` bytes; the descriptor stays the caller's."""
        self._descriptor = descriptor
        self._buffer = memoryview(mmap.mmap(-1, (-(-size // _ALIGNED) + 1) * _ALIGNED))
        self._is_past_cache = _set_past_cache(descriptor, True)

    def read(self, offset: int, size: int) -> memoryview:
        """The bytes at a place in the file, until the next call.

        Raises:
            EOFError: the file ends before.
            OSError: it cannot be read.
        """
        start = offset // _ALIGNED * _ALIGNED
        wanted, done = offset + size - start, 0
        room = -(-wanted // _ALIGNED) * _ALIGNED
        while done < wanted:
            count = self._read(self._buffer[done:room], start + done)
            if not count:
                raise EOFError
            done += count
        return self._buffer[offset - start : wanted]

    def _read(self, into: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor, [into], offset)
        except OSError as problem:
            if not self._is_past_cache or problem.errno != errno.EINVAL:
                raise
            self._is_past_cache = _set_past_cache(self._descriptor, False)
            return os.preadv(self._descriptor, [into], offset)


def _set_past_cache(descriptor: int, wanted: bool) -> bool:
    """Let reads and writes of a file go past the cache or through it; returns which they do."""
    if not _FLAG:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _FLAG if wanted else flags & ~_FLAG)
    except OSError:
        return False  # this file system has no way past it
    return wanted
