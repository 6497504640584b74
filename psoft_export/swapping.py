"""Turning a merged checkpoint into another task's, by rewriting only the tensors that change."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psoft_export.adapters.adapter import NeumannTerms
from psoft_export.algebra.parameters import GivensForm
from psoft_export.bases import BasisFinder
from psoft_export.cache import open_cache
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.cloning import link_file
from psoft_export.checkpoint.dtypes import WEIGHT_CODES, config_name
from psoft_export.checkpoint.names import INDEX, SAFETENSORS
from psoft_export.checkpoint.output import OutputFolder, check_free_space
from psoft_export.checkpoint.reader import file_sha256
from psoft_export.checkpoint.safetensors_file import TensorEntry, read_header
from psoft_export.checkpoint.source import Source, member
from psoft_export.combining import Combination, plan_merge
from psoft_export.device import choose_device
from psoft_export.errors import CheckpointError, MismatchError, UnsupportedError, UsageError
from psoft_export.execution import Run
from psoft_export.manifest import FILENAME, source_record
from psoft_export.merging import MergeReport, companion_hashes, describe_run
from psoft_export.opening import check_apart
from psoft_export.pipeline import ProgressCallback
from psoft_export.plan import MergePlan
from psoft_export.verification.figures import VerificationReport

CARD = "README.md"


def swap(
    merged: str | Path,
    adapter: str | Path | Combination,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    svd_device: str | None = None,
    require_record: bool = False,
    neumann_terms: NeumannTerms | None = None,
    givens: GivensForm | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> MergeReport:
    """Turn a folder that `merge` wrote into the merge of another adapter of its base.

    Only the tensors that either adapter changes are computed and written; the rest of each
    weight file is shared with what was there where the file system can do that, or copied. The
    folder changes in one step when all is written and checked: whenever it is cut short, the
    folder is one valid checkpoint or the other, and its `psoft_export.json` says which. The bytes
    are those that a merge with the same options writes.

    Args:
        merged: the folder, as `merge` or `swap` left it.
        adapter: folder or Hub id of the other adapter, or a combination of several.
        base: folder or Hub id of the base of both, which is read and hashed; by default the Hub
            repository and commit that `psoft_export.json` names.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        svd_device: as for `merge`.
        require_record: refuse an adapter without a basis record.
        neumann_terms: as of `load_adapter`.
        givens: as of `load_adapter`.
        cache: keep bases on disk, and take them from there.
        cache_dir: folder of that cache.
        token: a Hub token.
        progress: called after every piece.

    Returns:
        What was done, as of `merge`; its `modules` are those of the adapter.

    Raises:
        CheckpointError: the folder is not one that `merge` wrote, or was changed since.
        MismatchError: the base is not that of the folder, or not that of the adapter.
        UnsupportedError: more than weights of the same shapes differs, such as a head.
        PsoftExportError: as `merge`.

    Example:
        >>> psoft_export.swap("merged", "adapters/code", base="base")
    """
    on = choose_device(device)
    trained_on = choose_device(svd_device) if svd_device is not None else None
    store = open_cache(cache_dir) if cache else None
    folder = Path(merged)
    # From here on nobody else writes the folder, and what a killed run left is cleared.
    with OutputFolder(folder, overwrite=True) as output:
        origin = _read_origin(folder)
        known = _base_of(origin, folder) if base is None else base
        options = origin["options"]
        plan = plan_merge(
            known,
            adapter,
            device=device,
            svd_device=svd_device,
            cache=cache,
            cache_dir=cache_dir,
            require_record=require_record,
            dtype=config_name(options["dtype"]) if options.get("dtype") else None,
            max_shard_size=options.get("max_shard_size"),
            neumann_terms=neumann_terms,
            givens=givens,
            token=token,
        )
        check_apart(folder, plan)
        entries = _tensors(folder, plan, origin)
        changed = {m["tensor"] for m in origin["modules"]} | {t.spec.name for t in plan.targets}
        if strange := sorted(changed - entries.keys()):
            raise CheckpointError(f"{folder}: has no tensor '{strange[0]}'; merge again")
        _check_untouched(folder, origin)
        files = companions.gather(plan.base.folder, plan.adapter.source.folder)
        hashes = companion_hashes(plan, files)
        written = {entries[name].file for name in changed}
        room = companions.ROOM_BYTES + sum(path.stat().st_size for path in written)
        check_free_space(output.path.parent, room)
        companions.write_companions(files, output.path)
        companions.write_config(plan.base.folder, plan.layout.config_changes, output.path)
        bases = BasisFinder(plan.adapter, device=on, svd_device=trained_on, cache=store)
        run = Run(plan, bases, on, progress)
        run.rewrite(entries, output.path, changed)
        _check_base(run.sha256, origin, plan)
        _carry_over(folder, output.path, origin)
        weights = run.weights_level()
        content = describe_run(
            plan,
            bases,
            plan.adapter.product_dtype(on),
            run.sha256,
            hashes,
            options,
            run.modules,
            files={**origin["files"], **run.files},
            verification={"weights": weights.summary(), "geometry": None, "outputs": None},
            warnings=_card_warning(folder),
        )
        companions.write_json(output.path / FILENAME, content)
        report = VerificationReport(
            base=content["base"],
            adapter=content["adapter"],
            merged=source_record(Source(folder, folder.absolute().name), content["files"]),
            method=plan.adapter.method,
            basis=content["basis"],
            weights=weights,
            geometry=None,
            outputs=None,
            warnings=tuple(content["warnings"]),
        )
        output.commit()
    return MergeReport(folder, tuple(run.modules), report, content)


def _read_origin(folder: Path) -> dict[str, Any]:
    """`psoft_export.json` of the folder.

    Raises:
        CheckpointError: it is not that of a merge.
        UnsupportedError: the merge brought tensors of its own.
    """
    path = folder / FILENAME
    try:
        content = json.loads(path.read_text("utf-8"))
        sound = _is_of_merge(content) and (folder / companions.CONFIG).is_file()
        saved = content["verification"]["weights"]["saved_tensors"] if sound else 0
    except FileNotFoundError as cause:
        raise CheckpointError(
            f"{path}: no such file; swap changes folders that 'psoft-export merge' wrote"
        ) from cause
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: is not of a merge; merge again with --overwrite")
    for name in content["files"]:
        member(folder, name, FILENAME, CheckpointError)
    if (link := next((p for p in folder.rglob("*") if p.is_symlink()), None)) is not None:
        raise CheckpointError(
            f"{link}: is a symbolic link; swap replaces plain folders: put the file itself there"
        )
    if saved:
        raise UnsupportedError(
            f"{folder}: its adapter brought {saved} tensor(s) of its own (a head); merge the other "
            "one with --overwrite"
        )
    return dict(content)


def _is_of_merge(content: Any) -> bool:
    """Whether `psoft_export.json` has what is needed of it; may raise KeyError or TypeError."""
    base, adapter = content["base"], content["adapter"]
    hashes = (base["sha256"], adapter["sha256"], content["files"])
    pairs = [pair for mapping in hashes for pair in mapping.items()]
    return (
        content["format"] == "psoft-export"
        and all(isinstance(text, str) for pair in pairs for text in pair)
        and content["options"].get("dtype") in (None, *WEIGHT_CODES)
        and all(isinstance(module["tensor"], str) for module in content["modules"])
        and (base["kind"] != "hub" or all(isinstance(base[n], str) for n in ("name", "revision")))
    )


def _base_of(origin: Mapping[str, Any], folder: Path) -> str:
    base = origin["base"]
    if base.get("kind") != "hub":
        raise UsageError(
            f"{folder}: was merged from a local base ('{base.get('name')}'), whose place is not "
            "recorded; pass --base"
        )
    return f"{base['name']}@{base['revision']}"


def _tensors(folder: Path, plan: MergePlan, origin: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The tensors of the folder by name, which must be those that the plan would write.

    Raises:
        CheckpointError: a file cannot be read.
        UnsupportedError: they are others.
    """
    if plan.adapter.saved:
        raise UnsupportedError(
            f"{plan.adapter.source.name}: brings tensors of its own (a head), so more than weights "
            "changes; merge it with --overwrite"
        )
    entries: dict[str, TensorEntry] = {}
    for shard in plan.layout.shards:
        path = folder / shard.filename
        if shard.filename not in origin["files"] or not path.is_file():
            raise CheckpointError(f"{path}: no such file; merge again with --overwrite")
        found, _ = read_header(path)
        planned = {t.spec.name: (t.spec.dtype, t.spec.shape) for t in shard.tensors}
        if {entry.name: (entry.dtype, entry.shape) for entry in found} != planned:
            raise UnsupportedError(
                f"{path}: does not hold the tensors that this merge would write; was it made from "
                "another base? Merge again with --overwrite"
            )
        entries |= {entry.name: entry for entry in found}
    return entries


def _check_untouched(folder: Path, origin: Mapping[str, Any]) -> None:
    """Check that the weight files are those that were written.

    Raises:
        CheckpointError: they are not.
    """
    for name, sha256 in origin["files"].items():
        if file_sha256(folder / name, CheckpointError) != sha256:
            raise CheckpointError(
                f"{folder / name}: has been changed since it was merged; merge again with "
                "--overwrite"
            )


def _check_base(sha256: Mapping[str, str], origin: Mapping[str, Any], plan: MergePlan) -> None:
    """Check the base's weight files against those of the first merge.

    Raises:
        MismatchError: they are others.
    """
    stated = origin["base"]["sha256"]
    for name, found in sha256.items():
        if stated.get(name) != found:
            raise MismatchError(
                f"{plan.base.name}: its {name} is not the one that the folder was merged from; "
                "pass that base, or merge again with --overwrite"
            )


def _carry_over(folder: Path, output: Path, origin: Mapping[str, Any]) -> None:
    """Take over what is not there yet: untouched weight files, their index, and the user's files.

    Not the tokenizer and processor of the adapter before, nor anything that its merge took.
    """
    left = companions.BROUGHT | origin["base"]["sha256"].keys() | origin["adapter"]["sha256"].keys()
    left = (left | {FILENAME}) - origin["files"].keys()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        target = output / name
        if not path.is_file() or target.exists() or name in left - {SAFETENSORS + INDEX}:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        link_file(path, target)


def _card_warning(folder: Path) -> list[str]:
    if not (folder / CARD).exists():
        return []
    return [f"{CARD} still speaks of the adapter before; 'psoft-export push' writes it anew"]
