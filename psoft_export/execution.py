"""Carrying a plan out: every weight file of the output, in one pass over the base.

Reading, computing and writing overlap; memory is bounded by the largest target, not by the model.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

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
from psoft_export.bases import BasisFinder
from psoft_export.checkpoint.dtypes import CODES, TORCH_DTYPES
from psoft_export.checkpoint.pipeline import WriteBehind, read_ahead
from psoft_export.checkpoint.reader import raw, typed
from psoft_export.checkpoint.safetensors_file import TensorEntry
from psoft_export.checkpoint.writer import ShardWriter
from psoft_export.errors import CheckpointError, NonFiniteError, UsageError
from psoft_export.manifest import ModuleReport
from psoft_export.plan import MergePlan, PlannedShard, PlannedTensor
from psoft_export.weights import BaseReader, TargetWeight

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
    """A weight to be merged."""

    shard: PlannedShard
    tensor: PlannedTensor
    weight: TargetWeight


@dataclass(frozen=True)
class _Merged:
    """A target's bytes, in row blocks, and what is reported of it."""

    blocks: list[Tensor]
    report: ModuleReport


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
        workers = torch.get_num_threads() if self._bases.concurrent else 1
        with ExitStack() as stack:
            sink = stack.enter_context(_ShardSink(folder))
            writer = stack.enter_context(WriteBehind(sink.write, _CHUNKS_AHEAD))
            submit = stack.enter_context(_workers(workers))
            waiting = _Waiting(1 if workers == 1 else workers + 1)
            for piece in read_ahead(self._pieces(), 1):
                if isinstance(piece, _Target):
                    waiting.add(piece, submit(self._merged, piece))
                else:
                    waiting.add(piece, None)
                del piece
                while waiting.is_full:
                    self._emit(*waiting.next(), writer)
            while waiting:
                self._emit(*waiting.next(), writer)

    def _emit(
        self,
        piece: "_Copy | _Target",
        future: "Future[_Merged] | None",
        writer: "WriteBehind[tuple[PlannedShard, Tensor]]",
    ) -> None:
        """Hand the bytes of one piece to the writer, when they are there."""
        if future is None:
            assert isinstance(piece, _Copy)
            blocks = [self._copied(piece)]
        else:
            merged = future.result()
            blocks = merged.blocks
            self.modules.append(merged.report)
        for data in blocks:
            writer.put((piece.shard, data))
            self._report(piece.tensor, data.numel())

    def _pieces(self) -> "Iterator[_Copy | _Target]":
        """The origin of every output byte, in the order of the output."""
        saved = self._plan.adapter.saved
        with BaseReader(self._plan) as base:
            for shard in self._plan.shards:
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

    def _merged(self, piece: _Target) -> _Merged:
        """Merge one target; runs in a worker thread."""
        tensor = piece.tensor
        try:
            return self._merge_weight(tensor, piece.weight)
        except torch.linalg.LinAlgError as cause:  # type: ignore[attr-defined]
            raise CheckpointError(
                f"{_entry(tensor).file}: the SVD of '{tensor.spec.name}' does not converge"
            ) from cause
        except torch.OutOfMemoryError as cause:
            raise UsageError(
                f"device {self._device}: too little GPU memory for '{tensor.spec.name}' "
                f"{list(tensor.spec.shape)}; use --device cpu"
            ) from cause

    def _merge_weight(self, tensor: PlannedTensor, target: TargetWeight) -> _Merged:
        module = tensor.module
        assert module is not None
        if not all_finite(target.values):
            raise _damaged(_entry(tensor))
        parameters = self._plan.adapter.rotations[module]
        found = self._bases.find(module, target.as_trained, target.trained.sha256)
        weight = target.values.to(self._device)
        turn = rotation(parameters)
        scaling = self._plan.adapter.basis_options.scaling
        left, right = low_rank_factors(found.basis.a, found.basis.b, turn, scaling)
        figures = MergeFigures(product_norm(left, right))
        dtype = TORCH_DTYPES[tensor.spec.dtype]
        blocks = [raw(block) for block in merged_blocks(weight, left, right, dtype, figures)]
        if not figures.finite:
            raise _does_not_fit(tensor)
        rows, columns = tensor.spec.shape
        report = ModuleReport(
            module=module,
            tensor=tensor.spec.name,
            shape=(rows, columns),
            rank=parameters.rank,
            relative_delta=figures.relative_delta,
            largest_angle=math.degrees(float(rotation_angles(parameters)[0])),
            orthogonality_error=orthogonality_error(core_rotation(parameters)),
            basis_uncertainty=found.uncertainty,
            relative_rounding=figures.relative_rounding,
        )
        return _Merged(blocks, report)

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


@contextmanager
def _workers(count: int) -> Iterator[Callable[..., "Future[_Merged]"]]:
    """A way to start work: in `count` threads of one torch thread each, or here and now for one.

    One worker means that torch's own threads do the work; those of a second thread would only
    wait for the first's.
    """
    if count == 1:
        yield _at_once
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "psoft-merge", torch.set_num_threads, (1,))
    try:
        yield pool.submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # threads made from now on would have one


def _at_once(work: Callable[[_Target], _Merged], piece: _Target) -> "Future[_Merged]":
    future: Future[_Merged] = Future()
    future.set_result(work(piece))
    return future


class _Waiting:
    """Pieces on their way, in the order of the output; a bounded number of them."""

    def __init__(self, targets: int) -> None:
        """Hold at most `targets` targets, and few copied bytes behind them."""
        self._limit = targets
        self._pieces: deque[tuple[_Copy | _Target, Future[_Merged] | None]] = deque()

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def is_full(self) -> bool:
        """Whether the first piece must go before another can be taken."""
        if not self._pieces:
            return False
        futures = [future for _, future in self._pieces if future is not None]
        copied = sum(p.data.numel() for p, _ in self._pieces if isinstance(p, _Copy))
        first = self._pieces[0][1]
        ready = first is None or first.done()
        return ready or len(futures) >= self._limit or copied > _WAITING_BYTES

    def add(self, piece: _Copy | _Target, future: "Future[_Merged] | None") -> None:
        """Take the next piece, with the work on it where there is some."""
        self._pieces.append((piece, future))

    def next(self) -> "tuple[_Copy | _Target, Future[_Merged] | None]":
        """The first piece."""
        return self._pieces.popleft()


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
