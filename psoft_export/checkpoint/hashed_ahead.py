"""SHA-256 of files, found by a process of its own while this one still loads torch.

Loading torch keeps one core busy for a second or two. Another can read a few GB meanwhile, which
later would take its time from the merge. A digest counts as long as the file is as it was: the
same size, and no system call has written to it since. This module itself loads nothing.
"""

import atexit
import hashlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from psoft_export.checkpoint.names import weight_files

# Larger files, and what is left after that time, are hashed as they are read: whoever waits for
# more than the start of a merge gains nothing by hashing beside it.
_MOST_BYTES = 4 * 10**9
_MOST_SECONDS = 5.0
_READ_BYTES = 2**19  # within a core's own cache
# Within one tick of a file system's clock (2 s at worst) a second change leaves no trace.
_TICK_SECONDS = 2.0

_processes: list["_Hashing"] = []

Identity = tuple[int, ...]


def start_hashing(*folders: str | Path) -> None:
    """Start to hash the weight files of these folders, in their order; returns at once.

    Does nothing where it would save nothing: torch is loaded here already.

    Args:
        folders: adapters and checkpoints. What is no folder, such as a Hub id, is passed over.
    """
    if "torch" in sys.modules:
        return
    paths = [path for folder in folders for path in _files(Path(folder))]
    if paths:
        with suppress(OSError):  # no room for a process: the files are hashed as they are read
            _processes.append(_Hashing(paths))


def digest_ahead(descriptor: int) -> str | None:
    """The SHA-256 of an open file in hexadecimal, if it is known and still right; never waits."""
    if not _processes or (seen := identity(descriptor)) is None:
        return None
    for process in _processes:
        process.listen()
        if (digest := process.digests.get(seen)) is not None:
            return digest
    return None


def identity(descriptor: int) -> Identity | None:
    """What of an open file changes with its content; None for one written to just now.

    As long as it is the same, no system call has written to the file.
    """
    status = os.fstat(descriptor)
    if time.time() - status.st_ctime < _TICK_SECONDS:
        return None
    times = status.st_mtime_ns, status.st_ctime_ns  # a program cannot set the second
    return (status.st_dev, status.st_ino, status.st_size, *times)


class _Hashing:
    """A process that hashes files.

    Attributes:
        digests: what it has found so far.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.digests: dict[Identity, str] = {}
        self._text = b""
        command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), *map(str, paths)]
        self._process = subprocess.Popen(  # noqa: S603 (this Python, this module)
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt is for this process
        )
        atexit.register(self._end)

    def listen(self) -> None:
        """Take what it has found since."""
        output = self._process.stdout
        while output is not None and not output.closed and select.select([output], [], [], 0)[0]:
            text = os.read(output.fileno(), 2**16)
            if not text:
                self._end()
            *lines, self._text = (self._text + text).split(b"\n")
            for line in lines:
                with suppress(ValueError, TypeError):  # of something else that starts with Python
                    seen, digest = json.loads(line)
                    self.digests[tuple(seen)] = digest

    def _end(self) -> None:
        """End it, whether it is done or not."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def _files(folder: Path) -> Iterator[Path]:
    """The files of a folder that hold weights: those of a checkpoint, or else all safetensors."""
    with suppress(OSError, RuntimeError):  # no such folder, or no such home
        folder = folder.expanduser()
        names = sorted(path.name for path in folder.iterdir())
        for name in weight_files(names) or [n for n in names if n.endswith(".safetensors")]:
            yield folder / name


def _hash(paths: Iterable[str], parent: int) -> None:
    """Print each file's identity and SHA-256, a line each; ends with the parent process."""
    buffer = memoryview(bytearray(_READ_BYTES))
    end = time.monotonic() + _MOST_SECONDS
    for path in paths:
        with suppress(OSError), open(path, "rb", buffering=0) as file:  # noqa: PTH123
            seen = identity(file.fileno())
            if seen is None or os.fstat(file.fileno()).st_size > _MOST_BYTES:
                continue
            digest = hashlib.sha256()
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                if os.getppid() != parent or time.monotonic() > end:
                    return
            if identity(file.fileno()) == seen:
                print(json.dumps([seen, digest.hexdigest()]), flush=True)  # noqa: T201


if __name__ == "__main__":
    _hash(sys.argv[2:], int(sys.argv[1]))
