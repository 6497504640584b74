"""Opening base and adapter: from two references to the plan of a merge; no weight is read."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from psoft_export.adapters import basis_record
from psoft_export.adapters.adapter import Adapter, NeumannTerms, Reading
from psoft_export.adapters.basis_record import BasisRecord
from psoft_export.adapters.combination_file import read_combination
from psoft_export.adapters.kinds import load_adapter, read_adapter
from psoft_export.algebra.parameters import GivensForm
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.dtypes import parse_dtype
from psoft_export.checkpoint.names import weight_files
from psoft_export.checkpoint.reader import open_checkpoint
from psoft_export.checkpoint.source import Source, resolve
from psoft_export.errors import OutputError, RecordMissingError
from psoft_export.layouts import LayoutCache, layout_key
from psoft_export.plan import MergePlan, OutputOptions
from psoft_export.planner import Planner


def open_plan(
    base: str | Path,
    adapter: str | Path | Source,
    *,
    require_record: bool = False,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    labels: Sequence[str] | None = None,
    neumann_terms: NeumannTerms | None = None,
    givens: GivensForm | None = None,
    token: str | None = None,
    planner: Planner | None = None,
    layouts: LayoutCache | None = None,
) -> MergePlan:
    """The plan of a merge of one adapter; arguments and errors as of `combining.plan_merge`.

    A layout that is in `layouts` is taken from there, others are kept in it.
    """
    code = parse_dtype(dtype) if dtype is not None else None
    reading = Reading(neumann_terms, givens)
    if isinstance(adapter, Source):
        loaded = read_adapter(adapter, reading)
    else:
        loaded = load_adapter(adapter, neumann_terms=neumann_terms, givens=givens, token=token)
    read_combination(loaded.source.folder)  # what is malformed is refused before the work
    if require_record and loaded.needs_record:
        needed_record(loaded)
    source = resolve(base, companions.CONFIG, base_files, token=token)
    checkpoint = open_checkpoint(source.folder)
    options = OutputOptions(code, max_shard_size, tuple(labels) if labels is not None else None)
    key = layout_key(checkpoint, loaded, options) if layouts is not None else None
    if layouts is not None and key is not None:
        kept = layouts.get(key, checkpoint, loaded)
        if kept is not None:
            if planner is not None:
                planner.stop()
            return MergePlan(source, checkpoint, loaded, options, kept)
    if planner is not None:
        layout = planner.layout(source, loaded.source, reading, options)
    else:
        from psoft_export.planning import make_layout  # loads transformers

        layout = make_layout(checkpoint, loaded, options)
    if layouts is not None and key is not None:
        layouts.put(key, layout)
    return MergePlan(source, checkpoint, loaded, options, layout)


def check_apart(target: Path, plan: MergePlan) -> None:
    """Check that the output does not replace a folder that is being read.

    Raises:
        OutputError: it would.
    """
    output = target.resolve()
    adapter = plan.adapter.source
    for path in (plan.base.folder, adapter.folder, *adapter.made_from):
        folder = path.resolve()
        if output == folder or output in folder.parents:
            raise OutputError(f"{target}: is or holds the input {folder}; choose another output")


def needed_record(adapter: Adapter) -> BasisRecord:
    """The adapter's basis record.

    Raises:
        RecordMissingError: it has none.
    """
    if adapter.record is None:
        raise RecordMissingError(
            f"{adapter.source.name}: has no basis record ({basis_record.FILENAME}); make one with "
            "'psoft-export record' on the machine that trained it"
        )
    return adapter.record


def base_files(names: Iterable[str]) -> list[str]:
    """Of a Hub repository's file names, those that a merge reads from a base."""
    names = list(names)
    return [*weight_files(names), *companions.base_files(names)]
