"""Reading a file back in stretches says what reading it whole would say of their bytes."""

import hashlib
from pathlib import Path

import pytest

from psoft_export.checkpoint.written_hash import WrittenHash
from psoft_export.errors import OutputError

SIZE = 3 * 2**20 + 12_345  # more than is read at a time
PIECE = 100_000
DATA = (bytes(range(251)) * (SIZE // 251 + 1))[:SIZE]


def written(stretches: int) -> WrittenHash:
    digest = WrittenHash(SIZE, stretches)
    for start in range(0, SIZE, PIECE):
        digest.update(memoryview(DATA)[start : start + PIECE])
    digest.end()
    return digest


def found(digest: WrittenHash, path: Path) -> list[bool]:
    return [stretch.reads_back(path) for stretch in digest.stretches(SIZE)]


@pytest.mark.parametrize("stretches", [1, 2, 4])
def test_what_was_written_reads_back(stretches: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    digest = written(stretches)
    assert digest.hexdigest() == hashlib.sha256(DATA).hexdigest()
    assert found(digest, path) == [True] * stretches
    assert digest.stretches(SIZE) == []  # each is given once


def test_every_byte_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for place in (0, PIECE, SIZE // 4, SIZE // 2 - 1, SIZE // 2 + PIECE, SIZE - 1):
        damaged = bytearray(DATA)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert found(written(4), path).count(False) == 1


def test_stretches_are_given_once_they_are_on_disk(tmp_path: Path) -> None:
    path, digest = tmp_path / "file", WrittenHash(SIZE, 4)
    path.write_bytes(DATA[: SIZE // 2 + 2 * PIECE])
    for start in range(0, SIZE // 2 + 2 * PIECE, PIECE):
        digest.update(memoryview(DATA)[start : start + PIECE])
    assert digest.stretches(SIZE // 4) == []
    (first,) = digest.stretches(SIZE // 4 + PIECE)
    (second,) = digest.stretches(SIZE // 2 + PIECE)
    assert first.start == 0 and first.end == second.start
    assert first.reads_back(path) and second.reads_back(path)
    assert digest.stretches(SIZE) == []


@pytest.mark.parametrize("other", [DATA[:-1], DATA[: SIZE // 2], b""])
def test_a_file_that_is_too_short_does_not_read_back(other: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(other)
    assert not all(found(written(4), path))


def test_pieces_larger_than_a_stretch(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (DATA, DATA[:-1] + b"\0"):
        digest = WrittenHash(SIZE, 4)
        digest.update(memoryview(DATA))
        digest.end()
        path.write_bytes(data)
        assert all(found(digest, path)) == (data == DATA)


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="file: cannot be read"):
        found(written(2), tmp_path / "file")
