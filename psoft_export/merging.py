"""Merging an adapter into its base, from two references to a complete output folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from psoft_export.adapters.adapter import NeumannTerms, SubspaceAdapter
from psoft_export.adapters.combination_file import read_combination
from psoft_export.adapters.files import named_base
from psoft_export.algebra.merged_weight import product_error_bound
from psoft_export.algebra.parameters import GivensForm
from psoft_export.bases import BasisFinder
from psoft_export.cache import BasisCache, open_cache
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.names import INDEX, SAFETENSORS, weight_files
from psoft_export.checkpoint.output import OutputFolder, check_target
from psoft_export.checkpoint.reader import file_sha256
from psoft_export.checkpoint.source import Source
from psoft_export.combining import Combination, plan_merge
from psoft_export.device import choose_device
from psoft_export.errors import (
    AdapterError,
    CheckpointError,
    NotEquivalentError,
    UsageError,
)
from psoft_export.execution import Run
from psoft_export.manifest import (
    FILENAME,
    LoraModule,
    ModuleReport,
    manifest,
    source_record,
)
from psoft_export.opening import check_apart, open_plan
from psoft_export.pipeline import ProgressCallback
from psoft_export.plan import MergePlan
from psoft_export.planner import Planner
from psoft_export.verification.figures import OutputsLevel, VerificationReport
from psoft_export.verification.text import read_text


@dataclass(frozen=True)
class MergeReport:
    """The outcome of a merge.

    Attributes:
        output: the folder written.
        modules: what was done to each module, in the order of the output.
        verification: how equivalent the output was found to be.
        manifest: all that `psoft_export.json` says.
    """

    output: Path
    modules: tuple[ModuleReport, ...]
    verification: VerificationReport
    manifest: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON-ready object."""
        return {"output": str(self.output), **self.manifest}


def merge(
    base: str | Path,
    adapter: str | Path | Combination,
    output: str | Path,
    *,
    device: str = "auto",
    svd_device: str | None = None,
    require_record: bool = False,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    labels: Sequence[str] | None = None,
    neumann_terms: NeumannTerms | None = None,
    givens: GivensForm | None = None,
    verify_outputs: bool = False,
    text: str | Path | None = None,
    recover_with: str | Path | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: ProgressCallback | None = None,
    note: Callable[[str], None] | None = None,
    planner: Planner | None = None,
) -> MergeReport:
    """Write the checkpoint in which an adapter is merged into its base.

    For every target module the merged weight, each entry the number nearest to the exact value;
    of a PSOFT adapter W + scaling · B (R − I) A with the basis (A, B) that its basis record
    gives; without a record, with the one that PEFT would find on `svd_device`. Other kinds of
    adapters are in `docs/adapters.md`. Every other tensor is copied byte for byte. Every
    merged weight is checked against a second evaluation, of other formulas, and every file is
    read back. The output folder appears only when it is complete and equivalent.

    Args:
        base: folder or Hub id (`owner/name[@revision]`) of the base checkpoint.
        adapter: folder or Hub id of the adapter, or a combination of several.
        output: folder to write.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        svd_device: for an adapter without a basis record: the device that computed the SVD in
            training; by default `device`. Ignored where there is a record.
        require_record: refuse an adapter without a basis record.
        cache: keep bases on disk, and take them from there.
        cache_dir: folder of that cache; by default `$PSOFT_EXPORT_CACHE` or the user's cache.
        dtype: `fp32`, `fp16` or `bf16` for every floating tensor of the output; by default each
            keeps the dtype it is stored in.
        max_shard_size: largest weight file, as `"5GB"` or bytes; by default the base's own files.
        labels: names of the classes of a new classification head.
        neumann_terms: as of `load_adapter`.
        givens: as of `load_adapter`.
        verify_outputs: also run the merged model beside base and adapter, not merged, and look at
            what the rotations keep (see `verify`).
        text: a UTF-8 text file to run then.
        recover_with: data of the task, from which to recover the signs of an adapter (a folder)
            without a basis record first, as `recover` does with its defaults; the record is
            written into the adapter's folder. An adapter with a record is merged with that.
        overwrite: replace a non-empty output folder.
        token: a Hub token; by default the one that `hf auth login` stored.
        progress: called after every piece of the output.
        note: told in a few words of each step of `verify_outputs`.
        planner: the process that plans, from `start_planner`; by default this one does, and
            holds transformers (over 100 MB) to the end.

    Returns:
        What was done, module by module.

    Raises:
        NotEquivalentError: the result is not what base and adapter mean.
        NotRecoveredError: the signs could not be recovered, or only partly.
        PsoftExportError: a subclass that says what is wrong; see `docs/exit-codes.md`.

    Example:
        >>> report = psoft_export.merge("base", "adapter", "merged", dtype="bf16")
        >>> max(module.relative_delta for module in report.modules)
    """
    if text is not None and not verify_outputs:
        raise UsageError("text: is for checking outputs; pass --verify with it")
    if text is not None:
        read_text(Path(text))  # refused now rather than after the merge
    chosen = choose_device(device)
    trained_on = choose_device(svd_device) if svd_device is not None else None
    store = open_cache(cache_dir) if cache else None
    check_target(Path(output).absolute(), overwrite=overwrite)
    if recover_with is not None:
        # What is wrong with the arguments is refused before a search of minutes.
        before = open_plan(
            base,
            _one_adapter(adapter),
            dtype=dtype,
            max_shard_size=max_shard_size,
            labels=labels,
            neumann_terms=neumann_terms,
            givens=givens,
            token=token,
        )
        check_apart(Path(output), before)
        if before.adapter.needs_record and before.adapter.record is None:
            _recover(base, adapter, recover_with, labels, device, cache, cache_dir, token, note)
        elif note is not None:
            record = before.adapter.record
            known = f"stand in {record.path}" if record else "are in no doubt"
            note(f"the adapter's signs {known}; what --recover-with names is not read")
    plan = plan_merge(
        base,
        adapter,
        device=device,
        svd_device=svd_device,
        cache=cache,
        cache_dir=cache_dir,
        require_record=require_record,
        dtype=dtype,
        max_shard_size=max_shard_size,
        labels=labels,
        neumann_terms=neumann_terms,
        givens=givens,
        token=token,
        planner=planner,
    )
    return execute_merge(
        plan,
        output,
        device=chosen,
        svd_device=trained_on,
        cache=store,
        with_outputs=verify_outputs,
        text=Path(text) if text is not None else None,
        overwrite=overwrite,
        progress=progress,
        note=note,
    )


def _one_adapter(adapter: str | Path | Combination) -> str | Path:
    """The adapter whose signs can be recovered.

    Raises:
        UsageError: it is a combination of several.
    """
    if isinstance(adapter, Combination):
        raise UsageError("recover-with: is for one adapter; recover each before combining them")
    return adapter


def _recover(
    base: str | Path,
    adapter: str | Path | Combination,
    data: str | Path,
    labels: Sequence[str] | None,
    device: str,
    cache: bool,
    cache_dir: str | Path | None,
    token: str | None,
    note: Callable[[str], None] | None,
) -> None:
    """Recover the signs of an adapter; arguments and errors as of `merge`."""
    from psoft_export.recovering import recover  # loads transformers

    folder = _one_adapter(adapter)
    if not Path(folder).expanduser().is_dir():
        raise UsageError(
            f"{folder}: not a folder here, so a recovered record has no place; make a copy with "
            "'psoft-export recover --output' and merge that"
        )
    found = recover(
        base,
        folder,
        data,
        labels=labels,
        device=device,
        cache=cache,
        cache_dir=cache_dir,
        token=token,
        note=note,
    )
    found.require_recovered()


def execute_merge(
    plan: MergePlan,
    output: str | Path,
    *,
    device: torch.device,
    svd_device: torch.device | None = None,
    cache: BasisCache | None = None,
    with_outputs: bool = False,
    text: Path | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
    note: Callable[[str], None] | None = None,
) -> MergeReport:
    """Carry out a plan: write its output folder. Arguments, result and errors as of `merge`."""
    target = Path(output)
    check_apart(target, plan)
    files = companions.gather(plan.base.folder, plan.adapter.source.folder)
    hashes = companion_hashes(plan, files)  # reads them all, so none fails half-way
    room = plan.output_bytes + companions.ROOM_BYTES
    with OutputFolder(target, overwrite=overwrite, needed_bytes=room) as folder:
        companions.write_companions(files, folder.path)
        companions.write_config(plan.base.folder, plan.layout.config_changes, folder.path)
        bases = BasisFinder(plan.adapter, device=device, svd_device=svd_device, cache=cache)
        run = Run(plan, bases, device, progress, with_geometry=with_outputs)
        run.write_weights(folder.path)
        if plan.is_indexed:
            companions.write_json(folder.path / (SAFETENSORS + INDEX), _weight_index(plan))
        options = {
            "dtype": plan.options.dtype,
            "max_shard_size": plan.options.max_shard_size,
            "labels": plan.layout.config_changes.get("id2label"),
        }
        weights, geometry, outputs = run.weights_level(), run.geometry_level(), None
        if with_outputs:
            from psoft_export.verification.outputs import check_outputs  # loads transformers

            outputs = check_outputs(plan, folder.path, bases, device=device, text=text, note=note)
        levels = {"weights": weights, "geometry": geometry, "outputs": outputs}
        content = describe_run(
            plan,
            bases,
            plan.adapter.product_dtype(device),
            run.sha256,
            hashes,
            options,
            run.modules,
            files=run.files,
            warnings=outputs_warning(outputs),
            verification={name: lv.summary() if lv else None for name, lv in levels.items()},
        )
        report = VerificationReport(
            base=content["base"],
            adapter=content["adapter"],
            merged=source_record(Source(folder.path, target.absolute().name), run.files),
            method=plan.adapter.method,
            basis=content["basis"],
            weights=weights,
            geometry=geometry,
            outputs=outputs,
            warnings=tuple(content["warnings"]),
        )
        if not report.equivalent:
            raise NotEquivalentError(
                f"{target}: not equivalent, so nothing was written: {report.first_problem}", report
            )
        companions.write_json(folder.path / FILENAME, content)
        folder.commit()
    return MergeReport(target, tuple(run.modules), report, content)


def outputs_warning(outputs: OutputsLevel | None) -> list[str]:
    """What to say where models were to be run and were not."""
    if outputs is None or outputs.skipped is None:
        return []
    return [f"outputs were not compared: {outputs.skipped}"]


def _weight_index(plan: MergePlan) -> dict[str, Any]:
    weight_map = {
        t.spec.name: shard.filename for shard in plan.layout.shards for t in shard.tensors
    }
    return {"metadata": {"total_size": plan.output_bytes}, "weight_map": weight_map}


def companion_hashes(plan: MergePlan, files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """SHA-256 of every file beside the weights that the output is made from, by side and name."""
    base, adapter = plan.base.folder, plan.adapter.source.folder
    read = {companions.CONFIG: base / companions.CONFIG, **files}
    index = next(iter(weight_files(path.name for path in base.iterdir())), "")
    if index.endswith(INDEX):
        read[index] = base / index
    hashes: dict[str, dict[str, str]] = {"base": {}, "adapter": {}}
    for name, path in read.items():
        if path.parent == adapter:
            hashes["adapter"][name] = file_sha256(path, AdapterError)
        else:
            hashes["base"][name] = file_sha256(path, CheckpointError)
    return hashes


def describe_run(
    plan: MergePlan,
    bases: BasisFinder,
    compute: torch.dtype,
    weights: Mapping[str, str],
    beside: Mapping[str, Mapping[str, str]],
    options: Mapping[str, Any],
    modules: Sequence[ModuleReport | LoraModule],
    *,
    files: Mapping[str, str],
    verification: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of `psoft_export.json` for a run of a plan.

    Args:
        plan: the plan.
        bases: what found the bases.
        compute: dtype of the products.
        weights: SHA-256 of each weight file of the base, by name.
        beside: as `companion_hashes` gives it.
        options: what was asked for.
        modules: what was done to each.
        files: SHA-256 of each weight file written, by name.
        verification: the summary of each level that was checked, by name.
        warnings: what the user should know of this run, beside what plan and bases say.
    """
    adapter = plan.adapter
    combined = read_combination(adapter.source.folder)
    made_of = {"combination": combined["combination"]} if combined is not None else {}
    return manifest(
        base=source_record(plan.base, {**weights, **beside["base"]}),
        adapter=source_record(adapter.source, {**adapter.sha256, **beside["adapter"]})
        | made_of
        | {
            "method_name": adapter.method_name,
            "paper": adapter.paper,
            "method": adapter.method,
            "options": dict(adapter.options),
            "base_model": named_base(adapter.config),
        },
        class_name=plan.layout.class_name,
        options=options,
        basis=bases.describe(),
        product={
            "dtype": str(compute).removeprefix("torch."),
            "relative_error_bound": (
                product_error_bound(adapter.rank, compute)
                if isinstance(adapter, SubspaceAdapter)
                else None
            ),
        },
        files=files,
        verification=verification,
        modules=modules,
        warnings=(
            *(combined["warnings"] if combined is not None else ()),
            *plan.warnings,
            *bases.warnings,
            *warnings,
        ),
    )
