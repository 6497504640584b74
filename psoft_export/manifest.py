"""What a run did, as data: the report it returns and the `psoft_export.json` it writes."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from psoft_export.checkpoint.source import Source

FILENAME = "psoft_export.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModuleReport:
    """What the merge of one module did.

    Attributes:
        module: module path, as the adapter names it.
        tensor: name of the checkpoint tensor.
        shape: out × in.
        rank: r; None where the method has none.
        relative_delta: ‖ΔW‖ / ‖W‖, Frobenius.
        largest_angle: largest rotation angle, in degrees; None where the method has none.
        orthogonality_error: ‖CᵀC − I‖_F of PSOFT's rotation before its scaling vectors, else None.
        basis_uncertainty: what is not known of ΔW relative to ‖ΔW‖, by the gaps of the singular
            values and the precision of training's SVD, unknown signs apart; 0 with a full record,
            None where it cannot be told (low-rank SVD without a record).
        relative_rounding: ‖merged − (W + ΔW)‖ / ‖ΔW‖, Frobenius: what rounding to the output
            dtype cost, each entry being the number nearest to the sum.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    rank: int | None
    relative_delta: float
    largest_angle: float | None
    orthogonality_error: float | None
    basis_uncertainty: float | None
    relative_rounding: float


@dataclass(frozen=True)
class LoraModule:
    """What the conversion of one module to LoRA did.

    Attributes:
        module: module path, as the adapter names it.
        tensor: name of the checkpoint tensor that it changes.
        shape: out × in.
        rank: r of the PSOFT adapter, or the rank asked for of an approximation.
        needed_rank: the fewest columns that keep ΔW within the tolerance of `--reduce-rank`; r
            without one.
        relative_error: ‖lora_B lora_A · scaling − ΔW‖ / ‖ΔW‖, Frobenius, of what was written:
            rounding to its dtype, and what the reduction left out.
        basis_uncertainty: as of `ModuleReport`.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    rank: int
    needed_rank: int
    relative_error: float
    basis_uncertainty: float | None


def source_record(source: Source, sha256: Mapping[str, str]) -> dict[str, Any]:
    """A base or adapter as the manifest names it."""
    return {
        "kind": source.kind,
        "name": source.name,
        "revision": source.commit,
        "sha256": dict(sorted(sha256.items())),
    }


def basis_source(basis: Mapping[str, Any]) -> Literal["recorded", "stored", "svd", "none"]:
    """Whose word says which basis is meant; `basis` as in `psoft_export.json`.

    A record's, the adapter's own file's, nobody's (an SVD was computed), or none is needed.
    """
    if basis["record"] is not None:
        return "recorded"
    if "stored" in basis:
        return "stored"
    return "svd" if basis.get("solver", "") is not None else "none"


def basis_origin(basis: Mapping[str, Any]) -> str:
    """Where bases came from, in words; `basis` as in `psoft_export.json`."""
    source, record = basis_source(basis), basis["record"]
    if source == "none":
        return "none needed"
    if source == "stored":
        return f"held by {basis['stored']}"
    if source == "svd":
        return f"{basis['solver']} SVD in {basis['dtype']} on {basis['device']}; not recorded"
    found = f"; vectors by {basis['solver']}" if record["kind"] == "signs" else ""
    return f"recorded ({record['kind']}; {record['svd']}){found}"


def manifest(
    *,
    base: Mapping[str, Any],
    adapter: Mapping[str, Any],
    class_name: str,
    options: Mapping[str, Any],
    basis: Mapping[str, Any],
    product: Mapping[str, Any],
    files: Mapping[str, str],
    verification: Mapping[str, Any] | None,
    modules: Sequence[ModuleReport | LoraModule],
    warnings: tuple[str, ...],
) -> dict[str, Any]:
    """The content of `psoft_export.json`. Holds no time and no path, so runs compare equal.

    `files` is the SHA-256 of each weight file written, by name; `verification` the summary of
    each level that was checked, None where there is nothing to check against.
    """
    return {
        "format": "psoft-export",
        "format_version": FORMAT_VERSION,
        "tool": {
            "psoft_export": importlib.metadata.version("psoft-export"),
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
        "base": dict(base),
        "adapter": dict(adapter),
        "model_class": class_name,
        "options": dict(options),
        "basis": dict(basis),
        "product": dict(product),
        "files": dict(files),
        "verification": verification,
        "modules": [asdict(module) | {"shape": list(module.shape)} for module in modules],
        "warnings": list(warnings),
    }
