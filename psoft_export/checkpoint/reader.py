"""A base checkpoint, read lazily: what tensors it has, and their bytes piece by piece."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from psoft_export.checkpoint.dtypes import CODES, TORCH_DTYPES
from psoft_export.checkpoint.hashed_ahead import Identity, digest_ahead, identity
from psoft_export.checkpoint.names import INDEX, PICKLE, SAFETENSORS
from psoft_export.checkpoint.safetensors_file import TensorEntry, read_fully, read_header
from psoft_export.checkpoint.source import member
from psoft_export.errors import CheckpointError, PsoftExportError, first_line

CHUNK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class WeightFile:
    """One file of a checkpoint.

    Attributes:
        path: where it is.
        entries: its tensors, in the order of their bytes.
        metadata: of its header.
        tensors: those of a pickle file, memory-mapped.
        identity: what the file was when all this was read from it; see `hashed_ahead.identity`.
    """

    path: Path
    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] | None = None
    identity: Identity | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The file's name in its folder."""
        return self.path.name


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of a folder, in the order of their names."""

    folder: Path
    files: tuple[WeightFile, ...]

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """Every tensor by its name."""
        return {entry.name: entry for file in self.files for entry in file.entries}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of a checkpoint folder; no weights are read yet.

    safetensors files, single or with an index, or PyTorch pickle files through
    `torch.load(weights_only=True)`.

    Raises:
        CheckpointError: nothing to read, or a file is missing, damaged or outside the folder.
    """
    for whole, opener in ((SAFETENSORS, _open_safetensors), (PICKLE, _open_pickle)):
        if (folder / whole).exists():
            return Checkpoint(folder, (opener(folder / whole, None),))
        index = folder / (whole + INDEX)
        if index.exists():
            shards = _read_index(index)
            files = tuple(opener(path, shards[path]) for path in sorted(shards))
            _check_unique(files)
            return Checkpoint(folder, files)
    raise CheckpointError(
        f"{folder}: no weights ({SAFETENSORS}, {PICKLE}, or either with '{INDEX}')"
    )


def load_pickle(path: Path, error: type[PsoftExportError]) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, without running code from it, memory-mapped if possible.

    Raises:
        PsoftExportError: of the class `error`: unreadable, holds other things than tensors, or
            would need code from the file to be run.
    """
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as cause:
            if "mmap" not in str(cause):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)  # before torch 1.6
    except UnpicklingError as cause:
        raise error(
            f"{path}: is damaged, or holds more than plain tensors, and then loading it could run "
            "code; convert it to safetensors where you trust it"
        ) from cause
    except (OSError, RuntimeError, EOFError, ValueError) as cause:
        raise error(f"{path}: not a readable PyTorch file ({first_line(cause)})") from cause
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise error(f"{path}: not a flat mapping of names to tensors")
    return state


class FileReader:
    """Reads byte ranges of one weight file and hashes the file on the way.

    Reads feed the hash as they pass; what they skip is read for the hash alone, so each byte is
    hashed once whatever the order, or not at all once `hashed_ahead` knows the file's digest. Use
    as a context manager.
    """

    def __init__(self, file: WeightFile) -> None:
        """Open the file and read what stands before its first tensor."""
        self._file = file
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._ahead: str | None = None
        try:
            self._handle = file.path.open("rb", buffering=0)
        except OSError as cause:
            raise _unreadable(file.path, cause) from cause
        header_bytes = max(0, min((entry.offset for entry in file.entries), default=0))
        self._read_into(memoryview(bytearray(header_bytes)), 0)

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def chunks(self, entry: TensorEntry, size: int = CHUNK_BYTES) -> Iterator[Tensor]:
        """A tensor's bytes in order, as uint8 tensors of `size` bytes (a multiple of 8).

        Raises:
            CheckpointError: the file ends before the tensor does, or cannot be read.
        """
        pickled = None if self._file.tensors is None else raw(self._file.tensors[entry.name])
        for start in range(0, entry.nbytes, size):
            nbytes = min(size, entry.nbytes - start)
            if pickled is not None:
                yield pickled[start : start + nbytes]
            else:
                data = torch.empty(nbytes, dtype=torch.uint8)
                self._read_into(data.numpy().data, entry.offset + start)
                yield data

    def tensor(self, entry: TensorEntry) -> tuple[Tensor, str]:
        """A tensor in its stored dtype, and the SHA-256 of its bytes in hexadecimal.

        Raises:
            CheckpointError: as `chunks`.
        """
        digest = hashlib.sha256()
        return self._whole(entry, digest.update), digest.hexdigest()

    def values(self, entry: TensorEntry) -> Tensor:
        """A tensor in its stored dtype; errors as of `chunks`."""
        return self._whole(entry, lambda _: None)

    def _whole(self, entry: TensorEntry, see: Callable[[memoryview], None]) -> Tensor:
        """A tensor; `see` is shown its bytes in order."""
        if self._file.tensors is not None:
            values = raw(self._file.tensors[entry.name])
            see(values.numpy().data)
        else:
            values = torch.empty(entry.nbytes, dtype=torch.uint8)
            view = values.numpy().data
            for start in range(0, entry.nbytes, CHUNK_BYTES):  # seen while in the CPU's caches
                piece = view[start : start + CHUNK_BYTES]
                self._read_into(piece, entry.offset + start)
                see(piece)
        return typed(values, entry.dtype).view(entry.shape)

    def sha256(self) -> str:
        """The SHA-256 of the whole file, in hexadecimal.

        Raises:
            CheckpointError: it cannot be read, or was written to while it was read.
        """
        if (digest := self.digest_ahead()) is not None:
            if not self.is_as_opened and self._hashed_again() != digest:
                raise CheckpointError(f"{self._file.path}: was changed meanwhile; run again")
            return digest
        self._hash_to(self._file.path.stat().st_size)
        return self._hash.hexdigest()

    def digest_ahead(self) -> str | None:
        """The SHA-256 of the whole file as its header was read, if `hashed_ahead` knows it."""
        if self._ahead is None and self.is_as_opened:
            self._ahead = digest_ahead(self._handle.fileno())
        return self._ahead

    @property
    def is_as_opened(self) -> bool:
        """Whether nothing was written to the file since its header was read, for certain."""
        opened = self._file.identity
        return opened is not None and identity(self._handle.fileno()) == opened

    def _hashed_again(self) -> str:
        try:
            self._handle.seek(0)
            return hashlib.file_digest(self._handle, "sha256").hexdigest()
        except OSError as cause:
            raise _unreadable(self._file.path, cause) from cause

    def _hash_to(self, end: int) -> None:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(end - self._hashed, 1))))
        while self._hashed < end:
            self._read_into(buffer[: min(len(buffer), end - self._hashed)], self._hashed)

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        is_hashed = self.digest_ahead() is not None
        if offset > self._hashed and not is_hashed:
            self._hash_to(offset)  # what a plan skips is hashed all the same, while it is near
        try:
            read_fully(self._handle.fileno(), buffer, offset)
        except EOFError as cause:
            raise CheckpointError(
                f"{self._file.path}: ends early; copy or download it again"
            ) from cause
        except OSError as cause:
            raise _unreadable(self._file.path, cause) from cause
        if offset <= self._hashed < offset + len(buffer) and not is_hashed:
            self._hash.update(buffer[self._hashed - offset :])
            self._hashed = offset + len(buffer)


def _unreadable(
    path: Path, cause: OSError, error: type[PsoftExportError] = CheckpointError
) -> PsoftExportError:
    return error(f"{path}: cannot be read ({cause.strerror})")


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, as a checkpoint stores them, in hexadecimal."""
    return hashlib.sha256(raw(tensor).numpy().data).hexdigest()


def file_sha256(path: Path, error: type[PsoftExportError]) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        PsoftExportError: of the class `error`: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            known = digest_ahead(file.fileno())
            return known or hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as cause:
        raise _unreadable(path, cause, error) from cause


def typed(data: Tensor, dtype: str) -> Tensor:
    """Flat uint8 bytes seen as numbers of `dtype` (a safetensors code)."""
    return data.view(TORCH_DTYPES[dtype])


def raw(values: Tensor) -> Tensor:
    """The bytes of a tensor, as a flat uint8 tensor."""
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _open_safetensors(path: Path, expected: set[str] | None) -> WeightFile:
    seen = _identity(path)
    entries, metadata = read_header(path)
    _check_names(path, {entry.name for entry in entries}, expected)
    return WeightFile(path, tuple(entries), metadata, identity=seen)


def _open_pickle(path: Path, expected: set[str] | None) -> WeightFile:
    seen = _identity(path)
    tensors = load_pickle(path, CheckpointError)
    _check_names(path, set(tensors), expected)
    entries = []
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: tensor '{name}' has unknown dtype {tensor.dtype}")
        code = CODES[tensor.dtype]
        entries.append(TensorEntry(name, code, tuple(tensor.shape), path, -1, tensor.nbytes))
    return WeightFile(path, tuple(entries), {}, tensors, identity=seen)


def _identity(path: Path) -> Identity | None:
    try:
        with path.open("rb") as file:
            return identity(file.fileno())
    except OSError:
        return None  # what is wrong with it is said when it is read


def _check_names(path: Path, found: set[str], expected: set[str] | None) -> None:
    if expected is not None and (missing := sorted(expected - found)):
        raise CheckpointError(f"{path}: lacks tensor '{missing[0]}', which the index places in it")


def _check_unique(files: tuple[WeightFile, ...]) -> None:
    home: dict[str, Path] = {}
    for file in files:
        for entry in file.entries:
            if entry.name in home:
                first = home[entry.name].name
                raise CheckpointError(f"{file.path}: tensor '{entry.name}' is also in {first}")
            home[entry.name] = file.path


def _read_index(path: Path) -> dict[Path, set[str]]:
    """Shard paths of an index, each with the names of its tensors."""
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        pairs = [(str(name), str(shard)) for name, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise CheckpointError(f"{path}: not a readable weight index; download it again") from cause
    shards: dict[Path, set[str]] = {}
    for name, shard in pairs:
        shard_path = member(path.parent, shard, path.name, CheckpointError)
        shards.setdefault(shard_path, set()).add(name)
    for shard_path in shards:
        if not shard_path.exists():
            raise CheckpointError(f"{path}: names the shard '{shard_path.name}', which is missing")
    return shards
