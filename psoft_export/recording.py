"""Making, checking and converting basis records of adapters on disk."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from psoft_export.adapters import basis_record, psoft
from psoft_export.adapters.adapter import Adapter, NeumannTerms, SubspaceAdapter
from psoft_export.adapters.basis_record import (
    BaseTensor,
    Kind,
    KindChoice,
    Recovery,
    SvdDescription,
    beside_record,
    check_kind,
    write_record,
)
from psoft_export.adapters.files import CONFIG, SAFETENSORS, read_tensors, write_tensors
from psoft_export.algebra.parameters import RotationParameters
from psoft_export.algebra.rotation import conjugated, rotation
from psoft_export.bases import BasisFinder
from psoft_export.basis.signs import (
    ADVISED_LIMIT,
    SignRecord,
    proven_signs,
    relative_signs,
)
from psoft_export.basis.solver import leading_triplets
from psoft_export.basis.svd import Basis
from psoft_export.cache import BasisCache, open_cache
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.output import OutputFolder
from psoft_export.device import choose_device, device_name
from psoft_export.errors import OutputError, UnsupportedError, UsageError
from psoft_export.opening import needed_record, open_plan
from psoft_export.pipeline import Progress, ProgressCallback
from psoft_export.plan import MergePlan
from psoft_export.weights import BaseReader, TargetWeight

Form = Literal["signs", "full", "this-machine", "peft"]

_ALIGNED = 0.99  # |cosine| below which two vectors are not one vector up to its sign
_CONFIG_BYTES = 2**20


@dataclass(frozen=True)
class RecordedModule:
    """One module of a record.

    Attributes:
        module: module path, as the adapter names it.
        rank: r.
        uncertainty: what the record leaves open of ΔW relative to ‖ΔW‖ (see
            `basis.signs.delta_uncertainty`); 0 with a full basis; None where it is not known.
        held: number of vectors that the record holds themselves, because near-equal singular
            values make a sign too little.
        differing: of a check: how many vectors have the other sign in this machine's SVD.
        turned: of a check: how many vectors are not the recorded ones with either sign.
    """

    module: str
    rank: int
    uncertainty: float | None
    held: int
    differing: int | None = None
    turned: int | None = None


@dataclass(frozen=True)
class RecordReport:
    """What was recorded, or found in a check.

    Attributes:
        path: the record.
        kind: `signs` or `full`.
        modules: one entry a module, in the order of the base.
        warnings: what the user should know, one plain sentence each.
    """

    path: Path
    kind: Kind
    modules: tuple[RecordedModule, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON-ready object."""
        return asdict(self) | {"path": str(self.path)}


def record(
    base: str | Path,
    adapter: str | Path,
    *,
    kind: KindChoice = "auto",
    device: str = "auto",
    cache: bool = True,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> RecordReport:
    """Write the basis record of an adapter, by computing the training's SVD again.

    It records what this machine's SVD gives, so run it on the machine, device and thread count
    that trained; `record_basis` and `RecordBasisCallback` record in training itself.

    Args:
        base: folder or Hub id of the base.
        adapter: the adapter's folder; the record is written into it.
        kind: `signs`, `full`, or `auto`: signs, unless the adapter's basis came from a low-rank
            SVD or near-equal singular values leave more than 1 % of ΔW open.
        device: the device that training computed its SVD on.
        cache: take bases from the cache and keep them there.
        cache_dir: folder of that cache.
        overwrite: replace a record.
        token: a Hub token.
        progress: called after each module.

    Raises:
        OutputError: there is a record already, or the folder cannot be written.
        UnsupportedError: `signs` for an adapter that needs `full`, or a low-rank basis that was
            drawn without a seed.
        PsoftExportError: as `merge`, for base and adapter.
    """
    folder = _own_folder(adapter)
    plan = open_plan(base, folder, token=token)
    loaded = _recordable(plan.adapter)
    if loaded.record is not None and not overwrite:
        raise OutputError(
            f"{loaded.record.path}: there is a record already, perhaps of the training "
            "itself; compare with --check, or replace it with --overwrite"
        )
    loaded = replace(loaded, record=None)
    plan = replace(plan, adapter=loaded)
    if loaded.basis_options.solver == "lowrank" and "random_seed" not in loaded.config:
        raise UnsupportedError(
            f"{loaded.source.name}: its low-rank basis was drawn without a 'random_seed', so "
            "no machine finds it again; record it where it trains, with psoft_export.record_basis"
        )
    chosen = _checked_kind(kind, loaded)
    on = choose_device(device)
    store = open_cache(cache_dir) if cache else None
    svd = SvdDescription.of(loaded.basis_options, on, torch.float32)
    if chosen is None:
        signs = _Recorder(plan, "signs", on, store, progress)
        layers = list(signs.layers())
        worst = max((m.uncertainty or 0.0 for m in signs.modules), default=0.0)
        if worst <= ADVISED_LIMIT:
            path = _write(folder, plan, "signs", svd, iter(layers))
            return RecordReport(path, "signs", tuple(signs.modules), ())
        chosen = "full"
    recorder = _Recorder(plan, chosen, on, store, progress)
    path = _write(folder, plan, chosen, svd, recorder.layers())
    return RecordReport(path, chosen, tuple(recorder.modules), _advice(chosen, recorder.modules))


def check_record(
    base: str | Path,
    adapter: str | Path,
    *,
    device: str = "auto",
    cache: bool = True,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> RecordReport:
    """Compare a basis record with what this machine's SVD gives; writes nothing but the cache.

    Arguments and errors as of `record`.

    Raises:
        RecordMissingError: the adapter has no record.
        MismatchError: the record was made from another base.
    """
    plan = open_plan(base, adapter, token=token)
    loaded = _recordable(plan.adapter)
    recorded = needed_record(loaded)
    on = choose_device(device)
    store = open_cache(cache_dir) if cache else None
    ours = BasisFinder(loaded, device=on, cache=store)
    bare = replace(loaded, record=None)
    theirs = BasisFinder(bare, device=on, cache=store)
    modules = []
    for module, weight in _targets(plan, progress):
        trained = weight.as_trained
        known = ours.find(module, trained, weight.trained.sha256)
        here = theirs.find(module, trained, weight.trained.sha256)
        assert known.basis is not None and here.basis is not None
        signs, cosines = relative_signs(here.basis, known.basis)
        held = recorded.signs(module).cluster if recorded.kind == "signs" else torch.tensor([])
        turned = cosines < _ALIGNED
        modules.append(
            RecordedModule(
                module,
                recorded.rank,
                known.uncertainty,
                len(held),
                int(((signs < 0) & ~turned).sum()),
                int(turned.sum()),
            )
        )
    return RecordReport(recorded.path, recorded.kind, tuple(modules), ())


def convert(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    to: Form,
    neumann_terms: NeumannTerms | None = None,
    device: str = "auto",
    cache: bool = True,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> RecordReport:
    """Write a copy of a PSOFT adapter in another form that means the same weights.

    Args:
        base: folder or Hub id of the base.
        adapter: folder or Hub id of an adapter with a basis record; for `peft`, of a checkpoint of
            the paper's code.
        output: folder to write.
        to: `signs` or `full`: the kind of the record. `this-machine`: the adapter expressed in
            the basis that a plain PEFT load finds on this machine and device (entries of Q change
            sign), with the record to match; PEFT then computes the recorded model here, and only
            here. `peft`: a checkpoint of the paper's code in PEFT's format, with a full record of
            the A and B that it holds.
        neumann_terms: as of `load_adapter`.
        device: where to compute; for `this-machine`, where PEFT will load the adapter.
        cache: take bases from the cache and keep them there.
        cache_dir: folder of that cache.
        overwrite: replace a non-empty output folder.
        token: a Hub token.
        progress: called after each module.

    Raises:
        RecordMissingError: the adapter has no record.
        UnsupportedError: `signs` for an adapter that needs `full`, or `this-machine` where this
            machine's vectors are not the recorded ones up to sign; an adapter that is not PSOFT,
            or is in PEFT's format already.
        MismatchError: the record was made from another base.
        OutputError: the output cannot be written.
    """
    plan = open_plan(base, adapter, neumann_terms=neumann_terms, token=token)
    source, target = plan.adapter.source.folder, Path(output)
    if target.resolve() == source.resolve():
        raise OutputError(f"{target}: is the adapter itself; choose another output")
    if to == "peft":
        return _to_peft(plan, target, overwrite=overwrite, progress=progress)
    loaded = _recordable(plan.adapter)
    recorded = needed_record(loaded)
    kind: Kind = recorded.kind if to == "this-machine" else to
    _checked_kind(kind, loaded)
    on = choose_device(device)
    store = open_cache(cache_dir) if cache else None
    with OutputFolder(target, overwrite=overwrite, needed_bytes=_CONFIG_BYTES) as folder:
        for path in beside_record(source):
            shutil.copyfile(path, folder.path / path.name)
        converter = _Converter(plan, kind, on, store, progress, local=to == "this-machine")
        _write(folder.path, plan, kind, recorded.svd, converter.layers(), recorded.recovered)
        if to == "this-machine":
            _write_rotations(loaded, converter.rotations, folder.path)
        folder.commit()
    warnings = _advice(kind, converter.modules)
    if to == "this-machine":
        warnings = (
            "the adapter written means the recorded weights for a plain PEFT load on this machine, "
            f"device ({device_name(on)}) and thread count ({torch.get_num_threads()}) only; keep "
            "the recorded one for every other use",
        )
    path = target / basis_record.FILENAME
    return RecordReport(path, kind, tuple(converter.modules), warnings)


class _Recorder:
    """Makes the layers of a record from the SVD that training computed, done again."""

    def __init__(
        self,
        plan: MergePlan,
        kind: Kind,
        device: torch.device,
        cache: BasisCache | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.modules: list[RecordedModule] = []
        self._plan = plan
        self._adapter = _recordable(plan.adapter)
        self._kind = kind
        self._device = device
        self._finder = BasisFinder(self._adapter, device=device, cache=cache)
        self._progress = progress

    def layers(self) -> Iterator[tuple[str, BaseTensor, SignRecord | Basis]]:
        """Module, weight, and signs or basis; adds to `modules`."""
        for module, weight in _targets(self._plan, self._progress):
            layer = self._layer(module, weight)
            yield module, weight.trained, layer

    def _layer(self, module: str, weight: TargetWeight) -> SignRecord | Basis:
        found = self._finder.find(module, weight.as_trained, weight.trained.sha256)
        assert found.basis is not None
        return self._keep(module, found.basis, weight)

    def _keep(self, module: str, basis: Basis, weight: TargetWeight) -> SignRecord | Basis:
        """The layer of the wanted kind, and its entry in the report."""
        options = self._adapter.basis_options
        if self._kind == "full":
            self.modules.append(RecordedModule(module, options.rank, 0.0, options.rank))
            return basis
        solution = leading_triplets(weight.as_trained.to(self._device), options.rank)
        next_value = solution.certificate.next_value
        turn = rotation(self._adapter.rotations[module])
        signs = proven_signs(basis, options, solution.triplets, next_value, turn)
        left_open = signs.left_open(next_value, turn)
        self.modules.append(RecordedModule(module, options.rank, left_open, len(signs.cluster)))
        return signs


class _Converter(_Recorder):
    """Makes the layers of a record from another record."""

    def __init__(
        self,
        plan: MergePlan,
        kind: Kind,
        device: torch.device,
        cache: BasisCache | None,
        progress: ProgressCallback | None,
        *,
        local: bool,
    ) -> None:
        super().__init__(plan, kind, device, cache, progress)
        self.rotations: dict[str, RotationParameters] = {}
        bare = replace(self._adapter, record=None)
        self._local = BasisFinder(bare, device=device, cache=cache) if local else None

    def _layer(self, module: str, weight: TargetWeight) -> SignRecord | Basis:
        trained = weight.as_trained
        found = self._finder.find(module, trained, weight.trained.sha256)
        basis = found.basis
        assert basis is not None
        if self._local is not None:
            here = self._local.find(module, trained, weight.trained.sha256)
            assert here.basis is not None
            signs, cosines = relative_signs(here.basis, basis)
            if float(cosines.min()) < _ALIGNED:
                raise UnsupportedError(
                    f"module '{module}': {int((cosines < _ALIGNED).sum())} of its vectors are not "
                    "those recorded up to sign in this machine's SVD (near-equal singular values), "
                    "so no plain PEFT load can mean the same; load it with restore_basis instead"
                )
            self.rotations[module] = conjugated(self._adapter.rotations[module], signs)
            single = signs.to(basis.a.device, torch.float32)
            basis = Basis(basis.a * single[:, None], basis.b * single)
        return self._keep(module, basis, weight)


def _targets(
    plan: MergePlan, progress: ProgressCallback | None
) -> Iterator[tuple[str, TargetWeight]]:
    """Every module with its weight, one in memory at a time."""
    targets = plan.targets
    total = sum(t.spec.nbytes for t in targets)
    done = 0
    with BaseReader(plan) as reader:
        for number, tensor in enumerate(targets, 1):
            assert tensor.module is not None
            yield tensor.module, reader.target(tensor)
            done += tensor.spec.nbytes
            if progress is not None:
                progress(Progress(done, total, number, len(targets), tensor.spec.name))


def _write(
    folder: Path,
    plan: MergePlan,
    kind: Kind,
    svd: SvdDescription,
    layers: Iterator[tuple[str, BaseTensor, SignRecord | Basis]],
    recovered: Recovery | None = None,
) -> Path:
    shapes = {}
    for tensor in plan.targets:
        assert tensor.module is not None
        shapes[tensor.module] = tensor.weight_shape
    rank = plan.adapter.rank
    assert rank is not None
    return write_record(folder, kind, rank, svd, shapes, layers, recovered)


def _checked_kind(kind: KindChoice, adapter: SubspaceAdapter) -> Kind | None:
    """The kind to write; None where the singular values are to decide."""
    check_kind(kind)
    if adapter.basis_options.solver == "lowrank":
        if kind == "signs":
            raise UnsupportedError(
                f"{adapter.source.name}: psoft_svd is 'lowrank', so no solver finds its basis "
                "again from signs; record it with kind 'full'"
            )
        return "full"
    return None if kind == "auto" else kind


def _advice(kind: Kind, modules: list[RecordedModule]) -> tuple[str, ...]:
    open_ = [m for m in modules if kind == "signs" and (m.uncertainty or 0.0) > ADVISED_LIMIT]
    if not open_:
        return ()
    worst = max(open_, key=lambda module: module.uncertainty or 0.0)
    return (
        f"signs leave {worst.uncertainty:.1%} of ΔW open in '{worst.module}' ({len(open_)} modules "
        f"above {ADVISED_LIMIT:.0%}); kind 'full' leaves nothing open",
    )


def _recordable(adapter: Adapter) -> SubspaceAdapter:
    """The adapter, as one whose basis only a record can tell.

    Raises:
        UnsupportedError: it is not.
    """
    if not isinstance(adapter, SubspaceAdapter):
        raise UnsupportedError(
            f"{adapter.source.name}: {adapter.method}: it has no basis that could be recorded; "
            "merge it as it is"
        )
    if adapter.bases:
        raise UnsupportedError(
            f"{adapter.source.name}: its own file holds A and B, so there is nothing to record; "
            "'psoft-export convert --to peft' gives a PSOFT adapter in PEFT's format with a record"
        )
    return adapter


def _to_peft(
    plan: MergePlan, target: Path, *, overwrite: bool, progress: ProgressCallback | None
) -> RecordReport:
    """Write a checkpoint of the paper's code as a PSOFT adapter of PEFT with a full record."""
    adapter = plan.adapter
    if not isinstance(adapter, SubspaceAdapter) or not adapter.bases:
        raise UnsupportedError(
            f"{adapter.source.name}: {adapter.method}: convert --to peft is for checkpoints of the "
            "PSOFT paper's code"
        )
    if (conv1d := next((t.module for t in plan.targets if t.transposed), None)) is not None:
        raise UnsupportedError(
            f"module '{conv1d}' is a Conv1D, which PEFT's PSOFT does not adapt; merge it, or write "
            "it as a LoRA"
        )
    finder = BasisFinder(adapter, device=torch.device("cpu"))
    modules: list[RecordedModule] = []

    def layers() -> Iterator[tuple[str, BaseTensor, SignRecord | Basis]]:
        for module, weight in _targets(plan, progress):
            found = finder.find(module, weight.as_trained, weight.trained.sha256)
            assert found.basis is not None
            modules.append(RecordedModule(module, adapter.rank, 0.0, adapter.rank))
            yield module, weight.trained, found.basis

    files = companions.brought(adapter.source.folder)
    numbers = sum(sum(t.weight_shape) for t in plan.targets) * adapter.rank
    saved = sum(tensor.nbytes for tensor in adapter.saved.values())
    room = 4 * numbers + 4 * adapter.parameter_count + saved + companions.ROOM_BYTES
    options = adapter.basis_options
    svd = SvdDescription(
        solver=options.solver,
        device="not known",
        library="the PSOFT paper's code",
        dtype=str(adapter.held_dtype).removeprefix("torch."),
        scaling=options.scaling,
        initialisation=options.initialisation,
    )
    with OutputFolder(target, overwrite=overwrite, needed_bytes=room) as folder:
        companions.write_companions(files, folder.path)
        config, tensors = psoft.as_psoft(adapter)
        companions.write_json(folder.path / CONFIG, config)
        write_tensors(folder.path / SAFETENSORS, tensors)
        _write(folder.path, plan, "full", svd, layers())
        folder.commit()
    return RecordReport(target / basis_record.FILENAME, "full", tuple(modules), adapter.warnings)


def _own_folder(adapter: str | Path) -> Path:
    folder = Path(adapter).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"{adapter}: not a folder here; a record is written into the adapter's own folder, so "
            "download it first (hf download)"
        )
    return folder


def _write_rotations(
    adapter: Adapter, rotations: dict[str, RotationParameters], folder: Path
) -> None:
    """Write the adapter's tensors with other rotations, as safetensors."""
    tensors = read_tensors(adapter.source.folder / adapter.weights_file)
    for module, parameters in rotations.items():
        tensors[psoft.tensor_name(module, "weight")] = parameters.weight.contiguous()
    (folder / adapter.weights_file).unlink()
    write_tensors(folder / SAFETENSORS, tensors)
