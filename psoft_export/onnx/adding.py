"""Adding a task to a graph that has been exported, from the graph and the adapter alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor
from transformers.exporters import OnnxExporter

from psoft_export.adapters.adapter import SubspaceAdapter
from psoft_export.adapters.basis_record import BasisRecord
from psoft_export.adapters.kinds import load_adapter
from psoft_export.basis.svd import Basis, Triplets
from psoft_export.changes.shared_subspace import Subspace
from psoft_export.changes.subspace import SubspaceRotation
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.dtypes import TORCH_DTYPES
from psoft_export.checkpoint.output import check_free_space, replacing_file
from psoft_export.checkpoint.reader import file_sha256
from psoft_export.errors import (
    CheckpointError,
    MismatchError,
    OutputError,
    UnsupportedError,
    UsageError,
)
from psoft_export.manifest import FILENAME, source_record
from psoft_export.onnx import adapter_file
from psoft_export.onnx.folder import (
    ADAPTER_SUFFIX,
    LEFT,
    RIGHT,
    ROTATION,
    GraphFolder,
    check_task_name,
    read_folder,
)
from psoft_export.opening import needed_record

_SAME_VALUE = 8  # units roundoff of the graph's dtype, of the largest singular value


@dataclass(frozen=True)
class AddedTask:
    """A task that was added.

    Attributes:
        name: of the task.
        file: its `.onnx_adapter`, in the graph's folder.
        modules: how many modules it rotates.
        nbytes: size of the file.
    """

    name: str
    file: Path
    modules: int
    nbytes: int


def add_task(
    graph: str | Path,
    adapter: str | Path,
    name: str,
    *,
    overwrite: bool = False,
    token: str | None = None,
) -> AddedTask:
    """Add a task to a folder that holds one graph for many tasks, without exporting again.

    The subspaces are taken from the graph, their signs for this adapter from its basis record.
    Neither the base nor an SVD is needed. The graph itself does not change.

    Args:
        graph: folder that `export` wrote with `adapters`.
        adapter: folder or Hub id of a PSOFT adapter of the same base, with a basis record.
        name: of the task.
        overwrite: replace a task of this name.
        token: a Hub token.

    Raises:
        CheckpointError: the folder is not such an export.
        RecordMissingError: the adapter has no basis record.
        MismatchError: it is of another base, of a higher rank, or changes other modules.
        UsageError: the name is taken, or cannot be one.
        UnsupportedError: another kind of graph or adapter.

    Example:
        >>> psoft_export.onnx.add_task("many", "adapter", "law")
    """
    check_task_name(name)
    folder = read_folder(Path(graph))
    if "subspaces" not in folder.manifest:
        raise UnsupportedError(
            f"{folder.path}: holds one merged model, with nothing to switch; export with "
            "--adapter NAME=FOLDER"
        )
    if folder.mixed_batch:
        raise UnsupportedError(
            f"{folder.path}: is a --mixed-batch graph, whose tasks are within; export it again "
            "with all tasks"
        )
    if name in folder.tasks and not overwrite:
        raise UsageError(f"task '{name}': is in the graph already; pass --overwrite to replace it")
    loaded = load_adapter(adapter, token=token)
    if not isinstance(loaded, SubspaceAdapter) or loaded.saved:
        raise UnsupportedError(
            f"{loaded.source.name}: is not an adapter that rotates principal subspaces alone; "
            "merge it, and export the merged folder"
        )
    record = needed_record(loaded) if loaded.needs_record else None
    code = str(folder.manifest["dtype"])
    subspaces = _subspaces(folder)
    rotations = {
        f"{path}.{ROTATION}": torch.zeros(s.rank, s.rank, dtype=TORCH_DTYPES[code])
        for path, s in subspaces.items()
    }
    outside = 0.0
    for module in loaded.modules:
        where = f"task '{name}', module '{module}'"
        path = _path(module, subspaces, where)
        subspace = subspaces[path]
        if loaded.rank > subspace.rank:
            raise MismatchError(
                f"{where}: has rank {loaded.rank}, the graph's subspace {subspace.rank}; export "
                "again with this adapter among the tasks"
            )
        basis = loaded.bases.get(module)
        if basis is None:
            assert record is not None
            _check_base(record, module, folder.manifest["subspaces"][path], where)
            basis = _basis(record, module, subspace, loaded, code)
        change = loaded.change(module, basis)
        assert isinstance(change, SubspaceRotation)
        core, left_out = subspace.core(change, where)
        outside = max(outside, left_out)
        rotations[f"{path}.{ROTATION}"] = core.T.to(TORCH_DTYPES[code]).contiguous()
    signs = "record" if record is not None else "own A and B"
    if record is not None and record.recovered is not None:
        signs += f" ({record.recovered.words})"
    stated = {
        "adapter": source_record(loaded.source, loaded.sha256),
        "method": loaded.method,
        "basis": f"the graph's, with the signs of the adapter's {signs}",
        "outside": outside,
    }
    return _write(folder, name, rotations, stated, len(loaded.modules))


def _write(
    folder: GraphFolder,
    name: str,
    rotations: Mapping[str, Tensor],
    stated: Mapping[str, Any],
    modules: int,
) -> AddedTask:
    """The task's file, then the manifest that names it: cut short, no task is half there."""
    file = folder.path / f"{name}{ADAPTER_SUFFIX}"
    check_free_space(folder.path, sum(t.nbytes for t in rotations.values()) + 2**20)
    with replacing_file(file) as scratch:
        adapter_file.write(scratch, rotations)
    manifest = dict(folder.manifest)
    manifest["tasks"] = {
        **manifest["tasks"],
        name: {**stated, "file": file.name},
    }
    files = {**manifest.get("files", {}), file.name: file_sha256(file, OutputError)}
    manifest["files"] = dict(sorted(files.items()))
    with replacing_file(folder.path / FILENAME) as scratch:
        companions.write_json(scratch, manifest)
    return AddedTask(name, file, modules, file.stat().st_size)


def _subspaces(folder: GraphFolder) -> dict[str, Subspace]:
    """The subspaces that the graph multiplies with, by module path.

    Raises:
        CheckpointError: the graph cannot be read, or lacks one.
    """
    file, _ = folder.components["model"]
    path = folder.path / file
    found: dict[str, Subspace] = {}
    try:
        initializers = OnnxExporter.load_program(path).graph.initializers
        for module in folder.manifest["subspaces"]:
            right, left = (_values(initializers[f"{module}.{end}"]) for end in (RIGHT, LEFT))
            found[module] = Subspace(left.T.contiguous(), right.T.contiguous())
    except (KeyError, OSError, ValueError, AttributeError) as cause:
        raise CheckpointError(
            f"{path}: not the graph that {FILENAME} beside it speaks of; export again"
        ) from cause
    return found


def _values(value: onnx_ir.Value) -> Tensor:
    constant = value.const_value
    if constant is None:
        raise ValueError(value.name)
    return torch.from_numpy(constant.numpy().astype("float64"))


def _path(module: str, subspaces: Mapping[str, Subspace], where: str) -> str:
    """The graph's name of a module, also where an adapter's lacks the outer model's prefix."""
    if module in subspaces:
        return module
    ending = [path for path in subspaces if path.endswith(f".{module}")]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise MismatchError(f"{where}: may be any of {', '.join(ending)} of the graph")
    raise MismatchError(
        f"{where}: no task of the graph changes it, so the graph has no subspace for it; export "
        "again with this adapter among the tasks"
    )


def _check_base(record: BasisRecord, module: str, expected: Mapping[str, Any], where: str) -> None:
    """Check that the record is of the weight that the graph has.

    Where the graph's records hashed it in another dtype, or not at all, singular values tell.
    """
    base = record.base[module]
    if expected["sha256"].get(base.dtype, base.sha256) != base.sha256:
        raise MismatchError(f"{where}: was recorded with another base than the graph's")
    if list(record.base[module].shape) != list(expected["shape"]):
        raise MismatchError(
            f"{where}: is of a weight {list(record.base[module].shape)}, the "
            f"graph's is {list(expected['shape'])}"
        )


def _basis(
    record: BasisRecord, module: str, subspace: Subspace, adapter: SubspaceAdapter, code: str
) -> Basis:
    """The adapter's basis: its record's, or the graph's vectors with the record's signs."""
    if record.kind == "full":
        return record.basis(module)
    left, right = subspace.left, subspace.right
    lengths = left.norm(dim=0), right.norm(dim=1)
    values = lengths[0] * lengths[1]
    rank = adapter.rank
    recorded = record.signs(module).values.double()
    error = float((values[:rank] - recorded).abs().max())
    if error > _SAME_VALUE * torch.finfo(TORCH_DTYPES[code]).eps * float(recorded[0]):
        raise MismatchError(
            f"module '{module}': its recorded singular values differ by {error:.3g} from those of "
            "the graph; it was recorded with another base"
        )
    triplets = Triplets(
        (left / lengths[0])[:, :rank].float(),
        recorded.float(),
        (right / lengths[1][:, None])[:rank].float(),
    )
    basis, _ = record.restored(module, triplets, adapter.basis_options)
    return basis
