"""An adapter at a glance: its method, its size, and how far each layer turns."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from psoft_export.adapters.adapter import Adapter, ModuleFacts, NeumannTerms
from psoft_export.adapters.kinds import load_adapter
from psoft_export.algebra.parameters import GivensForm
from psoft_export.module_paths import layer_number, module_kind
from psoft_export.opening import open_plan
from psoft_export.plan import MergePlan


@dataclass(frozen=True, kw_only=True)
class LayerSummary(ModuleFacts):
    """One module of an adapter, and where it belongs.

    Attributes:
        module: module path.
        tensor: the base tensor it applies to, and `shape` its extents; None without a base.
    """

    module: str
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
        method: the method in one line.
        options: the adapter's options that change the result, by the names of its config.
        rank: r, or None where the method has none.
        parameters: number of trained numbers, saved modules apart.
        saved: tensors of `modules_to_save`, name → shape.
        layers: one entry a module, in the order of the file.
        record: the basis record's kind and origin in one line, or None without one.
        needs_record: whether nothing but a record could say which basis is meant.
        warnings: what the user should know, one plain sentence each.
        base: the base's name, and `model_class` the class matched; None without a base.
    """

    name: str
    method: str
    options: Mapping[str, Any]
    rank: int | None
    parameters: int
    saved: Mapping[str, tuple[int, ...]]
    layers: tuple[LayerSummary, ...]
    record: str | None = None
    needs_record: bool = True
    warnings: tuple[str, ...] = ()
    base: str | None = None
    model_class: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The summary as one JSON-ready object."""
        return asdict(self)


def inspect(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    neumann_terms: NeumannTerms | None = None,
    givens: GivensForm | None = None,
    token: str | None = None,
) -> AdapterSummary:
    """Summarise an adapter, and match it to a base when one is given. Reads no base weights.

    Args:
        adapter: folder or Hub id (`owner/name[@revision]`).
        base: folder or Hub id of the base; its tensors are checked to fit.
        neumann_terms: as of `load_adapter`.
        givens: as of `load_adapter`.
        token: a Hub token; by default the one that `hf auth login` stored.

    Raises:
        PsoftExportError: a subclass that says what is wrong; see `docs/exit-codes.md`.
    """
    if base is None:
        loaded = load_adapter(adapter, neumann_terms=neumann_terms, givens=givens, token=token)
        return _summarise(loaded, None)
    plan = open_plan(base, adapter, neumann_terms=neumann_terms, givens=givens, token=token)
    return _summarise(plan.adapter, plan)


def _summarise(adapter: Adapter, plan: MergePlan | None) -> AdapterSummary:
    targets = {t.module: t for t in plan.targets} if plan else {}
    layers = []
    for module in adapter.modules:
        facts, target = adapter.describe(module), targets.get(module)
        layers.append(
            LayerSummary(
                **vars(facts),
                module=module,
                tensor=target.spec.name if target else None,
                shape=target.weight_shape if target else None,
            )
        )
    record = adapter.record
    return AdapterSummary(
        name=adapter.source.name,
        method=adapter.method,
        options=adapter.options,
        rank=adapter.rank,
        parameters=adapter.parameter_count,
        saved={name: tuple(tensor.shape) for name, tensor in adapter.saved.items()},
        layers=tuple(layers),
        record=record.summary if record else None,
        needs_record=adapter.needs_record,
        warnings=adapter.warnings,
        base=plan.base.name if plan else None,
        model_class=plan.layout.class_name if plan else None,
    )
