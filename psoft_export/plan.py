"""The merge as data: which tensor of the output comes from where.

`planning` makes it before any weight is read; `execution` then only carries it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from psoft_export.adapters.adapter import Adapter, SubspaceAdapter
from psoft_export.checkpoint.names import SAFETENSORS
from psoft_export.checkpoint.reader import CHUNK_BYTES, Checkpoint
from psoft_export.checkpoint.safetensors_file import TensorEntry
from psoft_export.checkpoint.source import Source
from psoft_export.checkpoint.writer import TensorSpec
from psoft_export.device import workers_on


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output.

    It comes from `entry` (a base tensor, copied), from `saved` (a tensor of the adapter's
    `modules_to_save`, as the adapter names it), or from `entry` and `module` (the base tensor,
    changed by that adapter module). Then `transposed` says that the weight is stored in × out.
    """

    spec: TensorSpec
    entry: TensorEntry | None = None
    module: str | None = None
    saved: str | None = None
    is_parameter: bool = True
    transposed: bool = False

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of a weight to be merged: out × in, however it is stored."""
        rows, columns = self.spec.shape
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True)
class PlannedShard:
    """One weight file of the output: its name, metadata, and tensors in the order of its bytes."""

    filename: str
    tensors: tuple[PlannedTensor, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class OutputOptions:
    """What the user asks of an output.

    Attributes:
        dtype: dtype code (`F32`, `F16`, `BF16`) of all floating tensors; None: each keeps the
            dtype it is stored in.
        max_shard_size: upper bound of a weight file (`"5GB"` or bytes); None: the base's files.
        labels: names of the classes of a new classification head; None: the config's, or numbers.
    """

    dtype: str | None = None
    max_shard_size: str | int | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """What an output consists of.

    Attributes:
        shards: the weight files to write.
        class_name: the model class that the adapter's module paths belong to.
        config_changes: fields of `config.json` that differ from the base's.
        warnings: what the user should know, one plain sentence each.
    """

    shards: tuple[PlannedShard, ...]
    class_name: str
    config_changes: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class MergePlan:
    """What a merge will do, and what it needs.

    Attributes:
        base: where the base was read from.
        checkpoint: its weight files.
        adapter: the adapter.
        options: what was asked of the output.
        layout: what the output consists of.
    """

    base: Source
    checkpoint: Checkpoint
    adapter: Adapter
    options: OutputOptions
    layout: Layout

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know, one plain sentence each."""
        return self.layout.warnings

    @property
    def targets(self) -> list[PlannedTensor]:
        """The tensors that are merged, in the order they will be."""
        return [t for shard in self.layout.shards for t in shard.tensors if t.module is not None]

    @property
    def is_indexed(self) -> bool:
        """Whether the output's weights need an index (more than one file, or named as shards)."""
        return [shard.filename for shard in self.layout.shards] != [SAFETENSORS]

    @property
    def output_bytes(self) -> int:
        """Size of the output's tensors."""
        return sum(t.spec.nbytes for shard in self.layout.shards for t in shard.tensors)

    @property
    def working_bytes(self) -> int:
        """Estimate of the memory that tensors take at the worst moment of a merge on the CPU.

        Without a basis record, for the largest target of m × n, k = min(m, n): W in float32, the
        copy that LAPACK overwrites, U, S and Vᵀ, and its workspace (gesdd: about 4k² + 7k
        numbers). With one of signs, for each worker thread a copy of W and a Krylov space in
        float64. Then chunks and weights on their way. Python, its libraries and their buffers
        (some 400 MB) come on top.
        """
        record, workers = self.adapter.record, workers_on(torch.device("cpu"))
        shapes = [target.weight_shape for target in self.targets]
        on_their_way = 2 * (workers + 1) * max((t.spec.nbytes for t in self.targets), default=0)
        if not isinstance(self.adapter, SubspaceAdapter):
            scratch = max(map(self.adapter.scratch_bytes, shapes), default=0)
            return 8 * CHUNK_BYTES + on_their_way + workers * scratch
        if record is None and self.adapter.needs_record:
            return 8 * CHUNK_BYTES + max(map(_svd_bytes, shapes), default=0)
        is_solved = record is not None and record.kind == "signs"
        solving = max(map(_solver_bytes, shapes), default=0) if is_solved else 0
        return 8 * CHUNK_BYTES + on_their_way + workers * solving

    def to_dict(self) -> dict[str, Any]:
        """The plan as one JSON-ready object."""
        return {
            "base": self.base.name,
            "adapter": self.adapter.source.name,
            "model_class": self.layout.class_name,
            "config_changes": dict(self.layout.config_changes),
            "targets": [
                {
                    "module": target.module,
                    "tensor": target.spec.name,
                    "shape": list(target.weight_shape),
                    "rank": self.adapter.rank,
                    "bytes": target.spec.nbytes,
                }
                for target in self.targets
            ],
            "files": [shard.filename for shard in self.layout.shards],
            "disk_bytes": self.output_bytes,
            "memory_bytes": self.working_bytes,
            "basis_record": self.adapter.record.kind if self.adapter.record else None,
            "warnings": list(self.warnings),
        }


def _svd_bytes(shape: tuple[int, ...]) -> int:
    rows, columns = shape
    short = min(rows, columns)
    numbers = 2 * rows * columns + short * (rows + columns) + 4 * short * short + 7 * short
    return 4 * numbers


def _solver_bytes(shape: tuple[int, ...]) -> int:
    """Of `basis.solver`, at worst: W again in float32, a Krylov space, its products with W or G.

    G is the Gram matrix of the short side. (A flat spectrum that float32 does not resolve takes
    up to twice as much: docs/solver.md.)
    """
    rows, columns = shape
    short = min(rows, columns) ** 2
    return 4 * rows * columns + max(16 * short, 5 * rows * columns + 10 * short)
