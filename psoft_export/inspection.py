"""An adapter at a glance: its method, its size, and how far each layer turns."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from psoft_export.adapters.psoft import Adapter, load_adapter
from psoft_export.algebra.rotation import (
    core_rotation,
    orthogonality_error,
    rotation_angles,
    vector_deviation,
)
from psoft_export.merging import plan_merge
from psoft_export.module_paths import layer_number, module_kind
from psoft_export.plan import MergePlan


@dataclass(frozen=True)
class LayerSummary:
    """One module of an adapter.

    Attributes:
        module: module path.
        rank: r.
        angles: its r rotation angles in degrees, descending; each plane counts twice.
        orthogonality_error: ‖CᵀC − I‖_F of the rotation before its scaling vectors.
        vector_a: max |vector_a − 1|, 0 where the adapter has none.
        vector_b: max |vector_b − 1|, 0 where the adapter has none.
        tensor: the base tensor it applies to, and `shape` its extents; None without a base.
    """

    module: str
    rank: int
    angles: tuple[float, ...]
    orthogonality_error: float
    vector_a: float
    vector_b: float
    tensor: str | None = None
    shape: tuple[int, ...] | None = None

    @property
    def layer(self) -> int | None:
        """The layer number in the module path (its first number), or None."""
        return layer_number(self.module)

    @property
    def kind(self) -> str:
        """The module's own name (`q_proj`), the same in every layer."""
        return module_kind(self.module)


@dataclass(frozen=True)
class AdapterSummary:
    """What `inspect` found.

    Attributes:
        name: the folder's name, or the Hub id.
        method: one line: strict or relaxed, Cayley transform or series, or free.
        options: the adapter's options that change the result, by PEFT's field names.
        rank: r.
        parameters: number of trained numbers in the rotations.
        saved: tensors of `modules_to_save`, name → shape.
        layers: one entry a module, in the order of the file.
        record: the basis record's kind and origin in one line, or None without one.
        base: the base's name, and `model_class` the class matched; None without a base.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    rank: int
    parameters: int
    saved: Mapping[str, tuple[int, ...]]
    layers: tuple[LayerSummary, ...]
    record: str | None = None
    base: str | None = None
    model_class: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The summary as one JSON-ready object."""
        return asdict(self)


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


def inspect(
    adapter: str | Path, *, base: str | Path | None = None, token: str | None = None
) -> AdapterSummary:
    """Summarise an adapter, and match it to a base when one is given. Reads no base weights.

    Args:
        adapter: folder or Hub id (`owner/name[@revision]`).
        base: folder or Hub id of the base; its tensors are checked to fit.
        token: a Hub token; by default the one that `hf auth login` stored.

    Raises:
        PsoftExportError: a subclass that says what is wrong; see `docs/exit-codes.md`.
    """
    if base is None:
        return _summarise(load_adapter(adapter, token=token), None)
    plan = plan_merge(base, adapter, token=token)
    return _summarise(plan.adapter, plan)


def _summarise(adapter: Adapter, plan: MergePlan | None) -> AdapterSummary:
    entries = {t.module: t.entry for t in plan.targets} if plan else {}
    layers = []
    for module, parameters in adapter.rotations.items():
        entry = entries.get(module)
        layers.append(
            LayerSummary(
                module=module,
                rank=parameters.rank,
                angles=tuple(math.degrees(a) for a in rotation_angles(parameters).tolist()),
                orthogonality_error=orthogonality_error(core_rotation(parameters)),
                vector_a=vector_deviation(parameters.vector_a),
                vector_b=vector_deviation(parameters.vector_b),
                tensor=entry.name if entry else None,
                shape=entry.shape if entry else None,
            )
        )
    record = adapter.record
    return AdapterSummary(
        name=adapter.source.name,
        method=adapter.method,
        options=_options(adapter.config),
        rank=adapter.basis_options.rank,
        parameters=adapter.parameter_count,
        saved={name: tuple(tensor.shape) for name, tensor in adapter.saved.items()},
        layers=tuple(layers),
        record=record.summary if record else None,
        base=plan.base.name if plan else None,
        model_class=plan.layout.class_name if plan else None,
    )


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = dict(_OPTION_DEFAULTS)
    if config.get("use_cayley_neumann"):
        defaults |= _SERIES_DEFAULTS
    if config.get("psoft_svd") == "lowrank":
        defaults |= _LOWRANK_DEFAULTS
    return {name: config.get(name, default) for name, default in defaults.items()}
