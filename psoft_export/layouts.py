"""Layouts made once and kept on disk, beside the bases.

A layout is a matter of names, shapes and configs alone, but transformers has to be loaded to make
one, which takes seconds. Adapters of one base with the same config and shapes share one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from psoft_export.adapters.adapter import Adapter
from psoft_export.cache_folder import layouts_folder
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.kept_json import KeptJson
from psoft_export.checkpoint.reader import Checkpoint
from psoft_export.checkpoint.safetensors_file import TensorEntry, read_header
from psoft_export.checkpoint.writer import TensorSpec
from psoft_export.errors import CheckpointError
from psoft_export.plan import Layout, OutputOptions, PlannedShard, PlannedTensor

# What decides on a layout besides its input.
_LIBRARIES = ("psoft-export", "transformers", "huggingface_hub", "torch")
_PACKAGE = Path(__file__).parent


class LayoutCache:
    """The layouts in one folder; never stops a run, whatever is wrong with it."""

    def __init__(self, folder: Path) -> None:
        """Use a folder inside `folder`, made when the first layout is kept."""
        self._kept = KeptJson(layouts_folder(folder))

    def get(self, key: str, checkpoint: Checkpoint, adapter: Adapter) -> Layout | None:
        """The layout with this key; None where there is none, or one that is damaged or another's.

        Args:
            key: as of `layout_key`.
            checkpoint: the base, opened.
            adapter: the adapter.
        """
        try:
            layout = _read(self._kept.get(key), checkpoint.entries)
        except (ValueError, KeyError, TypeError):
            return None
        return layout if _is_of(layout, adapter) else None

    def put(self, key: str, layout: Layout) -> None:
        """Keep a layout; the least recently used are forgotten."""
        self._kept.put(key, _fields(layout))


def layout_key(checkpoint: Checkpoint, adapter: Adapter, options: OutputOptions) -> str | None:
    """SHA-256, in hexadecimal, of everything that `planning.make_layout` looks at.

    None where that is more than names and shapes (in a pickle file two names can share memory),
    or cannot be read.
    """
    weights = adapter.source.folder / adapter.weights_file
    if any(file.tensors is not None for file in checkpoint.files) or weights.suffix == ".bin":
        return None
    try:
        stored, _ = read_header(weights)
        config = json.loads((checkpoint.folder / companions.CONFIG).read_bytes())
        if "configuration_files" in config:  # transformers may take one of those in its place
            return None
        decides = {
            "libraries": {name: version(name) for name in _LIBRARIES},
            "code": [path.read_text("utf-8") for path in sorted(_PACKAGE.rglob("*.py"))],
            "config": config,
            "files": [[f.name, f.metadata, _shapes(f.entries)] for f in checkpoint.files],
            "kind": type(adapter).__name__,
            "adapter": [dict(adapter.config), _shapes(stored)],
            "warnings": adapter.warnings,
            "options": asdict(options),
        }
        return _digest(decides)
    except (OSError, ValueError, TypeError, CheckpointError, PackageNotFoundError):
        return None


def _is_of(layout: Layout, adapter: Adapter) -> bool:
    """Whether a layout merges this adapter, whole, into files of the output folder itself."""
    tensors = [tensor for shard in layout.shards for tensor in shard.tensors]
    modules = sorted(tensor.module for tensor in tensors if tensor.module is not None)
    return (
        modules == sorted(adapter.modules)
        and all(_has_origin(tensor, adapter) for tensor in tensors)
        and all(Path(shard.filename).name == shard.filename for shard in layout.shards)
    )


def _has_origin(tensor: PlannedTensor, adapter: Adapter) -> bool:
    """Whether a tensor is one of the base's, or the adapter's, in its shape."""
    if tensor.saved is not None:
        saved = adapter.saved.get(tensor.saved)
        return saved is not None and tensor.spec.shape == tuple(saved.shape)
    return tensor.entry is not None and tensor.spec.shape == tensor.entry.shape


def _shapes(entries: Iterable[TensorEntry]) -> list[Any]:
    return [[entry.name, entry.dtype, entry.shape] for entry in entries]


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _fields(layout: Layout) -> dict[str, Any]:
    return {
        "shards": [
            [shard.filename, dict(shard.metadata), [_tensor_fields(t) for t in shard.tensors]]
            for shard in layout.shards
        ],
        "class_name": layout.class_name,
        "config_changes": dict(layout.config_changes),
        "warnings": list(layout.warnings),
    }


def _tensor_fields(tensor: PlannedTensor) -> list[Any]:
    spec, entry = tensor.spec, tensor.entry
    origin = [entry.name if entry is not None else None, tensor.module, tensor.saved]
    return [
        [spec.name, spec.dtype, list(spec.shape)],
        origin,
        [tensor.is_parameter, tensor.transposed],
    ]


def _read(fields: Any, entries: Mapping[str, TensorEntry]) -> Layout:
    shards = []
    for filename, metadata, listed in fields["shards"]:
        tensors = []
        for (name, dtype, shape), (stored, module, saved), (parameter, transposed) in listed:
            spec = TensorSpec(name, dtype, tuple(shape))
            entry = entries[stored] if stored is not None else None
            tensors.append(PlannedTensor(spec, entry, module, saved, parameter, transposed))
        shards.append(PlannedShard(filename, tuple(tensors), metadata))
    return Layout(
        tuple(shards), fields["class_name"], fields["config_changes"], tuple(fields["warnings"])
    )
