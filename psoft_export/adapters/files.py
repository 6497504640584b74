"""The files of PEFT's adapters: what all kinds have in common."""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from psoft_export.adapters.basis_record import FILENAME as RECORD
from psoft_export.checkpoint.reader import file_sha256, load_pickle
from psoft_export.checkpoint.safetensors_file import read_header, save_tensors
from psoft_export.checkpoint.source import Source
from psoft_export.errors import AdapterError, NonFiniteError, first_line

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
FLOATING = (torch.float32, torch.float16, torch.bfloat16)
_NARROWING_FIELDS = ("layers_to_transform", "exclude_modules", "layers_pattern")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's files, read and not yet understood.

    Attributes:
        source: where they are.
        config: `adapter_config.json`, whole.
        weights: the file of the tensors.
        tensors: all of them, by their names in the file; every number is finite.
        sha256: SHA-256 of each file, by name.
    """

    source: Source
    config: Mapping[str, Any]
    weights: Path
    tensors: Mapping[str, Tensor]
    sha256: Mapping[str, str]

    @property
    def config_path(self) -> Path:
        """The file of the config."""
        return self.source.folder / CONFIG

    def field(self, name: str, default: Any, allowed: type | tuple[Any, ...]) -> Any:
        """A field of the config, or the default where it is absent.

        Raises:
            AdapterError: it is neither of the type `allowed` nor one of the values `allowed`.
        """
        value = self.config.get(name, default)
        if isinstance(allowed, tuple):
            valid = value in allowed
            wanted = " or ".join(map(repr, allowed))
        else:
            # bool is an int to Python; to a config it is not.
            valid = isinstance(value, allowed) and (allowed is bool or not isinstance(value, bool))
            wanted = f"a value of type {allowed.__name__}"
        if not valid:
            raise self.bad_field(name, f"{wanted} is needed")
        return value

    def positive(self, name: str, default: float) -> Any:
        """A field of the config that must be a number above 0, as it stands there."""
        value = self.config.get(name, default)
        if not is_positive(value):
            raise self.bad_field(name, "a number above 0 is needed")
        return value

    def rank(self, default: int) -> int:
        """The field `r`."""
        rank = self.field("r", default, int)
        if rank < 1:
            raise AdapterError(
                f"{self.config_path}: field 'r' is {rank}; a rank of at least 1 is needed"
            )
        return int(rank)

    def bad_field(self, name: str, wanted: str) -> AdapterError:
        """The error of a field that cannot be used."""
        value = self.config.get(name)
        return AdapterError(f"{self.config_path}: field '{name}' is {value!r}; {wanted}")

    def check_tensor(self, key: str, expected: Sequence[int], why: str) -> Tensor:
        """A tensor of the file, of the expected shape and a floating dtype.

        Raises:
            AdapterError: it is not; `why` says what asks for the shape.
        """
        tensor, where = self.tensors[key], f"{self.weights}: tensor '{key}'"
        if (shape := tuple(tensor.shape)) != tuple(expected):
            raise AdapterError(f"{where} has shape {list(shape)}; {why} needs {list(expected)}")
        if tensor.dtype not in FLOATING:
            raise AdapterError(f"{where} has dtype {tensor.dtype}; a float is needed")
        return tensor


def read_config(path: Path) -> dict[str, Any]:
    """`adapter_config.json`.

    Raises:
        AdapterError: it is missing or malformed.
    """
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as cause:
        raise AdapterError(f"{path}: no such file; is this folder a PEFT adapter?") from cause
    except (OSError, ValueError) as cause:
        raise AdapterError(f"{path}: not readable JSON ({first_line(cause)})") from cause
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: not a JSON object")
    if config.get("peft_type") is None:
        raise AdapterError(f"{path}: field 'peft_type' is missing")
    if not isinstance(config["peft_type"], str):
        raise AdapterError(
            f"{path}: field 'peft_type' is {config['peft_type']!r}; a name is needed"
        )
    return config


def read_files(source: Source) -> AdapterFiles:
    """Read an adapter's files.

    Raises:
        AdapterError: one is missing or malformed.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    config = read_config(source.folder / CONFIG)
    path = _weights_path(source.folder)
    tensors = read_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{path}: tensor '{name}' holds NaN or infinity; train again")
    has_record = (source.folder / RECORD).exists()
    names = (CONFIG, path.name, *([RECORD] if has_record else []))
    sha256 = {name: file_sha256(source.folder / name, AdapterError) for name in names}
    return AdapterFiles(source, config, path, tensors, sha256)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of an adapter's weight file, by their names there.

    Raises:
        AdapterError: it is malformed.
    """
    if path.name == PICKLE:
        return load_pickle(path, AdapterError)
    read_header(path, AdapterError)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as cause:
        raise AdapterError(f"{path}: not readable ({first_line(cause)})") from cause


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter's weight file, for everybody whom the umask lets read it."""
    save_tensors(path, tensors, {"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def model_names(files: AdapterFiles) -> dict[str, str]:
    """Name in the file → the same without PEFT's prefix, for every tensor, sorted.

    Raises:
        AdapterError: one does not have it.
    """
    for key in sorted(files.tensors):
        if not key.startswith(PREFIX):
            raise AdapterError(f"{files.weights}: tensor '{key}' does not start with '{PREFIX}'")
    return {key: key.removeprefix(PREFIX) for key in sorted(files.tensors)}


def saved_name(name: str, adapter: str = "") -> str | None:
    """The model's name of a tensor that is none of the method's own; None where it is a copy.

    A tensor of `modules_to_save`, or a bias of a layer that PEFT has wrapped. Where PEFT saves a
    resized embedding, it saves its own wrapper around it as well.

    Args:
        name: without PEFT's prefix.
        adapter: the adapter's name, where the file's keys keep it.
    """
    if ".original_module." in name:
        return None
    if adapter:
        name = name.replace(f".modules_to_save.{adapter}.", ".")
    return name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")


def saved_tensors(saved: Mapping[str, Tensor], modules: Collection[str]) -> dict[str, Tensor]:
    """Tensors that replace the base's, by the names that PEFT looks for when it loads them.

    Args:
        saved: by model name.
        modules: those that the adapter changes; PEFT wraps them, and a bias is inside.
    """
    tensors = {}
    for name, tensor in saved.items():
        module, _, parameter = name.rpartition(".")
        inside = f"{module}.base_layer.{parameter}" if module in modules else name
        tensors[f"{PREFIX}{inside}"] = tensor.contiguous()
    return tensors


def adapter_name(files: AdapterFiles, pattern: re.Pattern[str]) -> str:
    """The adapter's name in the keys of a file that keeps it; empty where it does not.

    Args:
        files: the file.
        pattern: finds it in a key, as its first group.

    Raises:
        AdapterError: there are several.
    """
    names = sorted({found[1] for key in files.tensors if (found := pattern.search(key))})
    if names[1:]:
        raise AdapterError(
            f"{files.weights}: its keys name several adapters ({', '.join(names)}); save each in a "
            "folder of its own"
        )
    return next(iter(names), "")


def sort_tensors(
    files: AdapterFiles,
    marker: str,
    part_of: Callable[[str], str | None],
    what: str,
    adapter: str = "",
) -> tuple[dict[str, dict[str, str]], dict[str, Tensor]]:
    """Module → part → name in the file, and the tensors of `modules_to_save`.

    Args:
        files: the file.
        marker: what stands between a module's path and its part.
        part_of: the part, given what stands behind the marker; None for what is none.
        what: the format, in words.
        adapter: the adapter's name, where the file's keys keep it.

    Raises:
        AdapterError: a tensor is not part of the format, or a part is there twice.
    """
    parts: dict[str, dict[str, str]] = {}
    saved: dict[str, Tensor] = {}
    for key, name in model_names(files).items():
        module, found, rest = name.rpartition(marker)
        if not found:
            if (kept := saved_name(name, adapter)) is not None:
                saved[kept] = files.tensors[key]
            continue
        part = part_of(rest)
        if part is None:
            raise AdapterError(f"{files.weights}: tensor '{key}' is not part of {what}")
        own = parts.setdefault(module, {})
        if part in own:
            raise AdapterError(
                f"{files.weights}: holds '{part}' twice, as '{own[part]}' and '{key}'"
            )
        own[part] = key
    return parts, saved


def listed_targets(config: Mapping[str, Any], modules: Sequence[str]) -> list[str]:
    """The adapter's own list, or every module's path where that says more than a list of names.

    Servers read a list; PEFT would take a pattern or 'all-linear' as well.
    """
    wanted = config.get("target_modules")
    if isinstance(wanted, list) and not is_narrowed(config):
        return sorted(str(name) for name in wanted)
    return list(modules)


def named_base(config: Mapping[str, Any]) -> str | None:
    """What an adapter's config names as its base, if that looks like a Hub id, or None.

    A relative path may look like one too; only the Hub can tell.
    """
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or named.count("/") != 1:
        return None
    from psoft_export.checkpoint.hub import is_hub_id  # loads the Hub's library: 0.3 s

    return named if is_hub_id(named) else None


def is_narrowed(config: Mapping[str, Any]) -> bool:
    """Whether other fields of an adapter's config narrow `target_modules` down."""
    return any(config.get(name) not in (None, []) for name in _NARROWING_FIELDS)


def adapter_files(names: Iterable[str]) -> list[str]:
    """Of a repository's file names, those of an adapter: its own, and its tokenizer's."""
    top = [name for name in names if "/" not in name]
    weights = SAFETENSORS if SAFETENSORS in top else PICKLE
    small = (".json", ".txt", ".model", ".jinja")
    return [n for n in top if n in (CONFIG, weights, RECORD) or n.endswith(small)]


def is_positive(value: Any) -> bool:
    """Whether a field is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _weights_path(folder: Path) -> Path:
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).exists():
            return folder / name
    raise AdapterError(f"{folder}: neither {SAFETENSORS} nor {PICKLE} is there")
