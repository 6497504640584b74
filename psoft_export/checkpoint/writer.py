"""Writing one safetensors file as a stream: the header first, then each tensor's bytes in order."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from psoft_export.checkpoint.dtypes import TORCH_DTYPES
from psoft_export.checkpoint.uncached import WRITE_BYTES, UncachedFile
from psoft_export.checkpoint.written_hash import WrittenHash

# Taken and hashed at a time on the way past the cache: within a core's own cache, and seldom
# enough that threads do not keep asking for Python's lock.
_HASHED_BYTES = 512 * 2**10


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: name, dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * TORCH_DTYPES[self.dtype].itemsize


def aligned_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order in which tensors are laid out: wide dtypes first, otherwise as given.

    So every tensor starts at a multiple of its item size, as readers that map the file expect.
    """
    return sorted(specs, key=lambda spec: -TORCH_DTYPES[spec.dtype].itemsize)


def header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The length and JSON header of a file that holds `specs` one after the other."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        fields[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes one file; the tensors must come in the order of `specs`, each in full."""

    def __init__(
        self,
        path: Path,
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str],
        digest: "hashlib._Hash | WrittenHash | None" = None,
        *,
        cached: bool = True,
    ) -> None:
        """Create the file and write its header.

        Args:
            path: where; nothing may be there.
            specs: the tensors.
            metadata: of the header.
            digest: fed every byte on the way.
            cached: whether the file is to be in the system's page cache; else it goes past it
                where that can be done, and its header is final.
        """
        self._specs = list(specs)
        start = header(self._specs, metadata)
        self.path = path
        self._header_bytes = len(start)
        self._expected = len(start) + sum(spec.nbytes for spec in self._specs)
        self._written = 0
        self._digest = digest
        self._file = path.open("xb", buffering=0) if cached else UncachedFile(path)
        self._piece_bytes = WRITE_BYTES if cached else _HASHED_BYTES
        self._write(memoryview(start))

    @property
    def on_disk(self) -> int:
        """Bytes that can be read from the file."""
        return self._file.on_disk if isinstance(self._file, UncachedFile) else self._written

    def append(self, data: Tensor) -> None:
        """Write the next bytes (a flat uint8 tensor on the CPU)."""
        self._write(data.numpy().data)

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Write the header again with other metadata, which must take the same room."""
        start = header(self._specs, metadata)
        if len(start) != self._header_bytes:
            raise RuntimeError(f"{self.path}: the new header has another length; a bug")
        if isinstance(self._file, UncachedFile):
            raise RuntimeError(f"{self.path}: the header is final; a bug")
        os.pwrite(self._file.fileno(), start, 0)

    def flush(self) -> None:
        """Let all bytes so far be read from the file; none follow."""
        self._file.flush()

    def close(self, *, durable: bool = True) -> int:
        """Close the file, flushed to disk where it is to be durable; returns its size.

        Raises:
            RuntimeError: not every byte that the header announces was written.
        """
        try:
            if self._written != self._expected:
                raise RuntimeError(
                    f"{self.path}: wrote {self._written} of {self._expected} bytes; a bug"
                )
            self.flush()
            if durable:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return self._written

    def abandon(self) -> None:
        """Close the file, whatever state it is in."""
        self._file.close()

    def _write(self, data: memoryview) -> None:
        while data:
            count = self._file.write(data[: self._piece_bytes])
            if self._digest is not None:
                self._digest.update(data[:count])
            self._written += count
            data = data[count:]
