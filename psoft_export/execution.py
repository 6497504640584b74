"""Carrying a plan out: every weight file of the output, in one pass over the base.

Reading, computing and writing overlap; memory is bounded by the largest target, not by the model.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
from psoft_export.basis.svd import find_basis
from psoft_export.checkpoint.dtypes import CODES, TORCH_DTYPES
from psoft_export.checkpoint.pipeline import WriteBehind, read_ahead
from psoft_export.checkpoint.reader import FileReader, raw, typed
from psoft_export.checkpoint.safetensors_file import TensorEntry
from psoft_export.checkpoint.writer import ShardWriter
from psoft_export.errors import CheckpointError, NonFiniteError, UsageError
from psoft_export.manifest import ModuleReport
from psoft_export.memory import release_freed_memory
from psoft_export.plan import MergePlan, PlannedShard, PlannedTensor

_CHUNKS_AHEAD = 2


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
class _Chunk:
    """The next stretch of bytes that an output tensor is made from."""

    shard: PlannedShard
    tensor: PlannedTensor
    data: Tensor


class Run:
    """One execution of a plan.

    Attributes:
        modules: what was done to each target, in the order of the output.
        sha256: SHA-256 of each weight file of the base, by name.
    """

    def __init__(
        self, plan: MergePlan, device: torch.device, progress: ProgressCallback | None
    ) -> None:
        """Prepare to carry out `plan` on `device`; reads nothing yet."""
        self.modules: list[ModuleReport] = []
        self.sha256: dict[str, str] = {}
        self._plan = plan
        self._device = device
        self._progress = progress
        self._total_targets = len(plan.targets)
        self._done_bytes = 0

    def write_weights(self, folder: Path) -> None:
        """Write every weight file into `folder`."""
        gathering: _Gathering | None = None
        with ExitStack() as stack:
            sink = stack.enter_context(_ShardSink(folder))
            writer = stack.enter_context(WriteBehind(sink.write, _CHUNKS_AHEAD))
            for chunk in read_ahead(self._chunks(), _CHUNKS_AHEAD):
                tensor = chunk.tensor
                if tensor.module is None:
                    blocks = iter([self._copied(chunk)])
                else:
                    gathering = gathering or _Gathering(_entry(tensor))
                    gathering.add(chunk.data)
                    if not gathering.complete:
                        continue
                    blocks = self._merged(tensor, gathering.weight)
                    gathering = None
                following = next(blocks, None)
                while (data := following) is not None:
                    # Ask for the next block first: after the last one, the target counts as done.
                    following = next(blocks, None)
                    writer.put((chunk.shard, data))
                    self._report(tensor, data.numel())

    def _chunks(self) -> Iterator[_Chunk]:
        """The origin of every output byte, in the order of the output."""
        saved = self._plan.adapter.saved
        with ExitStack() as stack:
            readers = {
                file.path: stack.enter_context(FileReader(file))
                for file in self._plan.checkpoint.files
            }
            for shard in self._plan.shards:
                for tensor in shard.tensors:
                    if tensor.saved is not None:
                        yield _Chunk(shard, tensor, raw(saved[tensor.saved]))
                    else:
                        entry = _entry(tensor)
                        for data in readers[entry.file].chunks(entry):
                            yield _Chunk(shard, tensor, data)
            for path, reader in readers.items():
                self.sha256[path.name] = reader.sha256()

    def _copied(self, chunk: _Chunk) -> Tensor:
        """The output bytes of a tensor that is not merged: its own, or cast to another dtype."""
        tensor = chunk.tensor
        if tensor.saved is not None:
            stored = CODES[self._plan.adapter.saved[tensor.saved].dtype]
        else:
            stored = _entry(tensor).dtype
        wanted = tensor.spec.dtype
        values = typed(chunk.data, stored)
        if tensor.is_parameter and not all_finite(values):
            raise _damaged(_entry(tensor))
        if wanted == stored:
            return chunk.data
        dtype = TORCH_DTYPES[wanted]
        cast = round_to_nearest(values, dtype) if stored == "F64" else values.to(dtype)
        if tensor.is_parameter and not all_finite(cast):
            raise _does_not_fit(tensor)
        return raw(cast)

    def _merged(self, tensor: PlannedTensor, weight: Tensor) -> Iterator[Tensor]:
        """The bytes of a merged weight, in row blocks; adds its report when done."""
        assert tensor.module is not None
        parameters = self._plan.adapter.rotations[tensor.module]
        options = self._plan.adapter.basis_options
        if not all_finite(weight):
            raise _damaged(_entry(tensor))
        try:
            weight = weight.to(self._device)
            release_freed_memory()
            basis = find_basis(weight, options)
            left, right = low_rank_factors(basis.a, basis.b, rotation(parameters), options.scaling)
            figures = MergeFigures(product_norm(left, right))
            dtype = TORCH_DTYPES[tensor.spec.dtype]
            for block in merged_blocks(weight, left, right, dtype, figures):
                if not figures.finite:
                    raise _does_not_fit(tensor)
                yield raw(block)
        except torch.linalg.LinAlgError as cause:  # type: ignore[attr-defined]
            raise CheckpointError(
                f"{_entry(tensor).file}: the SVD of '{tensor.spec.name}' does not converge"
            ) from cause
        except torch.OutOfMemoryError as cause:
            raise UsageError(
                f"device {self._device}: too little GPU memory for '{tensor.spec.name}' "
                f"{list(tensor.spec.shape)}; use --device cpu"
            ) from cause
        rows, columns = tensor.spec.shape
        self.modules.append(
            ModuleReport(
                module=tensor.module,
                tensor=tensor.spec.name,
                shape=(rows, columns),
                rank=parameters.rank,
                relative_delta=figures.relative_delta,
                largest_angle=math.degrees(float(rotation_angles(parameters)[0])),
                orthogonality_error=orthogonality_error(core_rotation(parameters)),
                rounding_ulp=figures.rounding_ulp,
                rounding_relative=figures.relative_rounding,
            )
        )

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


class _Gathering:
    """A target's weight in float32, filled chunk by chunk, so that its bytes are never whole."""

    def __init__(self, entry: TensorEntry) -> None:
        self.weight = torch.empty(entry.shape, dtype=torch.float32)
        self._dtype = entry.dtype
        self._filled = 0

    @property
    def complete(self) -> bool:
        """Whether every entry has arrived."""
        return self._filled == self.weight.numel()

    def add(self, data: Tensor) -> None:
        """Take the next bytes; float16 and bfloat16 widen to float32 exactly."""
        values = typed(data, self._dtype)
        self.weight.view(-1)[self._filled : self._filled + len(values)] = values
        self._filled += len(values)


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
