"""An output folder that appears under its name only when it is complete."""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from psoft_export.errors import DiskSpaceError, OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class OutputFolder:
    """A scratch folder beside `target` that takes its name when the work is done.

    Use as a context manager: `path` is the folder to write into; call `commit()` last. Leaving
    without it removes the scratch folder and the target stays as it was. A killed run leaves only
    the scratch folder, which the next run clears; two runs at once on one target are told apart
    by a lock.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, needed_bytes: int = 0) -> None:
        """Check that the target can be written; touches nothing yet.

        Args:
            target: the folder to make.
            overwrite: replace a non-empty folder.
            needed_bytes: what will be written, checked against the free disk space.

        Raises:
            OutputError: the target exists and is not empty, is a file, or has no parent folder.
            DiskSpaceError: too little room.
        """
        self._target = target.absolute()
        self._overwrite = overwrite
        self._needed = needed_bytes
        self._lock: IO[str] | None = None
        self._committed = False
        scratch_name = f".{self._target.name}.psoft-export"
        self.path = self._target.with_name(scratch_name)
        check_target(self._target, overwrite=overwrite)

    def __enter__(self) -> "OutputFolder":
        try:
            self._take_lock()
            _recover(self.path, self._target)
            check_free_space(self._target.parent, self._needed)
            self.path.mkdir()
        except OSError as cause:
            self._release()
            raise _output_error(self._target, cause) from cause
        except BaseException:
            self._release()
            raise
        return self

    def commit(self) -> None:
        """Flush everything to disk and give the folder its name in one step.

        Raises:
            OutputError: the file system refused, or the target was filled meanwhile.
        """
        check_target(self._target, overwrite=self._overwrite)
        try:
            for folder, _, files in os.walk(self.path):
                for name in files:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            replaced = self._target.exists() and any(self._target.iterdir())
            if replaced:
                _exchange(self.path, self._target)
            else:
                self.path.rename(self._target)
            self._committed = True
            _sync(self._target.parent)
        except OSError as cause:
            raise _output_error(self._target, cause) from cause
        if replaced:
            # What was there before; if this is cut short, the next run clears it.
            shutil.rmtree(self.path, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._committed:
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise _output_error(self._target, error) from error

    def _take_lock(self) -> None:
        lock_path = self.path.with_name(self.path.name + ".lock")
        self._lock = lock_path.open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock file that its owner removed after we opened it protects nothing.
            held = os.path.samestat(os.fstat(self._lock.fileno()), lock_path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            self._lock.close()
            self._lock = None
            raise OutputError(f"{self._target}: another run is writing it; wait for it")

    def _release(self) -> None:
        if self._lock is not None:
            Path(self._lock.name).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


@contextmanager
def replacing_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A scratch path beside `path` whose file takes its name when the block ends without error.

    With `durable`, it is on disk by then; without, a power failure may leave a damaged file.

    Raises:
        OutputError: the folder cannot be written.
    """
    # A name of its own: two runs at once must not write into one scratch file.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        try:
            yield scratch
            if durable:
                _sync(scratch)
            scratch.replace(path)
            if durable:
                _sync(path.parent)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as cause:
        raise _output_error(path, cause) from cause


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` unless `target` can become an output folder."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target}: is a file, not a folder; choose another output")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{target}: exists and is not empty; pass --overwrite to replace it")
    if target.is_symlink():
        raise OutputError(f"{target}: is a symbolic link; name the folder it points to")
    if os.path.ismount(target):
        raise OutputError(f"{target}: is a mount point; name a folder inside it")
    if target.resolve() in (Path.home(), Path.cwd(), *Path.cwd().parents):
        raise OutputError(f"{target}: is your home or holds the current folder; name another")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent}: no such folder to put '{target.name}' in; create it")


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Raise `DiskSpaceError` unless `needed_bytes` fit on the file system of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskSpaceError(
            f"{folder}: {needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
            "make room or choose another output"
        )


def _output_error(target: Path, cause: OSError) -> OutputError:
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(f"{target}: the disk is full; make room or choose another output")
    return OutputError(f"{target}: cannot be written ({cause.strerror or cause})")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders' names: in one step on Linux, else in three."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        names = os.fsencode(first), os.fsencode(second)
        if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    aside = _aside(first)
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


def _recover(scratch: Path, target: Path) -> None:
    """Undo what a killed run left: a half-made scratch folder, a target moved aside."""
    aside = _aside(scratch)
    if aside.exists() and not target.exists():
        aside.rename(target)
    for leftover in (aside, scratch):
        if leftover.exists():
            shutil.rmtree(leftover)


def _aside(scratch: Path) -> Path:
    return scratch.with_name(scratch.name + ".old")
