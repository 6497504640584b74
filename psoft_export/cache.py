"""Bases found once and kept on disk, shared by all runs of a user.

One file an entry, named by the weight's SHA-256 and the solver; it holds the largest rank asked
for so far and serves every smaller one. Files appear whole (written aside, then renamed), so
several processes can use one folder without locks. An entry carries the SHA-256 of all that it
says; one that does not agree is removed and found anew.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from psoft_export.basis.svd import Triplets
from psoft_export.cache_folder import cache_folder, layouts_folder
from psoft_export.checkpoint.kept_json import KeptJson, removed
from psoft_export.checkpoint.output import replacing_file
from psoft_export.checkpoint.reader import raw
from psoft_export.checkpoint.safetensors_file import read_header
from psoft_export.checkpoint.writer import ShardWriter, TensorSpec
from psoft_export.errors import CheckpointError, OutputError

DEFAULT_LIMIT_BYTES = 20 * 10**9
_SUFFIX = ".basis.safetensors"
_FORMAT = "psoft-basis-cache/1"
_TENSORS = ("left", "values", "right")
_ABANDONED_SECONDS = 3600  # a scratch file of this age has lost its writer


@dataclass(frozen=True)
class CacheEntry:
    """One basis on disk.

    Attributes:
        path: its file.
        weight: SHA-256 of the weight's bytes.
        solver: how it was found, with everything that its signs depend on.
        rank: number of triplets.
        shape: out × in.
        nbytes: size of the file.
        last_used: time of the last use, in seconds since the epoch.
    """

    path: Path
    weight: str
    solver: str
    rank: int
    shape: tuple[int, int]
    nbytes: int
    last_used: float


@dataclass(frozen=True)
class CachedTriplets:
    """Triplets from the cache or for it, and σ_{r+1} where it is known."""

    triplets: Triplets
    next_value: float | None


class BasisCache:
    """The cache in one folder.

    `problem` is None, or one sentence on why entries could not be kept; a cache that cannot be
    written never stops a run.
    """

    def __init__(self, folder: Path, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        """Use `folder`, made when the first entry is; keep at most `limit_bytes` in it."""
        self.folder = folder
        self.problem: str | None = None
        self.limit_bytes = limit_bytes

    @property
    def searches(self) -> Path:
        """The folder for searches that were interrupted (`recover`)."""
        return self.folder / "searches"

    @property
    def tensor_hashes(self) -> KeptJson:
        """SHA-256 of each tensor of a weight file, by name, under the SHA-256 of the file."""
        return KeptJson(self.folder / "hashes")

    def get(self, weight: str, solver: str, rank: int) -> CachedTriplets | None:
        """The first `rank` triplets of a weight, float32 on the CPU, or None.

        Args:
            weight: SHA-256 of the weight's bytes, in hexadecimal.
            solver: name of the solver with all that its result depends on.
            rank: number of triplets.
        """
        path = self._path(weight, solver)
        try:
            data = path.read_bytes()  # at once: another run may replace the file meanwhile
        except OSError:
            return None
        try:
            tensors, metadata = safetensors.torch.load(data), _metadata(data)
            told = {"format": _FORMAT, "solver": solver, "weight": weight}
            if any(metadata.get(key) != value for key, value in told.items()):
                raise CheckpointError(f"{path}: not an entry of this cache")
            if _digest(tensors, metadata) != metadata["sha256"]:
                raise CheckpointError(f"{path}: damaged")
            left, values, right = (tensors[name] for name in _TENSORS)
            next_value = float(metadata["next_value"]) if "next_value" in metadata else None
        except (CheckpointError, SafetensorError, KeyError, ValueError):
            _discard(path)  # damaged, or of another release
            return None
        if len(values) < rank:
            return None
        _touch(path)
        if len(values) > rank:
            next_value = float(values[rank])
        triplets = Triplets(left.T, values, right).truncated(rank)
        return CachedTriplets(triplets, next_value)

    def put(self, weight: str, solver: str, found: CachedTriplets) -> None:
        """Keep triplets (float32), unless as many of them are kept already.

        The least recently used entries are forgotten where room is short.
        """
        triplets = found.triplets
        path = self._path(weight, solver)
        if self._rank(path) >= len(triplets.values):
            return  # of another run meanwhile
        tensors = {
            "left": triplets.left.T.cpu().contiguous(),
            "values": triplets.values.cpu(),
            "right": triplets.right.cpu().contiguous(),
        }
        metadata = {
            "format": _FORMAT,
            "solver": solver,
            "weight": weight,
        }
        if found.next_value is not None:
            metadata["next_value"] = repr(found.next_value)
        metadata["sha256"] = _digest(tensors, metadata)
        specs = [TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Not durable: an entry that a power failure damages is noticed and found anew.
            with replacing_file(path, durable=False) as scratch:
                writer = ShardWriter(scratch, specs, metadata)
                try:
                    for tensor in tensors.values():
                        writer.append(raw(tensor))
                    writer.close(durable=False)
                finally:
                    writer.abandon()
            self._make_room(path)
        except (OutputError, OSError) as cause:
            root = cause.__cause__ or cause
            reason = (isinstance(root, OSError) and root.strerror) or type(root).__name__
            # No path here: the sentence goes into psoft_export.json, and that gets published.
            self.problem = (
                f"the basis cache could not be written ({reason}); the result is complete, but "
                "the next run finds these bases again. 'psoft-export cache list' shows where it "
                "is, --cache-dir names another"
            )

    def entries(self) -> list[CacheEntry]:
        """Every entry, the most recently used first."""
        found = []
        for path in self._files():
            try:
                status = path.stat()
                tensors, metadata = read_header(path)
                extents = {entry.name: entry.shape for entry in tensors}
                found.append(
                    CacheEntry(
                        path,
                        path.name.split("-")[0],
                        metadata.get("solver", "unknown"),
                        extents["values"][0],
                        (extents["left"][1], extents["right"][1]),
                        status.st_size,
                        status.st_mtime,
                    )
                )
            except (OSError, CheckpointError, KeyError, IndexError):
                continue  # removed meanwhile, or damaged: the next use discards it
        return sorted(found, key=lambda entry: -entry.last_used)

    def clear(self) -> int:
        """Remove all that is kept, and interrupted searches; returns how many bytes that freed.

        Raises:
            OutputError: an entry cannot be removed.
        """
        freed = self._clear_abandoned()
        freed += KeptJson(layouts_folder(self.folder)).clear() + self.tensor_hashes.clear()
        # With what killed runs left behind, under names that go on.
        for path in (*self._files(), *self.searches.glob("*.safetensors*")):
            freed += removed(path)
        return freed

    def _files(self) -> Iterator[Path]:
        return self.folder.glob(f"*{_SUFFIX}")

    def _path(self, weight: str, solver: str) -> Path:
        return self.folder / f"{weight}-{hashlib.sha256(solver.encode()).hexdigest()[:16]}{_SUFFIX}"

    def _rank(self, path: Path) -> int:
        """How many triplets an entry has; 0 where there is none, or none that can be read."""
        try:
            entries, _ = read_header(path)
            return next(entry.shape[0] for entry in entries if entry.name == "values")
        except (CheckpointError, StopIteration, IndexError):
            return 0

    def _make_room(self, newest: Path) -> None:
        """Forget entries until the rest fits, the least recently used first, `newest` last."""
        self._clear_abandoned()
        sizes = []
        for path in self._files():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            sizes.append((path == newest, status.st_mtime, status.st_size, path))
        total = sum(nbytes for _, _, nbytes, _ in sizes)
        for _, _, nbytes, path in sorted(sizes):
            if total <= self.limit_bytes:
                break
            _discard(path)
            total -= nbytes

    def _clear_abandoned(self) -> int:
        """Remove what killed runs left half-written; returns how many bytes that freed."""
        freed = 0
        for path in self.folder.glob(f".*{_SUFFIX}.*"):
            with suppress(OSError):
                status = path.stat()
                if time.time() - status.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
                    freed += status.st_size
        return freed


def open_cache(folder: str | Path | None) -> BasisCache:
    """The cache in `folder`, by default the user's; errors as of `cache_folder`."""
    return BasisCache(cache_folder(folder))


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, given its bytes; the library has checked them."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length]).get("__metadata__", {}))


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of an entry's metadata, and of its tensors' dtypes, shapes and bytes."""
    facts = {key: value for key, value in sorted(metadata.items()) if key != "sha256"}
    kinds = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in _TENSORS]
    digest = hashlib.sha256(json.dumps([facts, kinds]).encode())
    for name in _TENSORS:
        digest.update(raw(tensors[name]).numpy().data)
    return digest.hexdigest()


def _discard(path: Path) -> None:
    with suppress(OSError):  # in a folder that is not ours to write; it is not used anyway
        path.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    with suppress(OSError):
        os.utime(path)
