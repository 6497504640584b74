"""Verifying a merged checkpoint, from three references to one verdict."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from psoft_export.adapters.adapter import NeumannTerms
from psoft_export.adapters.combination_file import read_combination
from psoft_export.adapters.files import CONFIG as ADAPTER_CONFIG
from psoft_export.algebra.parameters import GivensForm
from psoft_export.bases import BasisFinder
from psoft_export.cache import open_cache
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.reader import Checkpoint, file_sha256, open_checkpoint
from psoft_export.checkpoint.source import Source, resolve
from psoft_export.combining import Combination, plan_merge
from psoft_export.device import choose_device
from psoft_export.errors import CheckpointError, UnsupportedError, UsageError
from psoft_export.manifest import FILENAME, source_record
from psoft_export.merging import outputs_warning
from psoft_export.onnx.folder import COMPONENTS, graph_files, is_graph_folder, read_folder
from psoft_export.onnx.requirements import require_onnx
from psoft_export.opening import base_files
from psoft_export.pipeline import ProgressCallback
from psoft_export.plan import MergePlan
from psoft_export.planner import Planner
from psoft_export.verification.evaluation import DOUBLE
from psoft_export.verification.figures import VerificationReport
from psoft_export.verification.text import read_text
from psoft_export.verification.weights import check_weights

Level = Literal["weights", "outputs", "all"]

# Fields of a config that say who wrote it, or follow from other checks.
_SAID_BY_WRITER = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "num_labels",
}
_COARSE = (
    f"by its {FILENAME}, ΔW was formed in float32 (a GPU without fast float64): entries count as "
    "the nearest number within what that leaves open"
)


def verify(
    base: str | Path,
    adapter: str | Path | Combination,
    merged: str | Path,
    *,
    level: Level = "all",
    text: str | Path | None = None,
    device: str = "auto",
    svd_device: str | None = None,
    require_record: bool = False,
    neumann_terms: NeumannTerms | None = None,
    givens: GivensForm | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    progress: ProgressCallback | None = None,
    note: Callable[[str], None] | None = None,
    planner: Planner | None = None,
) -> VerificationReport:
    """Whether a checkpoint is what base and adapter mean, and by how much it is not.

    Also an ONNX export of it, at the outputs level: then the graph is run.

    `weights` compares every tensor with an evaluation in float64 that shares no formula with the
    merge, and looks at what the rotations keep. `outputs` runs base and adapter, not merged,
    beside the merged model. Nothing is written.

    Args:
        base: folder or Hub id of the base.
        adapter: folder or Hub id of the adapter, or a combination of several.
        merged: folder or Hub id of the checkpoint, or ONNX export, to verify.
        level: `weights`, `outputs`, or `all` for both.
        text: a UTF-8 text file to run at the outputs level; by default tokens (or pixels) drawn
            at random.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        svd_device: as for `merge`.
        require_record: refuse an adapter without a basis record.
        neumann_terms: as of `load_adapter`.
        givens: as of `load_adapter`.
        cache: keep bases on disk, and take them from there.
        cache_dir: folder of that cache.
        token: a Hub token.
        progress: called after each tensor.
        note: told in a few words of each step of the outputs level.
        planner: as for `merge`.

    Returns:
        The verdict (`report.equivalent`), with figures by module and the problems in words. An
        unfit checkpoint is a verdict, not an error.

    Raises:
        UsageError: an option cannot be used.
        MismatchError: adapter and base do not fit each other, or the base is not the one that
            the adapter's basis was recorded with.
        CheckpointError: a file of `merged` or of the base cannot be read.
        PsoftExportError: as `merge`.

    Example:
        >>> report = psoft_export.verify("base", "adapter", "merged", level="weights")
        >>> report.equivalent, report.problems
    """
    if level not in get_args(Level):
        raise UsageError(f"level '{level}' is not one of {', '.join(get_args(Level))}")
    if text is not None and level == "weights":
        raise UsageError("text: is for the outputs level; pass --level outputs or all")
    path = Path(text) if text is not None else None
    if path is not None:
        read_text(path)  # refused now rather than after the weights
    on = choose_device(device)
    trained_on = choose_device(svd_device) if svd_device is not None else None
    store = open_cache(cache_dir) if cache else None
    plan = plan_merge(
        base,
        adapter,
        device=device,
        svd_device=svd_device,
        cache=cache and isinstance(adapter, Combination),  # planned anew, whatever merged it
        cache_dir=cache_dir,
        require_record=require_record,
        neumann_terms=neumann_terms,
        givens=givens,
        token=token,
        planner=planner,
    )
    source = resolve(merged, companions.CONFIG, _merged_files, token=token)
    bases = BasisFinder(plan.adapter, device=on, svd_device=trained_on, cache=store)
    if is_graph_folder(source.folder):
        if level == "weights":
            raise UsageError(
                f"{source.folder}: is an ONNX export, whose weights no longer have their names; "
                "pass --level outputs"
            )
        return _verify_graph(plan, source, bases, on, path, note or (lambda _: None))
    checkpoint = open_checkpoint(source.folder)
    origin = _read_manifest(source.folder)
    unit = _product_unit(origin)
    coarse = [_COARSE] if unit != DOUBLE else []
    weights = geometry = outputs = None
    hashes: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    if level != "outputs":
        checked = check_weights(
            plan,
            checkpoint,
            bases,
            device=on,
            product_unit=unit,
            progress=progress,
        )
        hashes = checked.base_sha256, checked.merged_sha256
        problems = (
            *_folder_problems(plan, source.folder),
            *_origin_problems(origin, plan, *hashes),
            *checked.weights.problems,
        )
        weights, geometry = replace(checked.weights, problems=problems), checked.geometry
    if level != "weights":
        from psoft_export.verification.outputs import check_outputs  # loads transformers

        outputs = check_outputs(plan, source.folder, bases, device=on, text=path, note=note)
    if level == "outputs":
        hashes = _weight_hashes(plan.checkpoint), _weight_hashes(checkpoint)
    return VerificationReport(
        base=source_record(plan.base, hashes[0]),
        adapter=source_record(plan.adapter.source, plan.adapter.sha256),
        merged=source_record(source, hashes[1]),
        method=plan.adapter.method,
        basis=bases.describe(),
        weights=weights,
        geometry=geometry,
        outputs=outputs,
        warnings=(*plan.warnings, *bases.warnings, *outputs_warning(outputs), *coarse),
    )


def _verify_graph(
    plan: MergePlan,
    source: Source,
    bases: BasisFinder,
    device: torch.device,
    text: Path | None,
    note: Callable[[str], None],
) -> VerificationReport:
    """The verdict on an ONNX export, of one merged model or of several tasks."""
    require_onnx()
    from psoft_export.onnx.equivalence import check_graph  # loads ONNX Runtime
    from psoft_export.verification.models import LoadedModel, UnmergedLoader, find_changes
    from psoft_export.verification.outputs import Load, numbers_beside

    folder = read_folder(source.folder)
    loader = UnmergedLoader(plan)
    if folder.model_class != loader.skeleton.class_name:
        raise UnsupportedError(
            f"{source.folder}: is an export of {folder.model_class}, the adapter is of "
            f"{loader.skeleton.class_name}; an export with another --task cannot be compared"
        )
    task, problems = folder.task_of(plan.adapter.sha256)
    note("running the models: bases")
    changes = find_changes(plan, bases, device)

    def reference(dtype: torch.dtype, on: torch.device) -> LoadedModel:
        return loader.load(changes, dtype, on)

    def base(dtype: torch.dtype, on: torch.device) -> LoadedModel:
        return loader.load({}, dtype, on)

    # What a task's ΔW does to outputs is told from the base, which such a graph holds too.
    references: dict[str | None, Load] = {task: reference}
    if task is not None:
        references = {None: base, task: reference}
    levels = check_graph(
        source.folder,
        references,
        loader,
        beside=numbers_beside(plan),
        outside=folder.outside,
        code=folder.dtype,
        text=text,
        device=device,
        note=note,
        quantized=folder.quantization is not None,
    )
    outputs = levels[task or ""]
    files = {
        name: file_sha256(source.folder / name, CheckpointError)
        for name in folder.files
        if (source.folder / name).is_file()
    }
    problems += [
        f"{FILENAME}: {name} has been changed since it was exported, or is missing"
        for name, sha256 in folder.files.items()
        if files.get(name) != sha256
    ]
    return VerificationReport(
        base=source_record(plan.base, _weight_hashes(plan.checkpoint)),
        adapter=source_record(plan.adapter.source, plan.adapter.sha256),
        merged=source_record(source, files),
        method=plan.adapter.method,
        basis=bases.describe(),
        weights=None,
        geometry=None,
        outputs=replace(outputs, problems=(*problems, *outputs.problems)),
        warnings=(*plan.warnings, *bases.warnings, *outputs_warning(outputs)),
    )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """`psoft_export.json` of a merged folder; None where another program made it.

    Raises:
        CheckpointError: it is there and is not such a file.
    """
    path = folder / FILENAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        hashes = [content[side]["sha256"] for side in ("base", "adapter")]
        if all(
            isinstance(side, dict)
            for side in (content["product"], content.get("files", {}), *hashes)
        ):
            return dict(content)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path}: not a file that psoft-export wrote; remove it to do without")


def _product_unit(origin: Mapping[str, Any] | None) -> float:
    """Unit roundoff of the arithmetic that the merge says it formed ΔW in."""
    single = origin is not None and origin["product"].get("dtype") == "float32"
    return torch.finfo(torch.float32).eps / 2 if single else DOUBLE


def _merged_files(names: Iterable[str]) -> list[str]:
    """Of a Hub repository's file names, those to fetch of a merged checkpoint."""
    names = list(names)
    if COMPONENTS in names:
        return graph_files(names)
    beside = [name for name in (FILENAME, ADAPTER_CONFIG) if name in names]
    return [*base_files(names), *beside]


def _weight_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    return {file.name: file_sha256(file.path, CheckpointError) for file in checkpoint.files}


def _folder_problems(plan: MergePlan, folder: Path) -> list[str]:
    """What is wrong beside the weights: another config, or an adapter that would be loaded too.

    Of `config.json` the fields that both have must agree, but for those that say who wrote it and
    in which dtype; and what the adapter's own tensors (a new head) make necessary.
    """
    config, changes = _read_config(folder), plan.layout.config_changes
    expected = {n: v for n, v in _read_config(plan.base.folder).items() if n not in changes}
    expected |= {n: changes[n] for n in ("architectures", "vocab_size") if n in changes}
    found = [f"config.json: {text}" for text in _differing(expected, config)]
    labels = len(changes.get("id2label", ()))
    if labels and len(config.get("id2label") or ()) != labels:
        found.append(f"config.json: id2label does not name the head's {labels} classes")
    if (folder / ADAPTER_CONFIG).exists():
        found.append(
            f"{ADAPTER_CONFIG}: is beside the merged weights; with PEFT installed, transformers "
            "would apply that adapter on top of them"
        )
    return found


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for field in sorted((expected.keys() & found.keys()) - _SAID_BY_WRITER):
        ours, theirs = expected[field], found[field]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from (f"{field}: {text}" for text in _differing(ours, theirs))
        elif ours != theirs:
            yield f"{field} is {theirs!r}; {ours!r} is needed"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / companions.CONFIG
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as cause:
        raise CheckpointError(f"{path}: not readable JSON") from cause


def _origin_problems(
    origin: Mapping[str, Any] | None,
    plan: MergePlan,
    base_sha256: Mapping[str, str],
    merged_sha256: Mapping[str, str],
) -> list[str]:
    """Where `psoft_export.json` speaks of other files than these."""
    if origin is None:
        return []
    adapter = plan.adapter
    ours = {name: adapter.sha256[name] for name in (ADAPTER_CONFIG, adapter.weights_file)}
    combined = read_combination(adapter.source.folder)
    made_of = combined["combination"] if combined is not None else None
    found = []
    if made_of is not None and "combination" in origin["adapter"]:
        # Combined anew, on another machine perhaps: what it is made of says that it is the same.
        ours = {}
        if origin["adapter"]["combination"] != made_of:
            found.append(f"{FILENAME}: the merge was made from another combination of adapters")
    for side, hashes in (("base", base_sha256), ("adapter", ours)):
        stated = origin[side]["sha256"]
        differing = [name for name in hashes if stated.get(name) != hashes[name]]
        if differing:
            found.append(
                f"{FILENAME}: the merge was made from another {side} (it differs in "
                f"{', '.join(differing[:3])})"
            )
    stated = origin["adapter"].get("options", {})
    for name, option in (("neumann_terms", "--neumann-terms"), ("givens", "--givens")):
        if name in stated and adapter.options.get(name) != stated[name]:
            found.append(
                f"{FILENAME}: the merge was made with {option} {stated[name]}, this check with "
                f"{adapter.options.get(name)}; pass what is right to both"
            )
    written = origin.get("files", {})
    found += [
        f"{FILENAME}: {name} has been changed since it was merged"
        for name, sha256 in merged_sha256.items()
        if written.get(name, sha256) != sha256
    ]
    return found
