"""Damaging and rewriting checkpoint files, for tests of what happens then."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from psoft_export.adapters.basis_record import FILENAME

INDEX = "model.safetensors.index.json"


def copy_of(folder: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, target))


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(
    path: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> None:
    """Rewrite a safetensors file."""
    save_file(dict(change(load_file(path))), path, {"format": "pt"})


def edit_keeping_metadata(path: Path, **tensors: torch.Tensor) -> None:
    """Replace tensors of a safetensors file, whose metadata stays."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path) | tensors, path, metadata)


def edit_record(
    adapter: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]
) -> None:
    """Rewrite an adapter's basis record with other tensors or metadata."""
    path = adapter / FILENAME
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def truncate(path: Path) -> None:
    """Cut the last byte off."""
    path.write_bytes(path.read_bytes()[:-1])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def card_metadata(card: str | bytes) -> dict[str, Any]:
    """The metadata of a model card, as huggingface_hub reads it."""
    text = card if isinstance(card, str) else card.decode()
    found: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    return found


def as_pickle(base: Path, shards: int = 1) -> None:
    """Replace a checkpoint's safetensors by PyTorch files, as older libraries wrote them."""
    path = base / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    if shards == 1:
        torch.save(tensors, base / "pytorch_model.bin")
        return
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = names[number::shards]
        torch.save({name: tensors[name] for name in part}, base / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def as_shards(base: Path, shards: int) -> None:
    """Split a checkpoint's safetensors file into several with an index."""
    path = base / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
