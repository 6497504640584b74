"""Checkpoints of the PSOFT paper's own code (`fei407/PSOFT`), and of its first version, MOFT.

PEFT's LoRA format with `lora_orth` between `lora_A` and `lora_B`, which hold the basis. What is
stored of the rotation are the entries of a skew-symmetric K below the diagonal, row by row; the
rotation is (I − K)(I + K)⁻¹, so K = −Q, and Qᵢⱼ above the diagonal is the stored Kⱼᵢ.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from psoft_export.adapters.adapter import Adapter, Reading, SubspaceAdapter
from psoft_export.adapters.files import AdapterFiles, adapter_name, sort_tensors
from psoft_export.algebra.parameters import CayleyNeumann, RotationParameters
from psoft_export.algebra.rotation import generator_size
from psoft_export.basis.svd import Basis, BasisOptions
from psoft_export.errors import AdapterError, UnsupportedError

DEFAULT_TERMS = 5
_NAMED = re.compile(r"\.lora_(?:A|B|orth)\.([^.]+)\.[^.]+$")
_NAMES = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_orth.a_params": "params",
    "lora_orth.mag_vector_a": "vector_a",
    "lora_orth.mag_vector_b": "vector_b",
    "lora_orth.indices_lower": "indices",
}
_ASSUMED = (
    "the checkpoint does not say how many terms its Cayley–Neumann series had: taken are the "
    f"{DEFAULT_TERMS} of the paper's code; --neumann-terms says otherwise"
)
_PER_MODULE = ("rank_pattern", "alpha_pattern")


def read(files: AdapterFiles, reading: Reading) -> Adapter:
    """The adapter in these files.

    Raises:
        AdapterError: a field or tensor cannot be used.
        UnsupportedError: an option that the paper's code does not have.
    """
    rank = files.rank(8)
    alpha = files.positive("lora_alpha", 8)
    for name in _PER_MODULE:
        if files.config.get(name):
            raise UnsupportedError(
                f"{files.config_path}: field '{name}' is set; the paper's code knows one rank and "
                "one alpha"
            )
    scaling = alpha / (rank**0.5 if files.field("use_rslora", False, bool) else rank)
    parts, saved = _sort_tensors(files)
    series, terms = _series(reading)
    rotations = {m: _rotation(m, p, rank, series, files) for m, p in parts.items()}
    first = next(iter(rotations.values()))
    for module, parameters in rotations.items():
        if _form(parameters) != _form(first):
            raise AdapterError(
                f"{files.weights}: '{module}' has other tensors in lora_orth than the first module"
            )
    options = {
        "r": rank,
        "lora_alpha": alpha,
        "orth": first.orthogonal,
        "mag_a": first.vector_a is not None,
        "mag_b": first.vector_b is not None,
    }
    if first.orthogonal:
        options["neumann_terms"] = terms
    assumed = first.orthogonal and reading.neumann_terms is None
    return SubspaceAdapter(
        source=files.source,
        weights_file=files.weights.name,
        config=files.config,
        saved=saved,
        sha256=files.sha256,
        warnings=(_ASSUMED,) if assumed else (),
        basis_options=BasisOptions(rank, scaling),
        rotations=rotations,
        alpha=scaling * rank,
        method_options=options,
        bases={module: _basis(module, p, rank, files) for module, p in parts.items()},
        basis_dtype=files.tensors[next(iter(parts.values()))["A"]].dtype,
        format_name="checkpoint of the paper's code",
    )


def _series(reading: Reading) -> tuple[CayleyNeumann | None, int | str]:
    terms = DEFAULT_TERMS if reading.neumann_terms is None else reading.neumann_terms
    if isinstance(terms, str):
        return None, terms
    return CayleyNeumann(terms, convention="paper"), terms


def _form(parameters: RotationParameters) -> tuple[bool, bool, bool]:
    has_a, has_b = parameters.vector_a is not None, parameters.vector_b is not None
    return parameters.orthogonal, has_a, has_b


def _sort_tensors(files: AdapterFiles) -> tuple[dict[str, dict[str, str]], dict[str, Tensor]]:
    """Module → part → name in the file, and the tensors of `modules_to_save`."""
    named = adapter_name(files, _NAMED)

    def part_of(rest: str) -> str | None:
        owner, _, parameter = rest.partition(".")
        return _NAMES.get(f"lora_{owner}.{parameter.removeprefix(f'{named}.')}")

    parts, saved = sort_tensors(files, ".lora_", part_of, "the format of the paper's code", named)
    for module, found in parts.items():
        for name, part in (("lora_A", "A"), ("lora_B", "B"), ("lora_orth.a_params", "params")):
            if part not in found:
                raise AdapterError(
                    f"{files.weights}: '{module}' has no '{name}'; every module of a checkpoint of "
                    "the paper's code has lora_A, lora_B and lora_orth"
                )
    return parts, saved


def _rotation(
    module: str,
    parts: Mapping[str, str],
    rank: int,
    series: CayleyNeumann | None,
    files: AdapterFiles,
) -> RotationParameters:
    stored = files.tensors[parts["params"]]
    orthogonal = stored.ndim == 1
    size = (generator_size(rank),) if orthogonal else (rank, rank)
    stored = files.check_tensor(parts["params"], size, f"rank {rank}")
    vectors = {
        name: files.check_tensor(parts[name], (rank,), f"rank {rank}") if name in parts else None
        for name in ("vector_a", "vector_b")
    }
    if "indices" in parts and not (orthogonal and _is_lower(files.tensors[parts["indices"]], rank)):
        raise AdapterError(
            f"{files.weights}: tensor '{parts['indices']}' is not the order of the entries below "
            f"the diagonal that the paper's code stores (torch.tril_indices({rank}, {rank}, -1))"
        )
    weight = _above_diagonal(stored, rank) if orthogonal else stored
    return RotationParameters(
        rank, weight, vectors["vector_a"], vectors["vector_b"], orthogonal, series
    )


def _is_lower(indices: Tensor, rank: int) -> bool:
    return torch.equal(indices.long(), torch.tril_indices(rank, rank, -1))


def _above_diagonal(entries: Tensor, rank: int) -> Tensor:
    """Kⱼᵢ for j > i, from the order of `tril_indices` to that of `triu_indices` for (i, j)."""
    matrix = torch.zeros(rank, rank, dtype=entries.dtype)
    lower, upper = torch.tril_indices(rank, rank, -1), torch.triu_indices(rank, rank, 1)
    matrix[lower[0], lower[1]] = entries
    return matrix.T[upper[0], upper[1]]


def _basis(module: str, parts: Mapping[str, str], rank: int, files: AdapterFiles) -> Basis:
    a, b = files.tensors[parts["A"]], files.tensors[parts["B"]]
    a = files.check_tensor(parts["A"], (rank, a.shape[-1] if a.ndim else 0), f"rank {rank}")
    b = files.check_tensor(parts["B"], (b.shape[0] if b.ndim else 0, rank), f"rank {rank}")
    return Basis(a.float(), b.float())
