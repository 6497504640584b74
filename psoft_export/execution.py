"""Carrying a plan out: every weight file of the output, in one pass over the base, checked."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Collection, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from psoft_export.algebra.rounding import all_finite, round_to_nearest
from psoft_export.bases import BasisFinder
from psoft_export.checkpoint.cloning import clone_file
from psoft_export.checkpoint.dtypes import CODES, TORCH_DTYPES
from psoft_export.checkpoint.reader import CHUNK_BYTES, file_sha256, raw, typed
from psoft_export.checkpoint.safetensors_file import TensorEntry, read_tensor
from psoft_export.checkpoint.uncached import WRITE_BYTES
from psoft_export.checkpoint.write_behind import WriteBehind
from psoft_export.checkpoint.writer import ShardWriter
from psoft_export.checkpoint.written_hash import WrittenHash
from psoft_export.device import full_precision, workers_on
from psoft_export.errors import NonFiniteError, NotEquivalentError, OutputError
from psoft_export.manifest import ModuleReport
from psoft_export.pipeline import Progress, ProgressCallback, Target, TargetPipeline, damaged
from psoft_export.plan import MergePlan, PlannedShard, PlannedTensor
from psoft_export.verification.evaluation import Deviation, measure
from psoft_export.verification.figures import (
    GeometryFigures,
    GeometryLevel,
    WeightFigures,
    WeightsLevel,
)
from psoft_export.verification.tiles import row_parts
from psoft_export.verification.weights import (
    examine_geometry,
    geometry_level,
    weight_figures,
    weight_problem,
)
from psoft_export.weights import BaseReader

_CHUNKS_AHEAD = 12  # about a weight, so that the next are read while it is written
_STRETCHES = 64  # of a file, each read back as soon as it is on disk
_READERS = 4  # of stretches, at a time


@dataclass(frozen=True)
class _Copy:
    """Bytes that an output tensor is copied from."""

    tensor: PlannedTensor
    data: Tensor

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return self.data.numel()


@dataclass(frozen=True)
class _Merged:
    """A target's bytes, what is reported of it, and how good it was found."""

    data: Tensor
    report: ModuleReport
    figures: WeightFigures
    geometry: GeometryFigures | None


class Run:
    """One execution of a plan.

    Each merged weight is held against the second evaluation as it is made (`verification`), and
    each file, once written, compared with what was to be written.

    Attributes:
        modules: what was done to each target, in the order of the output.
        sha256: SHA-256 of each weight file of the base, by name.
        files: SHA-256 of each weight file of the output, by name.
    """

    def __init__(
        self,
        plan: MergePlan,
        bases: BasisFinder,
        device: torch.device,
        progress: ProgressCallback | None,
        *,
        with_geometry: bool = False,
    ) -> None:
        """Prepare to carry out `plan` on `device`; reads nothing yet.

        With `with_geometry`, what the rotations keep is examined as well.
        """
        self.modules: list[ModuleReport] = []
        self.sha256: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self._figures: list[WeightFigures] = []
        self._geometry: list[GeometryFigures] = []
        self._with_geometry = with_geometry
        self._product_unit = torch.finfo(plan.adapter.product_dtype(device)).eps / 2
        self._plan = plan
        self._device = device
        self._progress = progress
        self._targets = plan.targets
        largest = max(target.spec.nbytes for target in self._targets)
        self._cache = bases.cache
        self._pipeline = TargetPipeline(bases, device, self._merged, largest)
        self._done_bytes, self._total_bytes = 0, plan.output_bytes
        self._changed: Collection[str] | None = None

    def write_weights(self, folder: Path) -> None:
        """Write every weight file into `folder`."""
        self._write(_ShardSink(folder, self._plan.layout.shards, self.files))

    def rewrite(
        self, merged: Mapping[str, TensorEntry], folder: Path, changed: Collection[str]
    ) -> None:
        """Write the weight files that differ from those of another merge of the same base.

        Args:
            merged: the tensors of that other merge, by name; of the layout of this plan.
            folder: to write into.
            changed: the tensors that differ; all others stay as they are in `merged`.
        """
        self._changed = changed
        entries = {name: merged[name] for name in changed}
        self._total_bytes = sum(entry.nbytes for entry in entries.values())
        self._write(_PatchSink(folder, entries, self.files))

    def _write(self, sinks: "_Sink") -> None:
        with ExitStack() as stack:
            stack.enter_context(full_precision())
            sink = stack.enter_context(sinks)
            writer = stack.enter_context(WriteBehind(sink.write, _CHUNKS_AHEAD))
            pieces = stack.enter_context(closing(self._pieces()))
            done = stack.enter_context(closing(self._pipeline.run(pieces)))
            for piece, merged in done:
                if merged is not None:
                    self.modules.append(merged.report)
                    self._figures.append(merged.figures)
                    if merged.geometry is not None:
                        self._geometry.append(merged.geometry)
                    data = merged.data
                else:
                    assert isinstance(piece, _Copy)
                    data = self._copied(piece)
                for part in torch.split(data, CHUNK_BYTES):
                    writer.put((piece.tensor, part))
                    self._report(piece.tensor, part.numel())
                del piece, merged, data, part  # not held while the next is computed

    def weights_level(self) -> WeightsLevel:
        """The weights level of what was written; nothing is written that is not equivalent."""
        planned = [t for shard in self._plan.layout.shards for t in shard.tensors]
        saved = sum(tensor.saved is not None for tensor in planned)
        copied = len(planned) - saved - len(self._figures)
        return WeightsLevel(tuple(self._figures), copied, saved, ())

    def geometry_level(self) -> GeometryLevel | None:
        """The geometry level, where it was asked for."""
        return geometry_level(self._geometry, self._plan.adapter) if self._with_geometry else None

    def _pieces(self) -> Generator[_Copy | Target]:
        """The origin of every output byte, in the order of the output."""
        saved = self._plan.adapter.saved
        with BaseReader(self._plan, self._cache) as base:
            for shard in self._plan.layout.shards:
                for tensor in shard.tensors:
                    if self._changed is not None and tensor.spec.name not in self._changed:
                        continue
                    if tensor.module is not None:
                        yield Target(tensor, base.target(tensor))
                    elif tensor.saved is not None:
                        yield _Copy(tensor, raw(saved[tensor.saved]))
                    else:
                        for data in base.chunks(_entry(tensor)):
                            yield _Copy(tensor, data)
            self.sha256 = base.sha256()

    def _copied(self, piece: _Copy) -> Tensor:
        """The output bytes of a tensor that is not merged: its own, or cast to another dtype."""
        tensor = piece.tensor
        if tensor.saved is not None:
            stored = CODES[self._plan.adapter.saved[tensor.saved].dtype]
        else:
            stored = _entry(tensor).dtype
        wanted = tensor.spec.dtype
        values = typed(piece.data, stored)
        if tensor.is_parameter and not all_finite(values):
            raise damaged(tensor)
        if wanted == stored:
            return piece.data
        dtype = TORCH_DTYPES[wanted]
        cast = round_to_nearest(values, dtype) if stored == "F64" else values.to(dtype)
        if tensor.is_parameter and not all_finite(cast):
            raise _does_not_fit(tensor)
        deviation = Deviation(None, may_overflow=not tensor.is_parameter)
        deviation.add(values[:, None], cast[:, None])
        if deviation.not_nearest:
            raise _not_equivalent(f"tensor '{tensor.spec.name}' was not rounded to {wanted}")
        return raw(cast)

    def _merged(self, target: Target) -> _Merged:
        """Merge one target, given its basis, and check the result by the second evaluation."""
        tensor, found = target.tensor, target.basis
        assert found is not None
        weight = target.weight.values.to(self._device)
        target = replace(target, weight=replace(target.weight, values=weight))
        change = target.change(self._plan.adapter)
        dtype, expected = TORCH_DTYPES[tensor.spec.dtype], change.expected(weight)
        merge, merged = change.merging(weight), weight.new_empty(weight.shape, dtype=dtype)

        def merge_rows(rows: slice) -> Deviation:
            of = expected.of_rows(rows)
            return measure(weight[rows], merged[rows], of, self._product_unit, merge)

        parts = row_parts(weight, workers_on(self._device))
        deviation, *others = self._pipeline.map(target, merge_rows, parts)
        for following in others:
            deviation.join(following)
        if not deviation.finite:
            raise _does_not_fit(tensor)
        equivalence = weight_figures(target, deviation, dtype)
        if (problem := weight_problem(equivalence)) is not None:
            raise _not_equivalent(problem)
        facts = change.facts
        report = ModuleReport(
            module=target.module,
            tensor=tensor.spec.name,
            shape=tensor.weight_shape,
            rank=facts.rank,
            relative_delta=deviation.relative_delta,
            largest_angle=facts.largest_angle,
            orthogonality_error=facts.orthogonality_error,
            basis_uncertainty=found.uncertainty,
            relative_rounding=deviation.relative_rounding,
        )
        geometry = examine_geometry(target, change) if self._with_geometry else None
        data = raw(merged.T if tensor.transposed else merged)
        return _Merged(data, report, equivalence, geometry)

    def _report(self, tensor: PlannedTensor, nbytes: int) -> None:
        self._done_bytes += nbytes
        if self._progress is not None:
            self._progress(
                Progress(
                    self._done_bytes,
                    self._total_bytes,
                    len(self.modules),
                    len(self._targets),
                    tensor.spec.name,
                )
            )


class _Sink(AbstractContextManager["_Sink"]):
    """Where the output's bytes go."""

    @abstractmethod
    def write(self, item: tuple[PlannedTensor, Tensor]) -> None:
        """Take the next bytes of a tensor."""


class _ShardSink(_Sink):
    """Receives the output's bytes in order and keeps one weight file open at a time.

    Files are written past the page cache and read back from the disk behind the writing, the last
    of it while the next file is written; the SHA-256 of each goes into `files`.
    """

    def __init__(
        self, folder: Path, shards: tuple[PlannedShard, ...], files: dict[str, str]
    ) -> None:
        self._folder = folder
        self._files = files
        self._shards = {tensor.spec.name: shard for shard in shards for tensor in shard.tensors}
        self._shard: PlannedShard | None = None
        self._open: tuple[ShardWriter, WrittenHash] | None = None
        self._found: list[Future[bool]] = []
        self._pool = ThreadPoolExecutor(1 + _READERS, "psoft-finish")
        self._complete: _CompleteFile | None = None

    def __enter__(self) -> "_ShardSink":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pool:
            try:
                if kind is None:
                    self._finish()
                    self._compare()
            finally:
                if self._open is not None:
                    self._open[0].abandon()

    def write(self, item: tuple[PlannedTensor, Tensor]) -> None:
        """Append a tensor's bytes to its file, opening it first where it is the next one."""
        tensor, data = item
        shard = self._shards[tensor.spec.name]
        if shard is not self._shard:
            self._finish()
            specs = [planned.spec for planned in shard.tensors]
            digest = WrittenHash(sum(spec.nbytes for spec in specs), _STRETCHES)
            path = self._folder / shard.filename
            self._open = ShardWriter(path, specs, shard.metadata, digest, cached=False), digest
            self._found = []
            self._shard = shard
        assert self._open is not None
        self._open[0].append(data)
        self._read_back(*self._open)

    def _read_back(self, writer: ShardWriter, digest: WrittenHash) -> None:
        """Compare what came to be on disk."""
        for stretch in digest.stretches(writer.on_disk):
            self._found.append(self._pool.submit(stretch.reads_back, writer.path))

    def _finish(self) -> None:
        """Flush and read back the file at hand, once the one before it is found to be right."""
        if self._open is None:
            return
        self._compare()
        writer, digest = self._open
        writer.flush()
        digest.end()
        self._open = None
        self._read_back(writer, digest)
        closed = self._pool.submit(writer.close)
        self._complete = _CompleteFile(writer.path, digest.hexdigest(), closed, self._found)

    def _compare(self) -> None:
        if (file := self._complete) is None:
            return
        size = file.closed.result()
        same = [part.result() for part in file.found]
        if not all(same) or file.path.stat().st_size != size:
            raise _not_equivalent(f"{file.path.name} reads back as other bytes than written")
        self._files[file.path.name] = file.sha256


@dataclass(frozen=True)
class _CompleteFile:
    """A file on its way to disk: SHA-256 and size of what was written, and whether it is there."""

    path: Path
    sha256: str
    closed: Future[int]
    found: list[Future[bool]]


class _PatchSink(_Sink):
    """Receives the bytes of some tensors and puts them into copies of the files that have them.

    What was written is read back, and the SHA-256 of each file goes into `files`.
    """

    def __init__(
        self, folder: Path, entries: Mapping[str, TensorEntry], files: dict[str, str]
    ) -> None:
        self._folder = folder
        self._entries = entries
        self._files = files
        self._handles: dict[Path, BinaryIO] = {}
        self._written: dict[str, int] = {}
        self._digests: dict[str, hashlib._Hash] = {}

    def __enter__(self) -> "_PatchSink":
        for entry in self._entries.values():
            if entry.file not in self._handles:
                path = self._folder / entry.file.name
                clone_file(entry.file, path)
                self._handles[entry.file] = path.open("r+b", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for handle in self._handles.values():
                handle.close()

    def write(self, item: tuple[PlannedTensor, Tensor]) -> None:
        """Write the next bytes of a tensor."""
        tensor, data = item
        name = tensor.spec.name
        entry, done = self._entries[name], self._written.get(name, 0)
        handle, view = self._handles[entry.file], data.numpy().data
        self._digests.setdefault(name, hashlib.sha256()).update(view)
        while view:
            count = os.pwrite(handle.fileno(), view[:WRITE_BYTES], entry.offset + done)
            done, view = done + count, view[count:]
        self._written[name] = done

    def _finish(self) -> None:
        for name, entry in self._entries.items():
            path = self._folder / entry.file.name
            whole = self._written.get(name) == entry.nbytes
            there = replace(entry, file=path)
            if not whole or _bytes_sha256(there) != self._digests[name].hexdigest():
                raise _not_equivalent(f"tensor '{name}' reads back as other bytes than written")
        for file, handle in self._handles.items():
            os.fsync(handle.fileno())
            self._files[file.name] = file_sha256(self._folder / file.name, OutputError)


def _bytes_sha256(entry: TensorEntry) -> str:
    return hashlib.sha256(raw(read_tensor(entry, OutputError)).numpy().data).hexdigest()


def _entry(tensor: PlannedTensor) -> TensorEntry:
    assert tensor.entry is not None
    return tensor.entry


def _does_not_fit(tensor: PlannedTensor) -> NonFiniteError:
    name, dtype = tensor.spec.name, tensor.spec.dtype
    if dtype == "F16":
        why = "does not fit fp16 (an entry became infinite); write a wider dtype, bf16 or fp32"
    else:
        why = "is not finite; the adapter's rotation has grown beyond all bounds"
    return NonFiniteError(f"result: tensor '{name}' {why}")


def _not_equivalent(problem: str) -> NotEquivalentError:
    return NotEquivalentError(
        f"result: {problem}; nothing was written. A fault of memory or disk, or a bug: run again, "
        "and report it if it stays"
    )
