"""PEFT's PSOFT format (`peft_type: "PSOFT"`).

Reads and checks the files without PEFT installed. What the options mean is in `algebra` and
`basis`; which base tensor a module is, in `model`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from psoft_export.adapters.adapter import Adapter, Reading, SubspaceAdapter
from psoft_export.adapters.basis_record import check_fits, read_record
from psoft_export.adapters.files import (
    CONFIG,
    PREFIX,
    AdapterFiles,
    is_positive,
    listed_targets,
    saved_tensors,
    sort_tensors,
)
from psoft_export.algebra.parameters import CayleyNeumann, RotationParameters
from psoft_export.algebra.rotation import core_rotation, generator_size, peft_terms
from psoft_export.basis.svd import BasisOptions
from psoft_export.errors import AdapterError

MARKER = ".psoft_R."
_PARAMETERS = ("weight", "vector_a", "vector_b")
_OPTION_DEFAULTS = {
    "r": 32,
    "psoft_alpha": 32,
    "ab_svd_init": "psoft_init",
    "psoft_svd": "full",
    "psoft_orth": True,
    "psoft_mag_a": True,
    "psoft_mag_b": True,
    "use_cayley_neumann": False,
}
_SERIES_DEFAULTS = {"num_cayley_neumann_terms": 5, "cayley_neumann_eps": None}
_LOWRANK_DEFAULTS = {"psoft_svd_lowrank_niter": 10, "random_seed": 0}
_UNSEEDED = (
    "the adapter's config has no 'random_seed': PEFT versions before that field drew its "
    "low-rank basis at random, and the seed 0 used here need not be the basis it trained with"
)


@dataclass(frozen=True)
class _Options:
    """The fields of the config that change the result, checked."""

    basis: BasisOptions
    alpha: float
    orthogonal: bool
    vector_a: bool
    vector_b: bool
    series: CayleyNeumann | None


def read(files: AdapterFiles, _: Reading) -> Adapter:
    """The adapter in these files.

    Raises:
        AdapterError: a field or tensor cannot be used.
        RecordError: its basis record is damaged, or belongs to another adapter.
    """
    options = _parse_options(files)
    parts, saved = sort_tensors(
        files, MARKER, lambda rest: rest if rest in _PARAMETERS else None, "the PSOFT format"
    )
    rotations = {
        module: _rotation_parameters(module, stored, options, files)
        for module, stored in parts.items()
    }
    record = read_record(files.source.folder)
    if record is not None:
        check_fits(record, rotations, options.basis)
    unseeded = options.basis.solver == "lowrank" and "random_seed" not in files.config
    return SubspaceAdapter(
        source=files.source,
        weights_file=files.weights.name,
        config=files.config,
        saved=saved,
        sha256=files.sha256,
        record=record,
        warnings=(_UNSEEDED,) if unseeded and record is None else (),
        basis_options=options.basis,
        rotations=rotations,
        alpha=options.alpha,
        method_options=_method_options(files.config),
    )


def tensor_name(module: str, parameter: str) -> str:
    """The name of a rotation's parameter (`weight`, `vector_a`, `vector_b`) in the file."""
    return f"{PREFIX}{module}{MARKER}{parameter}"


def as_psoft(adapter: SubspaceAdapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an adapter of another format in this one.

    A series that PEFT does not have becomes a free R, rounded to float32.
    """
    options, first = adapter.basis_options, next(iter(adapter.rotations.values()))
    terms = peft_terms(first.series) if first.series is not None else None
    free = not first.orthogonal or (first.series is not None and terms is None)
    tensors = saved_tensors(adapter.saved, adapter.modules)
    for module, parameters in adapter.rotations.items():
        weight = core_rotation(parameters).float() if free else parameters.weight
        parts = {
            "weight": weight,
            "vector_a": parameters.vector_a,
            "vector_b": parameters.vector_b,
        }
        tensors |= {
            tensor_name(module, n): t.contiguous() for n, t in parts.items() if t is not None
        }
    carried = ("task_type", "auto_mapping", "base_model_name_or_path", "revision")
    config = {
        "peft_type": "PSOFT",
        **{name: adapter.config.get(name) for name in carried},
        "inference_mode": True,
        "r": options.rank,
        "psoft_alpha": adapter.alpha,
        "target_modules": listed_targets(adapter.config, adapter.modules),
        "modules_to_save": adapter.config.get("modules_to_save"),
        "ab_svd_init": options.initialisation,
        "psoft_svd": options.solver,
        "psoft_orth": not free,
        "psoft_mag_a": first.vector_a is not None,
        "psoft_mag_b": first.vector_b is not None,
        "use_cayley_neumann": terms is not None,
    }
    return config | ({"num_cayley_neumann_terms": terms} if terms is not None else {}), tensors


def _parse_options(files: AdapterFiles) -> _Options:
    """The options with PEFT's defaults for absent fields (PEFT 0.21, `psoft/config.py`)."""
    rank = files.rank(_OPTION_DEFAULTS["r"])  # type: ignore[arg-type]
    alpha = files.positive("psoft_alpha", 32)
    basis = BasisOptions(
        rank=rank,
        scaling=alpha / rank,
        solver=files.field("psoft_svd", "full", ("full", "lowrank")),
        initialisation=files.field("ab_svd_init", "psoft_init", ("psoft_init", "pissa_init")),
        power_iterations=files.field("psoft_svd_lowrank_niter", 10, int),
        random_seed=files.field("random_seed", 0, int),
    )
    series = None
    if files.field("use_cayley_neumann", False, bool):
        max_norm = files.config.get("cayley_neumann_eps")
        if max_norm is not None and not is_positive(max_norm):
            raise files.bad_field("cayley_neumann_eps", "null or a number above 0")
        series = CayleyNeumann(files.field("num_cayley_neumann_terms", 5, int), max_norm)
    return _Options(
        basis,
        alpha,
        orthogonal=files.field("psoft_orth", True, bool),
        vector_a=files.field("psoft_mag_a", True, bool),
        vector_b=files.field("psoft_mag_b", True, bool),
        series=series,
    )


def _method_options(config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = dict(_OPTION_DEFAULTS)
    if config.get("use_cayley_neumann"):
        defaults |= _SERIES_DEFAULTS
    if config.get("psoft_svd") == "lowrank":
        defaults |= _LOWRANK_DEFAULTS
    return {name: config.get(name, default) for name, default in defaults.items()}


def _rotation_parameters(
    module: str, stored: Mapping[str, str], options: _Options, files: AdapterFiles
) -> RotationParameters:
    rank = options.basis.rank
    size = (generator_size(rank),) if options.orthogonal else (rank, rank)
    expected: dict[str, tuple[int, ...]] = {"weight": size}
    if options.vector_a:
        expected["vector_a"] = (rank,)
    if options.vector_b:
        expected["vector_b"] = (rank,)
    parts = {}
    for name in sorted(expected.keys() | stored.keys()):
        where = f"{files.weights}: tensor '{tensor_name(module, name)}'"
        if name not in stored:
            raise AdapterError(f"{where} is missing, but {CONFIG} says the adapter has it")
        if name not in expected:
            raise AdapterError(f"{where} is there, but {CONFIG} says the adapter has none")
        parts[name] = files.check_tensor(stored[name], expected[name], f"rank {rank}")
    return RotationParameters(
        rank,
        parts["weight"],
        parts.get("vector_a"),
        parts.get("vector_b"),
        options.orthogonal,
        options.series,
    )
