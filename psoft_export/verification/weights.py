"""The weights level: every tensor of a merged checkpoint against base and adapter, streaming.

Holds the largest weight and its merged counterpart for each worker thread, never the model.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from psoft_export.adapters.adapter import Adapter, SubspaceAdapter
from psoft_export.bases import BasisFinder
from psoft_export.changes.change import WeightChange
from psoft_export.changes.subspace import SubspaceRotation
from psoft_export.checkpoint.dtypes import CODES, TORCH_DTYPES, WEIGHT_CODES
from psoft_export.checkpoint.reader import CHUNK_BYTES, Checkpoint, FileReader, raw, typed
from psoft_export.checkpoint.safetensors_file import TensorEntry
from psoft_export.device import full_precision
from psoft_export.pipeline import Progress, ProgressCallback, Target, TargetPipeline
from psoft_export.plan import MergePlan, PlannedTensor
from psoft_export.verification import geometry
from psoft_export.verification.evaluation import (
    DOUBLE,
    Deviation,
    measure,
)
from psoft_export.verification.figures import (
    GeometryFigures,
    GeometryLevel,
    WeightFigures,
    WeightsLevel,
)
from psoft_export.weights import BaseReader

_FOUND_AGAIN = 2.0**-23  # the solver's float32 numbers on two machines: neighbours at most
_APPLIED = 0.02  # of `WeightFigures.applied`: what is as good as 0, 1 or 2 times


@dataclass(frozen=True)
class CheckedWeights:
    """What reading a merged checkpoint beside its base gave.

    Attributes:
        weights: the weights level.
        geometry: the geometry level; None for a method that rotates no principal subspace.
        base_sha256: SHA-256 of each weight file of the base, by name.
        merged_sha256: the same of the merged checkpoint: the bytes that the levels are about.
    """

    weights: WeightsLevel
    geometry: GeometryLevel | None
    base_sha256: Mapping[str, str]
    merged_sha256: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _MergedTarget(Target):
    """A target, and its merged weight as the checkpoint has it."""

    written: Tensor


def check_weights(
    plan: MergePlan,
    merged: Checkpoint,
    bases: BasisFinder,
    *,
    device: torch.device,
    product_unit: float = DOUBLE,
    progress: ProgressCallback | None = None,
) -> CheckedWeights:
    """Compare every tensor of a merged checkpoint with what base and adapter mean.

    Args:
        plan: what a merge of this base and adapter consists of.
        merged: the checkpoint to check, in any dtype.
        bases: finds the bases.
        device: where to compute.
        product_unit: unit roundoff of the arithmetic that formed ΔW in the merged checkpoint.
        progress: called after each tensor.

    Raises:
        MismatchError: the base is not the one that the adapter's basis was recorded with.
        CheckpointError: a file cannot be read.
        NonFiniteError: the base holds NaN or infinity.
    """
    reader = BaseReader(plan, bases.cache)
    with reader as base, _WrittenTensors(merged) as written, full_precision():
        check = _Check(plan, base, written, bases, device, product_unit, progress)
        check.run()
        return CheckedWeights(
            check.weights_level(),
            geometry_level(check.geometry, plan.adapter),
            base.sha256(),
            written.sha256(),
        )


def weight_figures(target: Target, deviation: Deviation, dtype: torch.dtype) -> WeightFigures:
    """The figures of one merged weight, written in `dtype`."""
    return WeightFigures(
        module=target.module,
        tensor=target.tensor.spec.name,
        shape=target.tensor.weight_shape,
        dtype=CODES[dtype],
        largest_error_ulp=deviation.largest_ulp,
        not_nearest=deviation.not_nearest,
        relative_error=deviation.relative_error,
        relative_delta=deviation.relative_delta,
        applied=deviation.applied,
    )


def examine_geometry(target: Target, change: WeightChange) -> GeometryFigures | None:
    """What the rotation of one target keeps; None where it is none of a principal subspace."""
    if not isinstance(change, SubspaceRotation):
        return None
    weight = target.weight.as_trained.to(change.basis.a.device)
    return geometry.examine(target.module, weight, change.basis, change.parameters, change.options)


def geometry_level(modules: Sequence[GeometryFigures], adapter: Adapter) -> GeometryLevel | None:
    """The geometry level of an adapter from the figures of its modules; None without any."""
    if not isinstance(adapter, SubspaceAdapter):
        return None
    exact = adapter.basis_options.solver == "full"
    found = [text for m in modules for text in geometry.problems(m, adapter.held_dtype, exact)]
    return GeometryLevel(tuple(modules), tuple(found))


def weight_problem(figures: WeightFigures) -> str | None:
    """What is wrong with one merged weight, or None."""
    if not figures.not_nearest:
        return None
    rows, columns = figures.shape
    text = (
        f"tensor '{figures.tensor}': {figures.not_nearest} of {rows * columns} entries are not "
        f"the {figures.dtype} number nearest to W + ΔW (largest error "
        f"{figures.largest_error_ulp:.3g} ulp)"
    )
    applied = figures.applied
    if applied is None or abs(applied - 1) <= _APPLIED:
        return text
    if abs(applied) <= _APPLIED:
        return f"{text}; the adapter is not in it"
    if abs(applied - 2) <= _APPLIED:
        return f"{text}; the adapter is in it twice"
    return f"{text}; ΔW is in it {applied:.3g} times"


class _WrittenTensors:
    """Reads a merged checkpoint, every file hashed on the way. Use as a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Opens nothing yet."""
        self.entries = checkpoint.entries
        self._checkpoint = checkpoint
        self._files = ExitStack()
        self._readers: dict[Path, FileReader] = {}

    def __enter__(self) -> "_WrittenTensors":
        for file in self._checkpoint.files:
            self._readers[file.path] = self._files.enter_context(FileReader(file))
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def tensor(self, entry: TensorEntry) -> Tensor:
        """A tensor in its stored dtype."""
        return self._readers[entry.file].values(entry)

    def chunks(self, entry: TensorEntry, size: int) -> Iterator[Tensor]:
        """Its bytes in pieces of `size`."""
        return self._readers[entry.file].chunks(entry, size)

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each file, by name; reads what is left of them."""
        return {path.name: reader.sha256() for path, reader in self._readers.items()}


class _Check:
    """One pass over base and merged checkpoint.

    Attributes:
        weights: figures of each merged weight, in the order of the checkpoint.
        geometry: the same of the rotations.
        copied: number of other tensors that are the base's.
        saved: number of tensors that are the adapter's.
    """

    def __init__(
        self,
        plan: MergePlan,
        base: BaseReader,
        written: _WrittenTensors,
        bases: BasisFinder,
        device: torch.device,
        product_unit: float,
        progress: ProgressCallback | None,
    ) -> None:
        self.weights: list[WeightFigures] = []
        self.geometry: list[GeometryFigures] = []
        self.copied = 0
        self.saved = 0
        self._plan = plan
        self._base = base
        self._written = written
        self._bases = bases
        self._device = device
        self._product_unit = product_unit
        self._progress = progress
        self._done_bytes = 0
        self._wrong: list[str] = []

    def run(self) -> None:
        """Compare everything."""
        planned = [t for shard in self._plan.layout.shards for t in shard.tensors]
        names = {tensor.spec.name for tensor in planned}
        for name in sorted(self._written.entries.keys() - names):
            self._wrong.append(f"tensor '{name}' is in neither base nor adapter")
        largest = max(target.spec.nbytes for target in self._plan.targets)
        pipeline = TargetPipeline(self._bases, self._device, self._examined, largest)
        with closing(self._targets(planned)) as targets, closing(pipeline.run(targets)) as done:
            for target, figures in done:
                assert figures is not None
                self.weights.append(figures[0])
                if figures[1] is not None:
                    self.geometry.append(figures[1])
                self._report(target.tensor)

    def weights_level(self) -> WeightsLevel:
        """The weights level."""
        found = [text for figures in self.weights if (text := weight_problem(figures))]
        return WeightsLevel(tuple(self.weights), self.copied, self.saved, (*self._wrong, *found))

    def _targets(self, planned: Sequence[PlannedTensor]) -> Generator[_MergedTarget]:
        """The weights to examine; compares every other tensor on the way."""
        for tensor in planned:
            entry = self._written.entries.get(tensor.spec.name)
            if entry is None:
                self._wrong.append(f"tensor '{tensor.spec.name}' is missing")
            elif entry.shape != tensor.spec.shape:
                self._wrong.append(
                    f"tensor '{entry.name}' has shape {list(entry.shape)}; "
                    f"{list(tensor.spec.shape)} is expected"
                )
            elif tensor.module is None:
                self._compare(tensor, entry)
                self._report(tensor)
            elif entry.dtype not in WEIGHT_CODES:
                self._wrong.append(f"tensor '{entry.name}' has dtype {entry.dtype}, not a float's")
            else:
                written = self._written.tensor(entry)
                yield _MergedTarget(tensor, self._base.target(tensor), written=written)

    def _examined(self, target: Target) -> tuple[WeightFigures, GeometryFigures | None]:
        assert isinstance(target, _MergedTarget)
        change, weight = target.change(self._plan.adapter), target.weight.values.to(self._device)
        of = change.expected(weight)
        if self._bases.finds_again:
            of = replace(of, basis_doubt=_FOUND_AGAIN)
        written = target.written.T if target.tensor.transposed else target.written
        deviation = measure(weight, written, of, self._product_unit)
        figures = weight_figures(target, deviation, written.dtype)
        return figures, examine_geometry(target, change)

    def _compare(self, tensor: PlannedTensor, entry: TensorEntry) -> None:
        """One tensor that is not merged: byte for byte, or the nearest numbers of its dtype."""
        if tensor.saved is None:
            assert tensor.entry is not None
            origin, stored, chunks = "base", tensor.entry.dtype, self._base.chunks(tensor.entry)
        else:
            source = self._plan.adapter.saved[tensor.saved]
            origin, stored = "adapter", CODES[source.dtype]
            chunks = iter(torch.split(raw(source), CHUNK_BYTES))
        if entry.dtype == stored:
            pairs = zip(chunks, self._written.chunks(entry, CHUNK_BYTES), strict=True)
            same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        else:
            same = self._is_rounded(chunks, stored, entry, tensor)
        if not same:
            how = "byte for byte" if entry.dtype == stored else f"rounded to {entry.dtype}"
            self._wrong.append(f"tensor '{entry.name}' is not the {origin}'s, {how}")
        elif tensor.saved is None:
            self.copied += 1
        else:
            self.saved += 1

    def _is_rounded(
        self, chunks: Iterator[Tensor], stored: str, entry: TensorEntry, tensor: PlannedTensor
    ) -> bool:
        """Whether each number is the one of the written dtype nearest to the original."""
        if not {stored, entry.dtype} <= {*WEIGHT_CODES, "F64"}:
            return False
        ours, theirs = TORCH_DTYPES[stored].itemsize, TORCH_DTYPES[entry.dtype].itemsize
        deviation = Deviation(None, may_overflow=not tensor.is_parameter)
        written = self._written.chunks(entry, CHUNK_BYTES // ours * theirs)
        for original, rounded in zip(chunks, written, strict=True):
            column = typed(original, stored)[:, None]
            deviation.add(column, typed(rounded, entry.dtype)[:, None])
        return deviation.not_nearest == 0

    def _report(self, tensor: PlannedTensor) -> None:
        self._done_bytes += tensor.spec.nbytes
        if self._progress is not None:
            total, count = self._plan.output_bytes, len(self._plan.targets)
            done = len(self.weights)
            self._progress(Progress(self._done_bytes, total, done, count, tensor.spec.name))
