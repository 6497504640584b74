"""PEFT's PSOFT format: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

Reads and checks the files without PEFT installed. What the options mean is in `algebra` and
`basis`; which base tensor a module is, in `model`.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from psoft_export.adapters.basis_record import FILENAME as RECORD
from psoft_export.adapters.basis_record import BasisRecord, check_fits, read_record
from psoft_export.algebra.rotation import CayleyNeumann, RotationParameters, generator_size
from psoft_export.basis.svd import BasisOptions
from psoft_export.checkpoint.hub import is_hub_id
from psoft_export.checkpoint.reader import file_sha256, load_pickle
from psoft_export.checkpoint.safetensors_file import read_header
from psoft_export.checkpoint.source import Source, resolve
from psoft_export.errors import AdapterError, NonFiniteError, UnsupportedError, first_line

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
_NARROWING_FIELDS = ("layers_to_transform", "exclude_modules", "layers_pattern")
_PARAMETERS = ("weight", "vector_a", "vector_b")
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Adapter:
    """A PSOFT adapter as its files state it.

    Attributes:
        source: where it was read from.
        weights_file: name of the file that holds the tensors.
        config: `adapter_config.json`, whole.
        basis_options: what the basis depends on.
        rotations: module path → stored parameters of its rotation.
        saved: tensors that replace or join the base's (`modules_to_save`), by model name.
        sha256: SHA-256 of each file read, by name.
        record: its basis record, or None.
    """

    source: Source
    weights_file: str
    config: Mapping[str, Any]
    basis_options: BasisOptions
    rotations: Mapping[str, RotationParameters]
    saved: Mapping[str, Tensor]
    sha256: Mapping[str, str]
    record: BasisRecord | None = None

    @property
    def method(self) -> str:
        """The method in one line: strict or relaxed, Cayley transform or series, or free."""
        parameters = next(iter(self.rotations.values()))
        vectors = [n for n in ("vector_a", "vector_b") if getattr(parameters, n) is not None]
        relaxed = " and ".join(vectors)
        if not parameters.orthogonal:
            return "PSOFT with a free R" + (f", {relaxed}" if vectors else "")
        series = parameters.series
        transform = f"Cayley–Neumann series, {series.terms} terms" if series else "Cayley transform"
        form = f"PSOFT-RO (relaxed: {relaxed})" if vectors else "PSOFT-SO (strict)"
        return f"{form}, {transform}"

    @property
    def parameter_count(self) -> int:
        """Number of trained numbers in the rotations (saved modules not counted)."""
        return sum(
            tensor.numel()
            for rotation in self.rotations.values()
            for tensor in (rotation.weight, rotation.vector_a, rotation.vector_b)
            if tensor is not None
        )


@dataclass(frozen=True)
class _Options:
    """The fields of the config that change the result, checked."""

    basis: BasisOptions
    orthogonal: bool
    vector_a: bool
    vector_b: bool
    series: CayleyNeumann | None


def load_adapter(adapter: str | Path, *, token: str | None = None) -> Adapter:
    """Read a PSOFT adapter that PEFT saved.

    Args:
        adapter: a folder, or a Hub id with an optional `@revision`.
        token: a Hub token; by default the one that `hf auth login` stored.

    Raises:
        AdapterError: a file is missing or malformed.
        UnsupportedError: it is not a PSOFT adapter.
        NonFiniteError: a tensor holds NaN or infinity.
        RecordError: its basis record is damaged, or belongs to another adapter.
        HubError: the repository cannot be had.

    Example:
        >>> adapter = psoft_export.load_adapter("examples/byte_llama/adapters/prose-relaxed-r64")
        >>> adapter.basis_options.rank
        64
    """
    return read_adapter(resolve(adapter, CONFIG, adapter_files, token=token))


def read_adapter(source: Source) -> Adapter:
    """The adapter in a folder; errors as of `load_adapter`."""
    config = _read_config(source.folder / CONFIG)
    options = _parse_options(config, source.folder / CONFIG)
    path = _weights_path(source.folder)
    tensors = _read_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{path}: tensor '{name}' holds NaN or infinity; train again")
    rotations, saved = _sort_tensors(tensors, options, path)
    record = read_record(source.folder)
    if record is not None:
        check_fits(record, rotations, options.basis)
    files = (CONFIG, path.name, *([RECORD] if record else []))
    sha256 = {name: file_sha256(source.folder / name, AdapterError) for name in files}
    return Adapter(source, path.name, config, options.basis, rotations, saved, sha256, record)


def read_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors of an adapter's file, by their names there."""
    return _read_tensors(adapter.source.folder / adapter.weights_file)


def named_base(config: Mapping[str, Any]) -> str | None:
    """What an adapter's config names as its base, if that looks like a Hub id, or None.

    A relative path may look like one too; only the Hub can tell.
    """
    named = config.get("base_model_name_or_path")
    return str(named) if is_hub_id(named) else None


def is_narrowed(adapter: Adapter) -> bool:
    """Whether other fields of the config narrow `target_modules` down."""
    return any(adapter.config.get(name) not in (None, []) for name in _NARROWING_FIELDS)


def tensor_name(module: str, parameter: str) -> str:
    """The name of a rotation's parameter (`weight`, `vector_a`, `vector_b`) in the file."""
    return f"{PREFIX}{module}.psoft_R.{parameter}"


def adapter_files(names: Iterable[str]) -> list[str]:
    """Of a repository's file names, those of an adapter: its own, and its tokenizer's."""
    top = [name for name in names if "/" not in name]
    weights = SAFETENSORS if SAFETENSORS in top else PICKLE
    small = (".json", ".txt", ".model", ".jinja")
    return [n for n in top if n in (CONFIG, weights, RECORD) or n.endswith(small)]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as cause:
        raise AdapterError(f"{path}: no such file; is this folder a PEFT adapter?") from cause
    except (OSError, ValueError) as cause:
        raise AdapterError(f"{path}: not readable JSON ({first_line(cause)})") from cause
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: not a JSON object")
    kind = config.get("peft_type")
    if kind is None:
        raise AdapterError(f"{path}: field 'peft_type' is missing")
    if kind != "PSOFT":
        raise UnsupportedError(f"{path}: peft_type is '{kind}'; this tool takes PSOFT adapters")
    return config


def _parse_options(config: Mapping[str, Any], path: Path) -> _Options:
    """The options with PEFT's defaults for absent fields (PEFT 0.21, `psoft/config.py`)."""

    def take(field: str, default: Any, allowed: type | tuple[Any, ...]) -> Any:
        value = config.get(field, default)
        if isinstance(allowed, tuple):
            valid = value in allowed
            wanted = " or ".join(map(repr, allowed))
        else:
            # bool is an int to Python; to a config it is not.
            valid = isinstance(value, allowed) and (allowed is bool or not isinstance(value, bool))
            wanted = f"a value of type {allowed.__name__}"
        if not valid:
            raise AdapterError(f"{path}: field '{field}' is {value!r}; {wanted} is needed")
        return value

    rank = take("r", 32, int)
    if rank < 1:
        raise AdapterError(f"{path}: field 'r' is {rank}; a rank of at least 1 is needed")
    alpha = config.get("psoft_alpha", 32)
    if not _is_positive(alpha):
        raise AdapterError(f"{path}: field 'psoft_alpha' is {alpha!r}; a number above 0 is needed")
    basis = BasisOptions(
        rank=rank,
        scaling=alpha / rank,
        solver=take("psoft_svd", "full", ("full", "lowrank")),
        initialisation=take("ab_svd_init", "psoft_init", ("psoft_init", "pissa_init")),
        power_iterations=take("psoft_svd_lowrank_niter", 10, int),
        random_seed=take("random_seed", 0, int),
    )
    series = None
    if take("use_cayley_neumann", False, bool):
        max_norm = config.get("cayley_neumann_eps")
        if max_norm is not None and not _is_positive(max_norm):
            raise AdapterError(
                f"{path}: field 'cayley_neumann_eps' is {max_norm!r}; null or a number above 0"
            )
        series = CayleyNeumann(take("num_cayley_neumann_terms", 5, int), max_norm)
    return _Options(
        basis,
        orthogonal=take("psoft_orth", True, bool),
        vector_a=take("psoft_mag_a", True, bool),
        vector_b=take("psoft_mag_b", True, bool),
        series=series,
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _weights_path(folder: Path) -> Path:
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).exists():
            return folder / name
    raise AdapterError(f"{folder}: neither {SAFETENSORS} nor {PICKLE} is there")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.name == PICKLE:
        return load_pickle(path, AdapterError)
    read_header(path, AdapterError)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as cause:
        raise AdapterError(f"{path}: not readable ({first_line(cause)})") from cause


def _sort_tensors(
    tensors: Mapping[str, Tensor], options: _Options, path: Path
) -> tuple[dict[str, RotationParameters], dict[str, Tensor]]:
    """Split the file into rotations by module and the tensors of `modules_to_save`."""
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        if not key.startswith(PREFIX):
            raise AdapterError(f"{path}: tensor '{key}' does not start with '{PREFIX}'")
        name = key.removeprefix(PREFIX)
        module, marker, parameter = name.rpartition(".psoft_R.")
        if not marker:
            # Where PEFT saves a resized embedding, it saves its own wrapper around it as well.
            if ".original_module." not in name:
                saved[name.replace(".modules_to_save.", ".")] = tensor
        elif parameter in _PARAMETERS:
            parts.setdefault(module, {})[parameter] = tensor
        else:
            raise AdapterError(f"{path}: tensor '{key}' is not part of the PSOFT format")
    if not parts:
        raise AdapterError(f"{path}: holds no PSOFT tensor ('….psoft_R.weight')")
    rotations = {
        module: _rotation_parameters(module, stored, options, path)
        for module, stored in parts.items()
    }
    return rotations, saved


def _rotation_parameters(
    module: str, stored: Mapping[str, Tensor], options: _Options, path: Path
) -> RotationParameters:
    rank = options.basis.rank
    size = (generator_size(rank),) if options.orthogonal else (rank, rank)
    expected: dict[str, tuple[int, ...]] = {"weight": size}
    if options.vector_a:
        expected["vector_a"] = (rank,)
    if options.vector_b:
        expected["vector_b"] = (rank,)
    for name in sorted(expected.keys() | stored.keys()):
        where = f"{path}: tensor '{tensor_name(module, name)}'"
        if name not in stored:
            raise AdapterError(f"{where} is missing, but {CONFIG} says the adapter has it")
        if name not in expected:
            raise AdapterError(f"{where} is there, but {CONFIG} says the adapter has none")
        if (shape := tuple(stored[name].shape)) != expected[name]:
            raise AdapterError(
                f"{where} has shape {list(shape)}; rank {rank} needs {list(expected[name])}"
            )
        if stored[name].dtype not in _FLOATING:
            raise AdapterError(f"{where} has dtype {stored[name].dtype}; a float is needed")
    return RotationParameters(
        rank,
        stored["weight"],
        stored.get("vector_a"),
        stored.get("vector_b"),
        options.orthogonal,
        options.series,
    )
