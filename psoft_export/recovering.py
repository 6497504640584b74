"""Recovering the signs of an adapter that nobody recorded, from a little data of its task."""

import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psoft_export.adapters.adapter import SubspaceAdapter
from psoft_export.adapters.basis_record import (
    FILENAME,
    Recovery,
    SvdDescription,
    beside_record,
    write_record,
)
from psoft_export.algebra.relaxed_signs import RelaxedSigns
from psoft_export.basis.signs import SignRecord, record_signs
from psoft_export.basis.svd import Basis
from psoft_export.cache import BasisCache, open_cache
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.dtypes import TORCH_DTYPES, parse_dtype
from psoft_export.checkpoint.output import OutputFolder, check_target
from psoft_export.checkpoint.reader import file_sha256
from psoft_export.device import choose_device
from psoft_export.errors import (
    CheckpointError,
    NotRecoveredError,
    OutputError,
    PartlyRecoveredError,
    UnsupportedError,
    UsageError,
)
from psoft_export.opening import check_apart, open_plan
from psoft_export.plan import MergePlan
from psoft_export.recovery.examples import Examples, data_sha256, read_examples
from psoft_export.recovery.modules import KnownModule, find_modules
from psoft_export.recovery.readings import chosen_readings
from psoft_export.recovery.run import LEAST_STEPS, ROWS, RecoveryRun
from psoft_export.recovery.state import StateFile
from psoft_export.recovery.task_loss import TaskLoss
from psoft_export.recovery.verdict import (
    RecoveredModule,
    Verdict,
    judge,
    judged,
    settled_share,
)
from psoft_export.verification.inputs import pad_token, tokenizer_folder
from psoft_export.verification.models import UnmergedLoader

Note = Callable[[str], None]

_BATCH = 8  # examples a step


@dataclass(frozen=True)
class RecoveryReport:
    """How far the signs were recovered.

    Losses are in nats a target (a token, a label). Those of a head of one number are squared errors
    by twice the base's mean squared error, so that the base has about one half.

    Attributes:
        verdict: `recovered`: a record was written; `partly`: the held-out loss is below the
            base's, but signs are open that matter; `not`: it is not below.
        reason: the verdict in a sentence.
        path: the record, or None where none was written.
        modules: one entry a module.
        data: what was read, in words.
        base_loss: held-out loss of the base.
        start_loss: held-out loss at the best of the readings; None where none was tried.
        loss: held-out loss with the signs found.
        train_loss: loss of what was searched on, with the signs found; of more than 256 examples,
            of a sample of so many.
        readings: loss of a part of the data by each SVD that was tried first.
        start: the best of the readings; empty where none was tried.
        holds: whether the signs are those of the start as it is.
        returned: share of the signs that matter that two searches found alike; if `holds`, that
            one search found of the start; 0 where nothing was searched.
        settled: settled signs among those that matter.
        steps: gradient steps done.
        seconds: wall time.
        peak_bytes: largest memory of the process (on CUDA: of torch on the device).
        signs: module → the signs found, as a record would hold them, whatever the verdict.
        evidence: module → how many nats data and trainings speak for each sign with (r, float64).
        alike: module → which of them two searches found (r, bool); all of an SVD that holds.
    """

    verdict: Verdict
    reason: str
    path: Path | None
    modules: tuple[RecoveredModule, ...]
    data: str
    base_loss: float
    start_loss: float | None
    loss: float
    train_loss: float
    readings: Mapping[str, float]
    start: str
    holds: bool
    returned: float
    settled: float
    steps: int
    seconds: float
    peak_bytes: int
    signs: Mapping[str, SignRecord] = field(repr=False)
    evidence: Mapping[str, Tensor] = field(repr=False)
    alike: Mapping[str, Tensor] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON-ready object, without what is kept of each sign."""
        fields = asdict(replace(self, signs={}, evidence={}, alike={}))
        del fields["signs"], fields["evidence"], fields["alike"]
        return fields | {"path": str(self.path) if self.path else None}

    def require_recovered(self) -> None:
        """Do nothing where the signs were recovered.

        Raises:
            PartlyRecoveredError: some were.
            NotRecoveredError: none were.
        """
        if self.verdict == "partly":
            raise PartlyRecoveredError(
                f"partly recovered, so nothing was written: {self.reason}", self
            )
        if self.verdict == "not":
            raise NotRecoveredError(f"not recovered, so nothing was written: {self.reason}", self)


def recover(
    base: str | Path,
    adapter: str | Path,
    text: str | Path,
    *,
    output: str | Path | None = None,
    labels: Sequence[str] | None = None,
    window: int | None = None,
    steps: int | None = None,
    time_limit: float | None = None,
    readings: Sequence[str] | None = None,
    random_start: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str | None = None,
    batch: int = _BATCH,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    force: bool = False,
    overwrite: bool = False,
    token: str | None = None,
    note: Note | None = None,
) -> RecoveryReport:
    """Find the signs of an adapter's basis by the loss of its task, and record them.

    The signs that the SVDs of this machine give are tried first. Then two searches, which train
    the adapter again for a few steps and go on by gradients, must agree; what they found is
    bettered flip by flip (docs/recovery.md). One example in five is held out. A record of kind
    `signs` is written only where the verdict is `recovered`, and says in its metadata that its
    signs come from data.

    A search that was interrupted, or that recovered only a part, goes on where it was when it is
    called again with the same cache and arguments, but perhaps more steps or time.

    Args:
        base: folder or Hub id of the base.
        adapter: folder of the adapter, into which the record is written; with `output` also a Hub
            id.
        text: data of the task: UTF-8 text, JSONL, CSV or a folder of images
            (`recovery.examples.read_examples`), on which the adapter should do well.
        output: folder for a copy of the adapter with the record; the adapter then stays as it is.
        labels: names of the classes in the order of the head; default: the config's.
        window: tokens of an example; default: 256, or as many as the model takes.
        steps: gradient steps at most, of all searches; default: 1720.
        time_limit: seconds, in place of `steps`; the searches take half of them at most, if the
            fewest steps that can be checked (290) do not take more.
        readings: names of the SVDs to try (`cpu`, `cpu-float64`, `cpu-transposed`, `numpy`; with
            CUDA also `cuda`, `cuda-gesvd`, `cuda-gesvdj`, `cuda-gesvda`); default: all.
        random_start: try no SVDs, and search from nothing.
        seed: of everything random.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: `fp32`, `fp16` or `bf16`, in which the model computes; default: bf16 on CUDA if the
            base is, else fp32.
        batch: examples in a step.
        cache: keep bases and the state of the search on disk.
        cache_dir: folder of that cache.
        force: search although there is a record, and replace it.
        overwrite: replace a non-empty `output`.
        token: a Hub token.
        note: told in a few words of each step.

    Returns:
        The verdict, with figures by module. Signs that cannot be recovered are a verdict, not an
        error.

    Raises:
        UsageError: the data cannot be read, are too few, or do not fit the model; an option cannot
            be used.
        UnsupportedError: the adapter's signs are not what is unknown (its file holds its basis, its
            basis came from a low-rank SVD, or it is not PSOFT), or the model has no loss.
        OutputError: the adapter has a record already, or the output cannot be written.
        PsoftExportError: as `merge`, for base and adapter.

    Example:
        >>> report = psoft_export.recover("base", "adapter", "task.txt")
        >>> report.verdict, report.base_loss, report.loss
    """
    began = time.monotonic()
    tell = note or (lambda _: None)
    _check_options(steps, time_limit, batch, readings, random_start)
    on = choose_device(device)
    decompositions = {} if random_start else chosen_readings(readings, on)
    asked_dtype = TORCH_DTYPES[parse_dtype(dtype)] if dtype is not None else None
    plan, loaded = _opened(base, adapter, output, force, overwrite, token)
    loader = UnmergedLoader(plan)
    examples = read_examples(
        Path(text), loader.skeleton, tokenizer_folder(plan), labels=labels, window=window, seed=seed
    )
    store = open_cache(cache_dir) if cache else None
    plan = replace(plan, adapter=replace(loaded, record=None))
    found, base_sha256 = find_modules(plan, on, store, decompositions, tell)
    tell("recovering: loading the base")
    compute = asked_dtype or _compute_dtype(on, plan)
    loss = _task_loss(loader, loaded, found, examples, compute, on)
    sha256 = data_sha256(Path(text))
    matters = torch.stack([known.matters for known in found.values()])
    run = RecoveryRun(
        loss, examples.train, examples.held_out, matters, rows=batch, seed=seed, tell=tell
    )
    # All of the base: the loss depends on what the adapter leaves as it is, too.
    config_sha256 = file_sha256(plan.base.folder / companions.CONFIG, CheckpointError)
    options = (batch, seed, compute, on, examples.digest, config_sha256, base_sha256)
    state = _state_file(store, loaded, found, options)
    outcome = run.carry_out(
        {
            name: torch.stack([known.signs[name] for known in found.values()])
            for name in decompositions
        },
        steps=steps,
        time_limit=time_limit,
        file=state,
    )
    polished = outcome.polished
    modules = tuple(
        judged(module, costs, told, polished.targets, known.matters, alike, len(known.cluster))
        for (module, known), costs, told, alike in zip(
            found.items(), polished.costs, polished.told, outcome.alike, strict=True
        )
    )
    verdict, reason = judge(outcome, modules)
    settled = settled_share(modules)
    signs = _signs(loaded, found, polished.signs)
    start_loss = outcome.start.mean if outcome.start is not None else None
    path = None
    if verdict == "recovered":
        mark = Recovery(
            examples.words,
            sha256,
            outcome.base.mean,
            start_loss,
            outcome.held_out.mean,
            settled,
            seed,
        )
        path = _write(plan, loaded, found, signs, mark, on, output, overwrite)
    if state is not None and verdict == "recovered":
        state.remove()
    return RecoveryReport(
        verdict=verdict,
        reason=reason,
        path=path,
        modules=modules,
        data=examples.words,
        base_loss=outcome.base.mean,
        start_loss=start_loss,
        loss=outcome.held_out.mean,
        train_loss=polished.loss,
        readings=outcome.readings,
        start=outcome.start_name,
        holds=outcome.holds,
        returned=outcome.returned,
        settled=settled,
        steps=outcome.steps,
        seconds=time.monotonic() - began,
        peak_bytes=_peak_bytes(on),
        signs=signs,
        evidence=dict(zip(found, polished.costs + polished.told, strict=True)),
        alike=dict(zip(found, outcome.alike, strict=True)),
    )


def _opened(
    base: str | Path,
    adapter: str | Path,
    output: str | Path | None,
    force: bool,
    overwrite: bool,
    token: str | None,
) -> tuple[MergePlan, SubspaceAdapter]:
    """The plan, and the adapter if its signs are what is unknown of it."""
    if output is None and not Path(adapter).expanduser().is_dir():
        raise UsageError(
            f"{adapter}: not a folder here, so the record has no place; name one for a copy of the "
            "adapter with --output"
        )
    plan = open_plan(base, adapter, token=token)
    loaded = plan.adapter
    name = loaded.source.name
    if not isinstance(loaded, SubspaceAdapter):
        raise UnsupportedError(f"{name}: {loaded.method}: has no signs to recover")
    if loaded.bases:
        raise UnsupportedError(f"{name}: holds A and B itself, so its signs are known")
    if loaded.basis_options.solver == "lowrank":
        raise UnsupportedError(
            f"{name}: its basis came from a random projection (psoft_svd: lowrank), which no signs "
            "give back; only a record of kind 'full' made in training could"
        )
    if loaded.record is not None and not force:
        raise OutputError(
            f"{loaded.record.path}: there is a record already, perhaps of the training itself; "
            "--force searches all the same, and replaces it"
        )
    folder = loaded.source.folder
    if output is None:
        if not os.access(folder, os.W_OK):
            raise OutputError(f"{folder}: cannot be written; name a folder for a copy (--output)")
        return plan, loaded
    if Path(output).resolve() == folder.resolve():
        raise OutputError(f"{output}: is the adapter itself; leave --output away")
    check_target(Path(output).absolute(), overwrite=overwrite)
    check_apart(Path(output), plan)
    return plan, loaded


def _check_options(
    steps: int | None,
    time_limit: float | None,
    batch: int,
    readings: Sequence[str] | None,
    random_start: bool,
) -> None:
    if random_start and readings is not None:
        raise UsageError("readings and random-start: give one of them")
    if readings is not None and not readings:
        raise UsageError("readings: name one at least, or ask for a random start")
    if steps is not None and time_limit is not None:
        raise UsageError("steps and time: give one of them")
    if steps is not None and steps < LEAST_STEPS:
        raise UsageError(f"steps {steps}: at least {LEAST_STEPS} are needed")
    if time_limit is not None and not time_limit > 0:
        raise UsageError(f"time {time_limit:g}: a number of seconds above 0 is needed")
    if batch < 1:
        raise UsageError(f"batch {batch}: at least 1 is needed")


def _compute_dtype(device: torch.device, plan: MergePlan) -> torch.dtype:
    entry = plan.targets[0].entry
    assert entry is not None
    is_narrow = device.type == "cuda" and TORCH_DTYPES[entry.dtype] == torch.bfloat16
    return torch.bfloat16 if is_narrow else torch.float32


def _task_loss(
    loader: UnmergedLoader,
    adapter: SubspaceAdapter,
    found: Mapping[str, KnownModule],
    examples: Examples,
    dtype: torch.dtype,
    device: torch.device,
) -> TaskLoss:
    """What the data lose at given signs, with the base in a dtype on a device."""
    skeleton = loader.skeleton
    loss = TaskLoss(
        loader.load({}, dtype, device, attention=None).model,
        examples.task,
        RelaxedSigns([adapter.rotations[module] for module in found], device),
        {skeleton.module_path(module): known.basis for module, known in found.items()},
        adapter.basis_options.scaling,
        pad=pad_token(skeleton.config),
        rows=ROWS,
    )
    loss.scale_to(examples.train)
    return loss


def _state_file(
    cache: BasisCache | None,
    adapter: SubspaceAdapter,
    found: Mapping[str, KnownModule],
    options: Sequence[object],
) -> StateFile | None:
    """Where the search of these arguments is kept."""
    if cache is None:
        return None
    said = [
        importlib.metadata.version("psoft-export"),
        [_sign_bits(known.basis) for known in found.values()],
        sorted(adapter.sha256.items()),
        [sorted(known.signs) for known in found.values()],
        list(options),
    ]
    key = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()
    return StateFile(cache.searches, key)


def _sign_bits(basis: Basis) -> str:
    """What tells two bases apart that differ in signs."""
    return hashlib.sha256((basis.a > 0).numpy().tobytes()).hexdigest()


def _signs(
    adapter: SubspaceAdapter, found: Mapping[str, KnownModule], signs: Tensor
) -> dict[str, SignRecord]:
    """The signs found, as a record holds them."""
    return {
        module: record_signs(
            Basis(known.basis.a * sign[:, None], known.basis.b * sign),
            adapter.basis_options,
            known.next_value,
        )
        for (module, known), sign in zip(found.items(), signs, strict=True)
    }


def _write(
    plan: MergePlan,
    adapter: SubspaceAdapter,
    found: Mapping[str, KnownModule],
    signs: Mapping[str, SignRecord],
    mark: Recovery,
    device: torch.device,
    output: str | Path | None,
    overwrite: bool,
) -> Path:
    """Write the record into the adapter's folder, or into a copy of it."""
    options = adapter.basis_options
    layers = [(module, known.origin, signs[module]) for module, known in found.items()]

    def write(folder: Path) -> Path:
        svd = SvdDescription.of(options, device, torch.float32)
        shapes = {module: known.origin.shape for module, known in found.items()}
        return write_record(folder, "signs", options.rank, svd, shapes, layers, mark)

    source = adapter.source.folder
    if output is None:
        return write(source)
    target = Path(output)
    files = beside_record(source)
    room = sum(path.stat().st_size for path in files) + companions.ROOM_BYTES
    with OutputFolder(target, overwrite=overwrite, needed_bytes=room) as folder:
        for path in files:
            shutil.copyfile(path, folder.path / path.name)
        write(folder.path)
        folder.commit()
    return target / FILENAME


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
