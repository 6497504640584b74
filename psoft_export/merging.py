"""Merging an adapter into its base: carry a plan out, tensor by tensor, into a folder.

Reading, computing and writing overlap; memory is bounded by the largest target, not by the model.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psoft_export.adapters.psoft import load_adapter
from psoft_export.algebra.merged_weight import (
    MergeFigures,
    low_rank_factors,
    merged_blocks,
    product_dtype,
    product_error_bound,
)
from psoft_export.algebra.rotation import core_rotation, orthogonality_error, rotation_angles
from psoft_export.algebra.rotation import rotation as rotation_matrix
from psoft_export.algebra.rounding import round_to_nearest
from psoft_export.basis.svd import find_basis
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.dtypes import CODES, TORCH_DTYPES, parse_dtype
from psoft_export.checkpoint.output import OutputFolder, check_target
from psoft_export.checkpoint.pipeline import WriteBehind, read_ahead
from psoft_export.checkpoint.reader import (
    INDEX,
    SAFETENSORS,
    FileReader,
    file_sha256,
    open_checkpoint,
    raw,
    typed,
    weight_files,
)
from psoft_export.checkpoint.safetensors_file import TensorEntry
from psoft_export.checkpoint.source import resolve
from psoft_export.checkpoint.writer import ShardWriter
from psoft_export.device import choose_device, device_name
from psoft_export.errors import NonFiniteError, OutputError, UsageError
from psoft_export.manifest import FILENAME, MergeReport, ModuleReport, manifest, source_record
from psoft_export.plan import MergePlan, PlannedShard, PlannedTensor, make_plan

_QUEUE_DEPTH = 1
_SMALL_FILES_BYTES = 64 * 2**20  # room for headers, config and tokenizer in the disk check


@dataclass(frozen=True)
class Progress:
    """How far a merge is: bytes of the output made, targets merged, and the tensor at hand."""

    done_bytes: int
    total_bytes: int
    done_targets: int
    total_targets: int
    tensor: str


ProgressCallback = Callable[[Progress], None]


def merge(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> MergeReport:
    """Write the checkpoint in which a PSOFT adapter is merged into its base.

    For every target module W + scaling · B (R − I) A, with the basis (A, B) that PEFT would find
    on this device, summed in float64 and rounded once. Every other tensor is copied byte for
    byte. The output folder appears only when it is complete.

    Args:
        base: folder or Hub id (`owner/name[@revision]`) of the base checkpoint.
        adapter: folder or Hub id of the adapter.
        output: folder to write.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `fp32`, `fp16` or `bf16` for every floating tensor of the output; by default each
            keeps the dtype it is stored in.
        max_shard_size: largest weight file, as `"5GB"` or bytes; by default the base's own files.
        labels: names of the classes of a new classification head.
        overwrite: replace a non-empty output folder.
        token: a Hub token; by default the one that `hf auth login` stored.
        progress: called after every piece of the output.

    Returns:
        What was done, module by module.

    Raises:
        PsoftExportError: a subclass that says what is wrong; see `docs/exit-codes.md`.

    Example:
        >>> report = psoft_export.merge("base", "adapter", "merged", dtype="bf16")
        >>> max(module.relative_delta for module in report.modules)
    """
    chosen = choose_device(device)
    check_target(Path(output).absolute(), overwrite=overwrite)
    plan = plan_merge(
        base, adapter, dtype=dtype, max_shard_size=max_shard_size, labels=labels, token=token
    )
    return execute_merge(plan, output, device=chosen, overwrite=overwrite, progress=progress)


def plan_merge(
    base: str | Path,
    adapter: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    labels: Sequence[str] | None = None,
    token: str | None = None,
) -> MergePlan:
    """What `merge` would do with these arguments; reads headers and the adapter, no weights."""
    code = parse_dtype(dtype) if dtype is not None else None
    loaded = load_adapter(adapter, token=token)
    source = resolve(base, companions.CONFIG, base_files, token=token)
    checkpoint = open_checkpoint(source.folder)
    return make_plan(
        source,
        checkpoint,
        loaded,
        dtype=code,
        max_shard_size=max_shard_size,
        labels=tuple(labels) if labels is not None else None,
    )


def base_files(names: Iterable[str]) -> list[str]:
    """Of a Hub repository's file names, those that a merge reads from a base."""
    names = list(names)
    return [*weight_files(names), *companions.base_files(names)]


def execute_merge(
    plan: MergePlan,
    output: str | Path,
    *,
    device: torch.device,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> MergeReport:
    """Carry out a plan. See `merge`."""
    target = Path(output)
    _check_apart(target, plan)
    files = companions.gather(plan.base.folder, plan.adapter.source.folder)
    room = plan.output_bytes + _SMALL_FILES_BYTES
    with OutputFolder(target, overwrite=overwrite, needed_bytes=room) as folder:
        companions.write_companions(files, folder.path)
        companions.write_config(plan.base.folder, plan.config_changes, folder.path)
        run = _Run(plan, device, progress)
        run.write_weights(folder.path)
        if plan.is_indexed:
            companions.write_json(folder.path / (SAFETENSORS + INDEX), _weight_index(plan))
        content = _manifest(plan, device, run, files)
        companions.write_json(folder.path / FILENAME, content)
        folder.commit()
    return MergeReport(target, tuple(run.modules), content)


@dataclass(frozen=True)
class _Piece:
    """Bytes of one output tensor: all of it for a merge, otherwise the next stretch."""

    shard: PlannedShard
    tensor: PlannedTensor
    data: Tensor


class _Run:
    """One execution of a plan: what it has measured so far."""

    def __init__(
        self, plan: MergePlan, device: torch.device, progress: ProgressCallback | None
    ) -> None:
        self.modules: list[ModuleReport] = []
        self.sha256: dict[str, str] = {}
        self._plan = plan
        self._device = device
        self._progress = progress
        self._total_targets = len(plan.targets)
        self._done_bytes = 0

    def write_weights(self, folder: Path) -> None:
        """Write every weight file into `folder`."""
        with ExitStack() as stack:
            sink = stack.enter_context(_ShardSink(folder))
            writer = stack.enter_context(WriteBehind(sink.write, _QUEUE_DEPTH))
            for piece in read_ahead(self._pieces(), _QUEUE_DEPTH):
                for data in self._transformed(piece):
                    writer.put((piece.shard, data))
                    self._report(piece.tensor, data.numel())

    def _pieces(self) -> Iterator[_Piece]:
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
                        yield _Piece(shard, tensor, raw(saved[tensor.saved]))
                    elif tensor.module is not None:
                        yield _Piece(shard, tensor, _reader(readers, tensor).read(_entry(tensor)))
                    else:
                        for data in _reader(readers, tensor).chunks(_entry(tensor)):
                            yield _Piece(shard, tensor, data)
            for path, reader in readers.items():
                self.sha256[path.name] = reader.sha256()

    def _transformed(self, piece: _Piece) -> Iterator[Tensor]:
        """Output bytes of a piece."""
        if piece.tensor.module is not None:
            yield from self._merged(piece)
            return
        stored = self._stored_code(piece.tensor)
        values = typed(piece.data, stored)
        wanted = piece.tensor.spec.dtype
        if values.is_floating_point() and piece.tensor.is_parameter:
            self._check_finite(values, piece.tensor)
        if wanted == stored:
            yield piece.data
            return
        dtype = TORCH_DTYPES[wanted]
        cast = round_to_nearest(values, dtype) if stored == "F64" else values.to(dtype)
        if piece.tensor.is_parameter:
            self._check_result(bool(torch.isfinite(cast).all()), piece.tensor)
        yield raw(cast)

    def _merged(self, piece: _Piece) -> Iterator[Tensor]:
        """The merged weight of a target, in row blocks; adds its report when done."""
        adapter, tensor, entry = self._plan.adapter, piece.tensor, _entry(piece.tensor)
        assert tensor.module is not None
        weight = typed(piece.data, entry.dtype, entry.shape)
        self._check_finite(weight, tensor)
        parameters = adapter.rotations[tensor.module]
        figures = MergeFigures()
        try:
            weight = weight.to(self._device)
            basis = find_basis(weight, adapter.basis_options)
            left, right = low_rank_factors(
                basis.a, basis.b, rotation_matrix(parameters), adapter.basis_options.scaling
            )
            dtype = TORCH_DTYPES[tensor.spec.dtype]
            for block in merged_blocks(weight, left, right, dtype, figures):
                self._check_result(figures.finite, tensor)
                yield raw(block)
        except torch.OutOfMemoryError as cause:
            raise UsageError(
                f"device {self._device}: too little GPU memory for '{entry.name}' "
                f"{list(entry.shape)}; use --device cpu"
            ) from cause
        angles = rotation_angles(parameters)
        rows, columns = entry.shape
        self.modules.append(
            ModuleReport(
                module=tensor.module,
                tensor=tensor.spec.name,
                shape=(rows, columns),
                rank=parameters.rank,
                relative_delta=figures.relative_delta,
                largest_angle=math.degrees(float(angles[0])),
                orthogonality_error=orthogonality_error(core_rotation(parameters)),
                rounding_ulp=figures.rounding_ulp,
                rounding_relative=figures.relative_rounding,
            )
        )

    def _stored_code(self, tensor: PlannedTensor) -> str:
        if tensor.saved is not None:
            return CODES[self._plan.adapter.saved[tensor.saved].dtype]
        return _entry(tensor).dtype

    def _check_finite(self, values: Tensor, tensor: PlannedTensor) -> None:
        if not torch.isfinite(values).all():
            entry = _entry(tensor)
            raise NonFiniteError(
                f"{entry.file}: tensor '{entry.name}' holds NaN or infinity; the base is damaged"
            )

    def _check_result(self, finite: bool, tensor: PlannedTensor) -> None:
        if not finite:
            raise NonFiniteError(
                f"result: tensor '{tensor.spec.name}' does not fit {tensor.spec.dtype} (an entry "
                "became infinite); write a wider dtype, bf16 or fp32"
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


def _reader(readers: dict[Path, FileReader], tensor: PlannedTensor) -> FileReader:
    return readers[_entry(tensor).file]


def _check_apart(target: Path, plan: MergePlan) -> None:
    """The output must not replace a folder that is being read."""
    output = target.resolve()
    for folder in (plan.base.folder.resolve(), plan.adapter.source.folder.resolve()):
        if output == folder or output in folder.parents:
            raise OutputError(f"{target}: is or holds the input {folder}; choose another output")


def _weight_index(plan: MergePlan) -> dict[str, Any]:
    weight_map = {t.spec.name: shard.filename for shard in plan.shards for t in shard.tensors}
    return {"metadata": {"total_size": plan.output_bytes}, "weight_map": weight_map}


def _manifest(
    plan: MergePlan, device: torch.device, run: _Run, files: dict[str, Path]
) -> dict[str, Any]:
    adapter, options = plan.adapter, plan.adapter.basis_options
    base_folder = plan.base.folder
    base_hashes = dict(run.sha256)
    adapter_hashes = dict(adapter.sha256)
    index = next((n for n in weight_files(p.name for p in base_folder.iterdir())), "")
    for name, path in (
        *files.items(),
        (companions.CONFIG, base_folder / companions.CONFIG),
        *([(index, base_folder / index)] if index.endswith(INDEX) else []),
    ):
        hashes = base_hashes if path.is_relative_to(base_folder) else adapter_hashes
        hashes[name] = file_sha256(path)
    compute = product_dtype(device)
    return manifest(
        base=source_record(plan.base, base_hashes),
        adapter=source_record(adapter.source, adapter_hashes),
        class_name=plan.class_name,
        options={
            "dtype": plan.dtype,
            "max_shard_size": plan.max_shard_size,
            "labels": plan.config_changes.get("id2label"),
        },
        svd={
            "solver": options.solver,
            "dtype": "float32",
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        },
        product={
            "dtype": str(compute).removeprefix("torch."),
            "relative_error_bound": product_error_bound(options.rank, compute),
        },
        modules=tuple(run.modules),
        warnings=plan.warnings,
    )
