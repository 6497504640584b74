"""The folder of an export: which files it has, and what `psoft_export.json` says of them."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psoft_export.changes.shared_subspace import LARGEST_OUTSIDE
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.source import member
from psoft_export.errors import CheckpointError, MismatchError, UsageError
from psoft_export.manifest import FILENAME

if TYPE_CHECKING:
    from transformers.exporters import ExportMetadata

FORMAT = "psoft-export-onnx"
FORMAT_VERSION = 1
COMPONENTS = "export.json"  # of transformers: each graph's file, and what its exporter recorded
DTYPES = ("F32", "F16", "BF16")
QUANTIZATIONS = ("int8, dynamic", "int8, static")
TASK_IDS = "task_ids"
ADAPTER_SUFFIX = ".onnx_adapter"
ROTATION = "rotation"  # of one task, (R − I)ᵀ; the parameter's name in its module
ROTATIONS = "rotations"  # of all tasks, stacked; row 0 is the base
LEFT = "subspace_left"
RIGHT = "subspace_right"
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class GraphFolder:
    """An exported folder.

    Attributes:
        path: where it is.
        manifest: its `psoft_export.json`.
        components: name → file of the graph, and what its exporter recorded.
    """

    path: Path
    manifest: Mapping[str, Any]
    components: Mapping[str, tuple[str, "ExportMetadata"]]

    @property
    def tasks(self) -> Mapping[str, str]:
        """Name of each task → its `.onnx_adapter`; of a mixed-batch graph all in the graph."""
        return {name: str(task["file"]) for name, task in self.manifest["tasks"].items()}

    @property
    def outside(self) -> Mapping[str, float]:
        """Task → the share of its ΔW that the graph leaves out, as stated."""
        return {name: float(task["outside"]) for name, task in self.manifest["tasks"].items()}

    def task_of(self, sha256: Mapping[str, str]) -> tuple[str | None, list[str]]:
        """The task that an adapter is here (None: the graph is one merged model).

        Args:
            sha256: of each file of the adapter, by name.

        Returns:
            The task, and in words what says that the graph was made from another adapter.

        Raises:
            MismatchError: the graph has several tasks, and the adapter is none of them.
        """
        if not self.manifest["tasks"]:
            stated = self.manifest.get("adapter", {}).get("sha256", {})
            if any(stated.get(name, known) != known for name, known in sha256.items()):
                return None, [f"{FILENAME}: the export was made from another adapter"]
            return None, []
        for name, task in self.manifest["tasks"].items():
            stated = task["adapter"]["sha256"]
            if all(stated.get(file) == known for file, known in sha256.items()):
                return name, []
        raise MismatchError(
            f"{self.path}: the adapter is none of its tasks ({', '.join(self.tasks)}); add it "
            "with 'psoft-export onnx-adapter'"
        )

    @property
    def mixed_batch(self) -> bool:
        """Whether each row of a batch has its own task."""
        return bool(self.manifest["mixed_batch"])

    @property
    def model_class(self) -> str:
        """The model class that the graph is of."""
        return str(self.manifest["model_class"])

    @property
    def dtype(self) -> str:
        """Dtype code of the graph."""
        return str(self.manifest["dtype"])

    @property
    def quantization(self) -> str | None:
        """How its weights are quantized, or None."""
        found: str | None = self.manifest.get("quantization")
        return found

    @property
    def files(self) -> Mapping[str, str]:
        """Name → SHA-256 of each graph, its weights and the tasks."""
        return dict(self.manifest["files"])

    @property
    def generates(self) -> bool:
        """Whether the task is one that generates tokens."""
        return str(self.manifest["task"]) in ("text-generation", "text2text-generation")


def is_graph_folder(folder: Path) -> bool:
    """Whether a folder says that it is an ONNX export."""
    return (folder / COMPONENTS).is_file()


def graph_files(names: Iterable[str]) -> list[str]:
    """Of a Hub repository's file names, those of an export."""
    names = [name for name in names if "/" not in name]
    ends = (".onnx", ".onnx.data", ADAPTER_SUFFIX)
    graphs = [name for name in names if name.endswith(ends)]
    return [companions.CONFIG, FILENAME, COMPONENTS, *graphs, *companions.companion_names(names)]


def read_folder(path: Path) -> GraphFolder:
    """An exported folder's manifests; reads no graph.

    Raises:
        CheckpointError: it is not such a folder, of another version, or names files outside.
    """
    from transformers.exporters import ExportMetadata  # loads transformers

    manifest = _read(path / FILENAME)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / FILENAME}: is not that of an ONNX export")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / FILENAME}: version {manifest.get('format_version')!r} of the format; this "
            f"release reads version {FORMAT_VERSION}; export again, or use a release that knows it"
        )
    exported = _read(path / COMPONENTS)
    try:
        components = {
            str(name): (
                _inside(path, entry["file"], COMPONENTS),
                ExportMetadata.from_dict(entry["metadata"]),
            )
            for name, entry in exported["components"].items()
        }
        manifest.setdefault("files", {})  # which are hashed last
        _check_fields(manifest)
        tasks = [task["file"] for task in manifest["tasks"].values()]
        for name in (*manifest["files"], *filter(None, tasks)):
            _inside(path, name, FILENAME)
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise CheckpointError(f"{path}: its manifests are not those of an ONNX export") from cause
    if not components:
        raise CheckpointError(f"{path / COMPONENTS}: names no graph")
    return GraphFolder(path, manifest, components)


def check_task_name(name: str) -> None:
    """Check that a task's name can be a file's.

    Raises:
        UsageError: it cannot.
    """
    if not _TASK_NAME.fullmatch(name):
        raise UsageError(
            f"task '{name}': names a file, so it is letters, digits, '.', '-' and '_', at most 100"
        )


def _check_fields(manifest: Mapping[str, Any]) -> None:
    """Check every field of a manifest that is used.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: one is missing, or no such thing.
    """
    sources = [manifest.get("adapter", {"sha256": {}})]
    for task in manifest["tasks"].values():
        sources.append(task["adapter"])
        if not 0 <= float(task["outside"]) <= LARGEST_OUTSIDE:
            raise ValueError(task["outside"])
    expected = (
        (manifest["dtype"], str),
        (manifest["task"], str),
        (manifest["model_class"], str),
        (manifest["mixed_batch"], bool),
        (manifest["files"], dict),
        *((source["sha256"], dict) for source in sources),
    )
    if not all(isinstance(value, kind) for value, kind in expected):
        raise TypeError
    if manifest["dtype"] not in DTYPES:
        raise ValueError(manifest["dtype"])
    if manifest.get("quantization") not in (None, *QUANTIZATIONS):
        raise ValueError(manifest["quantization"])


def _inside(folder: Path, name: Any, origin: str) -> str:
    member(folder, str(name), origin, CheckpointError)
    return str(name)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except FileNotFoundError as cause:
        raise CheckpointError(
            f"{path}: no such file; is this folder one that 'psoft-export onnx' wrote?"
        ) from cause
    except (OSError, ValueError, TypeError) as cause:
        raise CheckpointError(f"{path}: not readable JSON") from cause
