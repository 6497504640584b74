"""Files past the page cache hold the same bytes, also where there is no way past it."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from psoft_export.checkpoint import uncached
from psoft_export.checkpoint.uncached import UncachedFile, UncachedReader

DATA = os.urandom(2**20) * 9 + b"the end"  # two buffers, and a rest that is not aligned
WAYS = ["as it is", "no flag", "refused at once", "refused when used", "cut short"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What a system or a file system may do about a way past its cache."""
    write, read = os.pwrite, os.preadv

    def refuse_past_cache(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & uncached._FLAG:
            raise OSError(errno.EINVAL, "Invalid argument")

    def refusing(descriptor: int, data: Any, offset: int) -> int:
        refuse_past_cache(descriptor)
        return write(descriptor, data, offset)

    def refusing_to_read(descriptor: int, buffers: Any, offset: int) -> int:
        refuse_past_cache(descriptor)
        return read(descriptor, buffers, offset)

    def short(descriptor: int, data: Any, offset: int) -> int:
        return write(descriptor, bytes(data)[: 4096 * 3 + 100], offset)

    def no_such_flag(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    if request.param == "no flag":
        monkeypatch.setattr(uncached, "_FLAG", 0)
    elif request.param == "refused at once":
        flags = fcntl.fcntl

        def without_flag(descriptor: int, command: int, *value: int) -> int:
            return no_such_flag() if value else int(flags(descriptor, command))

        monkeypatch.setattr(fcntl, "fcntl", without_flag)
    elif request.param == "refused when used":
        monkeypatch.setattr(os, "pwrite", refusing)
        monkeypatch.setattr(os, "preadv", refusing_to_read)
    elif request.param == "cut short":
        # Through the cache, where a write that is cut short may go on anywhere.
        monkeypatch.setattr(uncached, "_set_past_cache", lambda *_: False)
        monkeypatch.setattr(os, "pwrite", short)
    yield request.param


@pytest.mark.parametrize("size", [0, 7, 4096, 2**22, len(DATA)])
def test_all_bytes_arrive(size: int, way: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    file, left = UncachedFile(path), memoryview(DATA)[:size]
    while left:
        left = left[file.write(left[:100_003]) :]
    on_disk = file.on_disk
    assert path.read_bytes()[:on_disk] == DATA[:on_disk]
    file.flush()
    assert file.on_disk == size
    file.close()
    assert path.read_bytes() == DATA[:size]


@pytest.mark.parametrize("offset", [0, 1, 4096, 2**20 + 5, len(DATA) - 1])
def test_pieces_are_read_wherever_they_lie(offset: int, way: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with path.open("rb", buffering=0) as file:
        reader = UncachedReader(file.fileno(), 2**20)
        size = min(2**20, len(DATA) - offset)
        assert reader.read(offset, size) == DATA[offset : offset + size]
        with pytest.raises(EOFError):
            reader.read(len(DATA) - 3, 4)


def test_an_error_of_the_disk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = UncachedFile(tmp_path / "file")
    file.write(memoryview(DATA)[:5000])
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as info:
        file.flush()
    file.close()  # while the error, and all that it holds, is still there
    assert info.value.errno == errno.ENOSPC


def test_an_error_behind_the_writing_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    file = UncachedFile(tmp_path / "file")
    full = memoryview(DATA)[: uncached._BUFFER_BYTES]
    assert file.write(full) == len(full), "it does not wait for the disk"
    with pytest.raises(OSError, match="Input/output error"):
        file.write(full)
    with pytest.raises(OSError, match="Input/output error"):
        file.flush()
    file.close()


def test_it_does_not_replace_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(FileExistsError):
        UncachedFile(tmp_path / "file")
