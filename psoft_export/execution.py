"""Carrying a plan out: every weight file of the output, in one pass over the base.

Reading, computing and writing overlap; memory is bounded by the largest target, not by the model.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from psoft_export.algebra.merged_weight import (
    MergeFigures,
    low_rank_factors,
    merged_blocks,
    product_norm,
)
from psoft_export.algebra.rotation import (
    core_rotation,
    orthogonality_error,
    rotation,
    rotation_angles,
)
from psoft_export.algebra.rounding import all_finite, round_to_nearest
from psoft_export.bases import BasisFinder, FoundBasis
from psoft_export.basis.svd import Basis
from psoft_export.checkpoint.dtypes import CODES, TORCH_DTYPES
from psoft_export.checkpoint.reader import raw, typed
from psoft_export.checkpoint.safetensors_file import TensorEntry
from psoft_export.checkpoint.write_behind import WriteBehind
from psoft_export.checkpoint.writer import ShardWriter
from psoft_export.device import workers_on
from psoft_export.errors import CheckpointError, NonFiniteError, UsageError
from psoft_export.manifest import ModuleReport
from psoft_export.plan import MergePlan, PlannedShard, PlannedTensor
from psoft_export.weights import BaseReader, TargetWeight

P = ParamSpec("P")
T = TypeVar("T")

_CHUNKS_AHEAD = 2
_WAITING_BYTES = 16 * 2**20  # copied tensors that may wait behind a target


@dataclass(frozen=True)
class Progress:
    """How far a merge is: bytes of the output made, targets merged, and the tensor at hand."""

    done_bytes: int
    total_bytes: int
    done_targets: int
    total_targets: int
    tensor: str


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class _Copy:
    """Bytes that an output tensor is copied from."""

    shard: PlannedShard
    tensor: PlannedTensor
    data: Tensor


@dataclass(frozen=True)
class _Target:
    """A weight to be merged, with its basis once that is found."""

    shard: PlannedShard
    tensor: PlannedTensor
    weight: TargetWeight
    basis: FoundBasis | None = None

    @property
    def module(self) -> str:
        """Its module path."""
        assert self.tensor.module is not None
        return self.tensor.module

    def in_single_precision(self) -> "_Target":
        """The same numbers in float32, as an SVD takes them."""
        return replace(self, weight=replace(self.weight, values=self.weight.values.float()))


@dataclass(frozen=True)
class _Merged:
    """A target's bytes, in row blocks, and what is reported of it."""

    blocks: list[Tensor]
    report: ModuleReport


# What a piece of the output waits for: None where its basis takes the full SVD.
_Work = Future[_Merged] | Future[_Merged | None]


class Run:
    """One execution of a plan.

    Attributes:
        modules: what was done to each target, in the order of the output.
        sha256: SHA-256 of each weight file of the base, by name.
    """

    def __init__(
        self,
        plan: MergePlan,
        bases: BasisFinder,
        device: torch.device,
        progress: ProgressCallback | None,
    ) -> None:
        """Prepare to carry out `plan` on `device`; reads nothing yet."""
        self.modules: list[ModuleReport] = []
        self.sha256: dict[str, str] = {}
        self._plan = plan
        self._bases = bases
        self._device = device
        self._progress = progress
        self._total_targets = len(plan.targets)
        self._done_bytes = 0

    def write_weights(self, folder: Path) -> None:
        """Write every weight file into `folder`."""
        count = workers_on(self._device)
        with ExitStack() as stack:
            sink = stack.enter_context(_ShardSink(folder))
            writer = stack.enter_context(WriteBehind(sink.write, _CHUNKS_AHEAD))
            workers = stack.enter_context(_Workers(count))
            largest = max(tensor.spec.nbytes for tensor in self._plan.targets)
            waiting = _Waiting((count + 1) * largest)
            for piece in stack.enter_context(closing(self._pieces())):
                if isinstance(piece, _Target):
                    waiting.add(piece, workers.submit(self._merged_at_once, piece))
                else:
                    waiting.add(piece, None)
                del piece
                while waiting.is_full:
                    self._emit(waiting, workers, writer)
            while waiting:
                self._emit(waiting, workers, writer)

    def _emit(
        self,
        waiting: "_Waiting",
        workers: "_Workers",
        writer: "WriteBehind[tuple[PlannedShard, Tensor]]",
    ) -> None:
        """Hand the bytes of the first piece to the writer, or find its basis where it needs that.

        A full SVD has the machine to itself. The merge that follows runs beside the reading of
        the next piece.
        """
        piece, future = waiting.next()
        if isinstance(piece, _Copy):
            blocks = [self._copied(piece)]
        else:
            assert future is not None
            merged = future.result()
            if merged is None:
                piece = piece.in_single_precision()
                piece = replace(piece, basis=workers.alone(self._basis_by_full_svd, piece))
                waiting.put_back(piece, workers.submit(self._merged, piece))
                return
            waiting.is_narrow = piece.basis is not None
            blocks = merged.blocks
            self.modules.append(merged.report)
        for data in blocks:
            writer.put((piece.shard, data))
            self._report(piece.tensor, data.numel())

    def _pieces(self) -> "Generator[_Copy | _Target]":
        """The origin of every output byte, in the order of the output."""
        saved = self._plan.adapter.saved
        with BaseReader(self._plan) as base:
            for shard in self._plan.layout.shards:
                for tensor in shard.tensors:
                    if tensor.module is not None:
                        yield _Target(shard, tensor, base.target(tensor))
                    elif tensor.saved is not None:
                        yield _Copy(shard, tensor, raw(saved[tensor.saved]))
                    else:
                        for data in base.chunks(_entry(tensor)):
                            yield _Copy(shard, tensor, data)
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
            raise _damaged(_entry(tensor))
        if wanted == stored:
            return piece.data
        dtype = TORCH_DTYPES[wanted]
        cast = round_to_nearest(values, dtype) if stored == "F64" else values.to(dtype)
        if tensor.is_parameter and not all_finite(cast):
            raise _does_not_fit(tensor)
        return raw(cast)

    def _merged_at_once(self, piece: _Target) -> _Merged | None:
        """Merge one target beside others; None where its basis takes the full SVD."""
        weight = piece.weight
        with self._errors_named(piece.tensor):
            if not all_finite(weight.values):
                raise _damaged(_entry(piece.tensor))
            basis = self._bases.find_beside_others(
                piece.module, weight.as_trained, weight.trained.sha256
            )
        return None if basis is None else self._merged(replace(piece, basis=basis))

    def _basis_by_full_svd(self, piece: _Target) -> FoundBasis:
        """The basis of a target whose values are those of training (there is no record)."""
        weight = piece.weight
        with self._errors_named(piece.tensor):
            return self._bases.find_by_training_svd(
                piece.module, weight.values, weight.trained.sha256
            )

    @contextmanager
    def _errors_named(self, tensor: PlannedTensor) -> Iterator[None]:
        """Errors of the computation, with the tensor they are about."""
        try:
            yield
        except torch.linalg.LinAlgError as cause:  # type: ignore[attr-defined]
            raise CheckpointError(
                f"{_entry(tensor).file}: the SVD of '{tensor.spec.name}' does not converge"
            ) from cause
        except torch.OutOfMemoryError as cause:
            raise UsageError(
                f"device {self._device}: too little GPU memory for '{tensor.spec.name}' "
                f"{list(tensor.spec.shape)}; use --device cpu"
            ) from cause

    def _merged(self, piece: _Target) -> _Merged:
        """Merge one target, given its basis."""
        tensor, basis = piece.tensor, piece.basis
        assert basis is not None
        parameters = self._plan.adapter.rotations[piece.module]
        figures, blocks = self._product(piece, basis.basis, rotation(parameters))
        if not figures.finite:
            raise _does_not_fit(tensor)
        rows, columns = tensor.spec.shape
        report = ModuleReport(
            module=piece.module,
            tensor=tensor.spec.name,
            shape=(rows, columns),
            rank=parameters.rank,
            relative_delta=figures.relative_delta,
            largest_angle=math.degrees(float(rotation_angles(parameters)[0])),
            orthogonality_error=orthogonality_error(core_rotation(parameters)),
            basis_uncertainty=basis.uncertainty,
            relative_rounding=figures.relative_rounding,
        )
        return _Merged(blocks, report)

    def _product(
        self, piece: _Target, basis: Basis, turn: Tensor
    ) -> tuple[MergeFigures, list[Tensor]]:
        """The merged weight's bytes in row blocks, and what was measured of it."""
        with self._errors_named(piece.tensor):
            weight = piece.weight.values.to(self._device)
            scaling = self._plan.adapter.basis_options.scaling
            left, right = low_rank_factors(basis.a, basis.b, turn, scaling)
            figures = MergeFigures(product_norm(left, right))
            dtype = TORCH_DTYPES[piece.tensor.spec.dtype]
            blocks = merged_blocks(weight, left, right, dtype, figures)
            return figures, [raw(block) for block in blocks]

    def _report(self, tensor: PlannedTensor, nbytes: int) -> None:
        self._done_bytes += nbytes
        if self._progress is not None:
            self._progress(
                Progress(
                    self._done_bytes,
                    self._plan.output_bytes,
                    len(self.modules),
                    self._total_targets,
                    tensor.spec.name,
                )
            )


class _Workers(AbstractContextManager["_Workers"]):
    """Threads that divide torch's own among them.

    Each piece of work has the same number of torch's threads in every run, so that results do
    not depend on what else was running.
    """

    def __init__(self, count: int) -> None:
        """Start `count` threads."""
        self._threads = torch.get_num_threads()
        self._share = self._threads // count
        self._pool = ThreadPoolExecutor(count, "psoft-merge")
        self._running: set[Future[Any]] = set()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._threads)

    def submit(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> "Future[T]":
        """Start one piece of work."""

        def in_share() -> T:
            # Each time: what one thread sets for itself, MKL takes for all.
            torch.set_num_threads(self._share)
            return work(*args, **named)

        future = self._pool.submit(in_share)
        self._running = {other for other in self._running if not other.done()} | {future}
        return future

    def alone(self, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Do one piece of work here with all of torch's threads, when all others are done."""
        wait(self._running)
        self._running.clear()  # with what they made
        torch.set_num_threads(self._threads)
        return work(*args, **named)


class _Waiting:
    """Pieces on their way, in the order of the output; a bounded number of bytes.

    Small targets do not count as large ones, or a worker would have nothing to do beside one.

    Attributes:
        is_narrow: the last target took a full SVD, so the next will: no more than that one is
            read, while the last is merged. Also the state at the start.
    """

    def __init__(self, target_bytes: int) -> None:
        """Take targets until they reach `target_bytes`, and few copied bytes behind them."""
        self.is_narrow = True
        self._limit = target_bytes
        self._pieces: deque[tuple[_Copy | _Target, _Work | None]] = deque()

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def is_full(self) -> bool:
        """Whether the first piece must go before another can be taken."""
        if not self._pieces:
            return False
        first, future = self._pieces[0]
        copied = sum(p.data.numel() for p, _ in self._pieces if isinstance(p, _Copy))
        if isinstance(first, _Copy) or future is None or future.done() or copied > _WAITING_BYTES:
            return True
        targets = [p.tensor.spec.nbytes for p, _ in self._pieces if isinstance(p, _Target)]
        if self.is_narrow:
            return first.basis is None or len(targets) > 1
        return sum(targets) >= self._limit

    def add(self, piece: _Copy | _Target, future: _Work | None) -> None:
        """Take the next piece, with the work on it where there is some."""
        self._pieces.append((piece, future))

    def next(self) -> tuple[_Copy | _Target, _Work | None]:
        """Take the first piece out."""
        return self._pieces.popleft()

    def put_back(self, piece: _Target, future: _Work) -> None:
        """Put the first piece back, now that its basis is found and its merge begun."""
        self.is_narrow = True
        self._pieces.appendleft((piece, future))


class _ShardSink:
    """Receives the output's bytes in order and keeps one weight file open at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shard: PlannedShard | None = None
        self._writer: ShardWriter | None = None

    def __enter__(self) -> "_ShardSink":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            if kind is None:
                self._writer.close()
            else:
                self._writer.abandon()

    def write(self, item: tuple[PlannedShard, Tensor]) -> None:
        """Append bytes to their file, opening it first where it is the next one."""
        shard, data = item
        if shard is not self._shard:
            if self._writer is not None:
                self._writer.close()
            specs = [tensor.spec for tensor in shard.tensors]
            self._writer = ShardWriter(self._folder / shard.filename, specs, shard.metadata)
            self._shard = shard
        assert self._writer is not None
        self._writer.append(data)


def _entry(tensor: PlannedTensor) -> TensorEntry:
    assert tensor.entry is not None
    return tensor.entry


def _damaged(entry: TensorEntry) -> NonFiniteError:
    return NonFiniteError(
        f"{entry.file}: tensor '{entry.name}' holds NaN or infinity; the base is damaged"
    )


def _does_not_fit(tensor: PlannedTensor) -> NonFiniteError:
    name, dtype = tensor.spec.name, tensor.spec.dtype
    if dtype == "F16":
        why = "does not fit fp16 (an entry became infinite); write a wider dtype, bf16 or fp32"
    else:
        why = "is not finite; the adapter's rotation has grown beyond all bounds"
    return NonFiniteError(f"result: tensor '{name}' {why}")
