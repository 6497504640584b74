"""Combining several adapters of one base into one PSOFT adapter, by r × r algebra."""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psoft_export.adapters import combination_file, psoft
from psoft_export.adapters.adapter import NeumannTerms, SubspaceAdapter
from psoft_export.adapters.basis_record import (
    BaseTensor,
    Kind,
    KindChoice,
    Recovery,
    SvdDescription,
    check_kind,
    write_record,
)
from psoft_export.adapters.files import CONFIG, SAFETENSORS, is_narrowed, write_tensors
from psoft_export.algebra.combination import METHODS, Method, NoMeanError, Settings
from psoft_export.algebra.factored_rotation import (
    Combined,
    FactoredRotation,
    combine_rotations,
)
from psoft_export.algebra.logarithm import NotARotationError
from psoft_export.algebra.parameters import GivensForm
from psoft_export.algebra.rotation import rotation_angles
from psoft_export.bases import BasisFinder
from psoft_export.basis.signs import ADVISED_LIMIT, SignRecord, proven_signs
from psoft_export.basis.solver import leading_triplets
from psoft_export.basis.svd import Basis, Triplets, basis_values, make_basis
from psoft_export.cache import BasisCache, open_cache
from psoft_export.changes.shared_subspace import Subspace
from psoft_export.changes.subspace import SubspaceRotation
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.output import OutputFolder, check_target
from psoft_export.checkpoint.source import Source
from psoft_export.device import choose_device
from psoft_export.errors import MismatchError, UnsupportedError, UsageError
from psoft_export.layouts import LayoutCache
from psoft_export.manifest import source_record
from psoft_export.opening import check_apart, open_plan
from psoft_export.pipeline import Progress, ProgressCallback
from psoft_export.plan import MergePlan, PlannedTensor
from psoft_export.planner import Planner
from psoft_export.weights import BaseReader, TargetWeight

_NOTED_OUTSIDE = 1e-3  # of ‖ΔW‖: said in a warning


@dataclass(frozen=True)
class Combination:
    """Several adapters of one base, and how they become one.

    Usable wherever one adapter is: as `adapter` of `merge`, `verify`, `to_lora`, `onnx.export`.

    Attributes:
        adapters: name of each task → folder or Hub id of its adapter. The order is that of
            `compose`, and of `slerp`.
        method: one of `psoft_export.METHODS` (docs/combining.md).
        weights: by name; 1 where there is none. The base has the rest, 1 − Σ weights.
        factor: common factor of `task-arithmetic`, `ties` and `dare-ties`; default 1.
        density: share of the entries that `ties` and the `dare` methods keep; default 0.5.
        seed: of what the `dare` methods drop; default 0.

    Raises:
        UsageError: a name, weight, method or option cannot be used.

    Example:
        >>> both = psoft_export.Combination({"math": "a1", "code": "a2"}, "lie", {"math": 0.6})
        >>> psoft_export.merge("base", both, "merged")
    """

    adapters: Mapping[str, str | Path]
    method: str = "lie"
    weights: Mapping[str, float] = field(default_factory=dict)
    factor: float | None = None
    density: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        method = chosen_method(self.method, len(self.adapters))
        for name in self.adapters:
            if not name or set(name) & set("=:/\\"):
                raise UsageError(f"adapter '{name}': is not a name (no =, :, / or \\)")
        for name, weight in self.weights.items():
            if name not in self.adapters:
                raise UsageError(
                    f"weight of '{name}': there is no such adapter, but {_listed(self.adapters)}"
                )
            check_weight(name, weight)
        self._check_options(method)

    @property
    def ordered_weights(self) -> list[float]:
        """The weight of each adapter, in their order."""
        return [float(self.weights.get(name, 1)) for name in self.adapters]

    @property
    def settings(self) -> Settings:
        """What the method asks for beside weights."""
        return Settings(**self._given)

    @property
    def title(self) -> str:
        """All of it in a few words."""
        pairs = zip(self.adapters, self.ordered_weights, strict=True)
        return f"{' + '.join(f'{name}:{weight:g}' for name, weight in pairs)}, {self.method}"

    @property
    def _given(self) -> dict[str, Any]:
        """The settings that were asked for, by name."""
        options = {"factor": self.factor, "density": self.density, "seed": self.seed}
        return {name: value for name, value in options.items() if value is not None}

    def _check_options(self, method: Method) -> None:
        for option, value in self._given.items():
            if option not in method.settings:
                users = [other.name for other in METHODS.values() if option in other.settings]
                raise UsageError(
                    f"{option} {value}: is for {', '.join(users)}; '{method.name}' takes none"
                )
        settings = self.settings
        if not math.isfinite(settings.factor):
            raise UsageError(f"factor {settings.factor}: a number is needed")
        if not 0 < settings.density <= 1:
            raise UsageError(f"density {settings.density}: above 0 and at most 1 is needed")


@dataclass(frozen=True)
class CombinedModule:
    """What combining did to one module.

    Attributes:
        module: module path, as the combination names it.
        tensor: name of the checkpoint tensor.
        shape: out × in.
        adapters: names of the adapters that change it.
        largest_angle: largest rotation angle of the result, in degrees.
        half_turns: in how many planes an angle was π, so that a direction had to be chosen.
        outside: the largest share of an adapter's ‖ΔW‖ that the common basis leaves out.
    """

    module: str
    tensor: str
    shape: tuple[int, int]
    adapters: tuple[str, ...]
    largest_angle: float
    half_turns: int
    outside: float


@dataclass(frozen=True)
class CombineReport:
    """The outcome of combining.

    Attributes:
        output: the folder written.
        method: what the adapter written is, in a line.
        kind: of its basis record, `signs` or `full`.
        modules: one entry a module, in the order of the base.
        manifest: all that `psoft_export.json` says.
        adapters: the folders that the adapters were read from, in their order.
    """

    output: Path
    method: str
    kind: Kind
    modules: tuple[CombinedModule, ...]
    manifest: Mapping[str, Any]
    adapters: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON-ready object."""
        return {"output": str(self.output), **self.manifest}


def chosen_method(name: str, adapters: int) -> Method:
    """The method of a name, for so many adapters.

    Raises:
        UsageError: there is none, or it takes another number of them.
    """
    if name not in METHODS:
        raise UsageError(f"method '{name}' is not one of {', '.join(METHODS)}")
    method = METHODS[name]
    if method.adapters is not None and adapters != method.adapters:
        raise UsageError(f"method '{name}': takes {method.adapters} adapters, not {adapters}")
    if not adapters:
        raise UsageError("no adapter is given")
    return method


def check_weight(name: str, weight: object) -> None:
    """Check that the weight of an adapter is a number.

    Raises:
        UsageError: it is not.
    """
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight):  # type: ignore[arg-type]
        raise UsageError(f"weight {weight!r} of adapter '{name}': is not a number")


def combine(
    base: str | Path,
    combination: Combination,
    output: str | Path,
    *,
    kind: KindChoice = "auto",
    device: str = "auto",
    svd_device: str | None = None,
    require_record: bool = False,
    neumann_terms: NeumannTerms | None = None,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: ProgressCallback | None = None,
) -> CombineReport:
    """Write the combination of several PSOFT adapters as one, in PEFT's format, with a record.

    All are brought into the basis of the one of the highest rank: signs, near-equal singular
    values, alpha and `ab_svd_init` may differ, lower ranks embed, and a module that an adapter
    leaves alone counts as R = I. The adapter written keeps Cayley's form (and scaling vectors)
    where the method gives a rotation of every module, and is a free R (`psoft_orth: false`)
    elsewhere. The same input gives the same bytes on the same machine.

    Args:
        base: folder or Hub id of the base of all.
        combination: the adapters and how they become one.
        output: folder to write.
        kind: of the record: `signs`, `full`, or `auto`: signs, unless an adapter's own record is
            full or near-equal singular values leave more than 1 % of ΔW open.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        svd_device: of adapters without a record: as for `merge`.
        require_record: refuse an adapter without a basis record.
        neumann_terms: of checkpoints of the paper's code, as of `load_adapter`.
        cache: keep bases on disk, and take them from there.
        cache_dir: folder of that cache.
        overwrite: replace a non-empty output folder.
        token: a Hub token.
        progress: called after each module.

    Raises:
        MismatchError: the adapters are of different bases or model classes, or a basis is not
            one of the same subspace.
        UnsupportedError: an adapter is not PSOFT, a rotation has no logarithm that the method
            needs, or two adapters replace the same tensor by different ones.
        UsageError: the weights have no mean by this method.
        PsoftExportError: as `merge`.

    Example:
        >>> both = psoft_export.Combination({"math": "a1", "code": "a2"}, "lie")
        >>> psoft_export.combine("base", both, "math-and-code").method
    """
    check_kind(kind)
    on = choose_device(device)
    trained_on = choose_device(svd_device) if svd_device is not None else None
    store = open_cache(cache_dir) if cache else None
    target = Path(output)
    check_target(target.absolute(), overwrite=overwrite)
    members = []
    for name, reference in combination.adapters.items():
        plan = open_plan(
            base,
            reference,
            require_record=require_record,
            neumann_terms=neumann_terms,
            token=token,
        )
        check_apart(target, plan)
        members.append(_Member.of(name, plan, on, trained_on, store))
    combiner = _Combiner(combination, members, on, progress)
    room = companions.ROOM_BYTES + combiner.largest_bytes()
    with OutputFolder(target, overwrite=overwrite, needed_bytes=room) as folder:
        return combiner.write(folder, target, kind)


def plan_merge(
    base: str | Path,
    adapter: str | Path | Combination,
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
    token: str | None = None,
    planner: Planner | None = None,
) -> MergePlan:
    """What `merge` would do with these arguments.

    Reads headers and the adapter, no weights. A combination is made first, in a temporary folder
    that goes with the last reference to the plan; that reads the weights, and is what `device`
    and `svd_device` are for. With `cache` the layout is taken from the cache, or kept there.
    Arguments and errors as of `merge`.
    """
    layouts = LayoutCache(open_cache(cache_dir).folder) if cache else None
    one: str | Path | Source
    if isinstance(adapter, Combination):
        if givens is not None:
            raise UsageError(f"givens {givens}: is for qGOFT, which cannot be combined")
        scratch = tempfile.TemporaryDirectory(prefix="psoft-export-")
        report = combine(
            base,
            adapter,
            Path(scratch.name) / "combination",
            device=device,
            svd_device=svd_device,
            require_record=require_record,
            neumann_terms=neumann_terms,
            cache=cache,
            cache_dir=cache_dir,
            token=token,
        )
        one = Source(report.output, adapter.title, scratch=scratch, made_from=report.adapters)
        neumann_terms = None  # which the combination has taken in
    else:
        one = adapter
    return open_plan(
        base,
        one,
        require_record=require_record,
        dtype=dtype,
        max_shard_size=max_shard_size,
        labels=labels,
        neumann_terms=neumann_terms,
        givens=givens,
        token=token,
        planner=planner,
        layouts=layouts,
    )


@dataclass(frozen=True)
class _Member:
    """One adapter of a combination.

    Attributes:
        name: of its task.
        plan: the merge that it would be.
        adapter: the adapter.
        bases: finds its bases.
        tensors: checkpoint tensor → what it would do to it.
    """

    name: str
    plan: MergePlan
    adapter: SubspaceAdapter
    bases: BasisFinder
    tensors: Mapping[str, PlannedTensor]

    @classmethod
    def of(
        cls,
        name: str,
        plan: MergePlan,
        device: torch.device,
        svd_device: torch.device | None,
        cache: BasisCache | None,
    ) -> "_Member":
        adapter = plan.adapter
        if not isinstance(adapter, SubspaceAdapter):
            raise UnsupportedError(
                f"adapter '{name}': {adapter.method}: it rotates no principal subspace, so it "
                "cannot be combined with others here"
            )
        if (conv1d := next((t.module for t in plan.targets if t.transposed), None)) is not None:
            raise UnsupportedError(
                f"adapter '{name}': module '{conv1d}' is a Conv1D, which PEFT's PSOFT does not "
                "adapt; merge the adapter on its own"
            )
        bases = BasisFinder(adapter, device=device, svd_device=svd_device, cache=cache)
        return cls(name, plan, adapter, bases, {t.spec.name: t for t in plan.targets})

    def trained_with(self, weight: TargetWeight, tensor: PlannedTensor) -> bool:
        """Whether a weight that was read for another adapter is the one of this adapter's basis."""
        assert tensor.entry is not None and tensor.module is not None
        record = self.adapter.record
        if record is not None:
            return record.base[tensor.module] == weight.trained
        return weight.trained.dtype == tensor.entry.dtype


class _Combiner:
    """One combination: every module's rotation and basis, in the order of the base."""

    def __init__(
        self,
        combination: Combination,
        members: Sequence[_Member],
        device: torch.device,
        progress: ProgressCallback | None,
    ) -> None:
        self._combination = combination
        self._method = METHODS[combination.method]
        self._members = members
        self._device = device
        self._progress = progress
        self._check_class()
        self._check_records()
        self._saved = self._saved_tensors()
        self._brought = self._brought_files()
        # The basis of the result is that of the first adapter of the highest rank.
        self._leading = max(members, key=lambda member: member.adapter.rank)
        self._options = self._leading.adapter.basis_options
        self._planned: dict[str, PlannedTensor] = {}
        for member in members:
            self._planned = {**member.tensors, **self._planned}
        order = [t.spec.name for t in members[0].plan.targets]
        self._names = order + [name for name in self._planned if name not in order]
        self._weights: dict[str, str] = {}
        self._reset()

    def largest_bytes(self) -> int:
        """Disk that the combination takes, at most."""
        rank = self._options.rank
        numbers = sum(rank * (rank + sum(t.weight_shape)) for t in self._planned.values())
        return 4 * numbers + sum(t.nbytes for t in self._saved.values())

    def write(self, folder: OutputFolder, target: Path, kind: KindChoice) -> CombineReport:
        """Fill and commit the folder."""
        chosen = self._write_record(folder.path, kind)
        adapter = self._combined_adapter()
        config, tensors = psoft.as_psoft(adapter)
        companions.write_companions(self._brought, folder.path)
        companions.write_json(folder.path / CONFIG, config)
        write_tensors(folder.path / SAFETENSORS, tensors)
        content = self._manifest(adapter.method)
        companions.write_json(folder.path / combination_file.FILENAME, content)
        folder.commit()
        read = tuple(member.adapter.source.folder for member in self._members)
        return CombineReport(target, adapter.method, chosen, tuple(self._modules), content, read)

    def _write_record(self, folder: Path, kind: KindChoice) -> Kind:
        """Write the record, which computes all modules; a second time if signs say too little."""
        needs_full = any(
            m.adapter.basis_options.solver == "lowrank"
            or (m.adapter.record is not None and m.adapter.record.kind == "full")
            or m.adapter.bases
            for m in self._members
        )
        if needs_full and kind == "signs" and self._options.solver == "lowrank":
            raise UnsupportedError(
                f"adapter '{self._leading.name}': psoft_svd is 'lowrank', so no solver finds its "
                "basis again from signs; use kind 'full'"
            )
        if kind == "full" or (kind == "auto" and needs_full):
            self._record(folder, "full")
            return "full"
        self._record(folder, "signs")
        if kind == "auto" and self._left_open > ADVISED_LIMIT:
            self._reset()
            self._record(folder, "full")
            return "full"
        return "signs"

    def _record(self, folder: Path, kind: Kind) -> None:
        record = self._leading.adapter.record
        options = self._options
        if record is not None:
            svd = record.svd
        else:
            svd = SvdDescription.of(options, self._device, self._leading.adapter.held_dtype)
        shapes = {self._module(name): self._planned[name].weight_shape for name in self._names}
        write_record(folder, kind, options.rank, svd, shapes, self._layers(kind), self._recovered)

    @property
    def _recovered(self) -> Recovery | None:
        """The mark of the adapters whose signs were recovered from data, or None."""
        records = {member.name: member.adapter.record for member in self._members}
        marks = {name: r.recovered for name, r in records.items() if r is not None and r.recovered}
        if not marks:
            return None
        least = min(marks.values(), key=lambda mark: mark.settled)
        return replace(least, adapter=", ".join(marks))

    def _reset(self) -> None:
        self._rotations: dict[str, FactoredRotation] = {}
        self._modules: list[CombinedModule] = []
        self._left_open = 0.0

    def _layers(self, kind: Kind) -> Iterator[tuple[str, BaseTensor, SignRecord | Basis]]:
        """Module, weight, and signs or basis; fills `_rotations` and `_modules`."""
        total = sum(self._planned[name].spec.nbytes for name in self._names)
        done = 0
        with ExitStack() as opened:
            readers = {m.name: opened.enter_context(BaseReader(m.plan)) for m in self._members}
            for number, name in enumerate(self._names, 1):
                weight, basis = self._combined(name, readers)
                module = self._module(name)
                yield module, weight.trained, self._layer(kind, module, basis, weight)
                done += self._planned[name].spec.nbytes
                if self._progress is not None:
                    self._progress(Progress(done, total, number, len(self._names), name))
            self._weights = readers[self._members[0].name].sha256()

    def _layer(
        self, kind: Kind, module: str, basis: Basis, weight: TargetWeight
    ) -> SignRecord | Basis:
        if kind == "full":
            return basis
        solved = leading_triplets(weight.as_trained.to(self._device), self._options.rank)
        turn, next_value = self._rotations[module].matrix, solved.certificate.next_value
        signs = proven_signs(basis, self._options, solved.triplets, next_value, turn)
        self._left_open = max(self._left_open, signs.left_open(next_value, turn))
        return signs

    def _combined(self, name: str, readers: Mapping[str, BaseReader]) -> tuple[TargetWeight, Basis]:
        """Combine the rotations of one tensor; its weight, and the basis."""
        module, changing = self._module(name), [m for m in self._members if name in m.tensors]
        weight, changes = None, {}
        for member in changing:
            planned = member.tensors[name]
            assert planned.module is not None
            if weight is None or not member.trained_with(weight, planned):
                weight = readers[member.name].target(planned)
            found = member.bases.find(planned.module, weight.as_trained, weight.trained.sha256)
            assert found.basis is not None
            changes[member.name] = member.adapter.change(planned.module, found.basis)
        assert weight is not None
        largest = max(changing, key=lambda member: member.adapter.rank)
        basis = self._basis(changes[largest.name], weight)
        rotations, outside = self._in_one_basis(module, basis, changes)
        members = {m.name: turn for m, turn in zip(self._members, rotations, strict=True)}
        combined = combined_module(self._combination, module, members)
        self._rotations[module] = combined.rotation
        self._modules.append(
            CombinedModule(
                module,
                name,
                weight.trained.shape,
                tuple(member.name for member in changing),
                math.degrees(float(_angles(combined.rotation)[0])),
                combined.half_turns,
                outside,
            )
        )
        return weight, basis

    def _basis(self, change: SubspaceRotation, weight: TargetWeight) -> Basis:
        """The basis of an adapter in the form and rank of the result."""
        own, wanted = change.options, self._options
        if own == wanted:
            return change.basis
        rows = change.basis.a.double()
        norms = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        values = basis_values(change.basis, own)
        columns = change.basis.b.double()
        left = columns / columns.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        triplets = Triplets(left.float(), values.float(), (rows / norms).float())
        if own.rank < wanted.rank:
            # R is the identity in what is added, so any vectors would do.
            solved = leading_triplets(weight.as_trained.to(self._device), wanted.rank).triplets
            solved = solved.to(torch.float32)
            triplets = Triplets(
                torch.cat([triplets.left, solved.left[:, own.rank :]], dim=1),
                torch.cat([triplets.values, solved.values[own.rank :]]),
                torch.cat([triplets.right, solved.right[own.rank :]]),
            )
        return make_basis(triplets, wanted)

    def _in_one_basis(
        self, module: str, basis: Basis, changes: Mapping[str, SubspaceRotation]
    ) -> tuple[list[FactoredRotation], float]:
        """The rotation of each adapter in this basis, and the largest share left out."""
        subspace = Subspace.of(basis, self._options)
        rotations, outside = [], 0.0
        for member in self._members:
            change = changes.get(member.name)
            if change is None:
                rotations.append(FactoredRotation.identity(subspace.rank))
            elif change.basis is basis:
                rotations.append(FactoredRotation.of(change.parameters))
            else:
                own = Subspace.of(change.basis, change.options)
                where = f"adapter '{member.name}', module '{module}'"
                turn = FactoredRotation.of(change.parameters)
                found, share = subspace.rotation(own, turn, where)
                rotations.append(found)
                outside = max(outside, share)
        return rotations, outside

    def _combined_adapter(self) -> SubspaceAdapter:
        """The result as an adapter of PEFT's format."""
        free = not all(turn.has_generator for turn in self._rotations.values())
        vectors = any(turn.has_vectors for turn in self._rotations.values())
        first, leading = self._members[0], self._leading.adapter
        return SubspaceAdapter(
            source=leading.source,
            weights_file=SAFETENSORS,
            config={**first.adapter.config, **self._targets()},
            saved=self._saved,
            sha256={},
            basis_options=self._options,
            rotations={
                module: turn.parameters(free=free, vectors=vectors)
                for module, turn in self._rotations.items()
            },
            alpha=leading.alpha,
            method_options={},
        )

    def _targets(self) -> dict[str, Any]:
        """What the config says of modules: the adapters' own word where they agree."""
        configs = [member.adapter.config for member in self._members]
        lists: list[Any] = [config.get("target_modules") for config in configs]
        listed = all(isinstance(names, list) for names in lists)
        agree = listed and all(set(names) == set(lists[0]) for names in lists)
        if not agree or any(map(is_narrowed, configs)):
            lists = [list(self._rotations)]
        saved = {name for config in configs for name in config.get("modules_to_save") or ()}
        return {
            "target_modules": lists[0],
            "modules_to_save": sorted(saved) or None,
            "layers_to_transform": None,
            "exclude_modules": None,
            "layers_pattern": None,
        }

    def _manifest(self, method: str) -> dict[str, Any]:
        first = self._members[0].plan
        warnings = []
        for member in self._members:
            stated = dict.fromkeys(
                (*member.adapter.warnings, *member.plan.warnings, *member.bases.warnings)
            )
            warnings += [f"adapter '{member.name}': {text}" for text in stated]
        for module in self._modules:
            if module.half_turns:
                warnings.append(
                    f"module '{module.module}': turns {module.half_turns} plane(s) by π, where the "
                    "logarithm is not unique; one of the two directions was taken"
                )
            if module.outside > _NOTED_OUTSIDE:
                warnings.append(
                    f"module '{module.module}': the common basis leaves out {module.outside:.2%} "
                    "of an adapter's ΔW"
                )
        combination = self._combination
        return combination_file.content(
            base=source_record(first.base, self._weights),
            combination={
                "method": combination.method,
                **{name: getattr(combination.settings, name) for name in self._method.settings},
                "adapters": [
                    {
                        "name": member.name,
                        "weight": weight,
                        **source_record(member.adapter.source, member.adapter.sha256),
                    }
                    for member, weight in zip(
                        self._members, combination.ordered_weights, strict=True
                    )
                ],
            },
            method=method,
            modules=[asdict(m) | {"shape": list(m.shape)} for m in self._modules],
            warnings=warnings,
        )

    def _module(self, name: str) -> str:
        module = self._planned[name].module
        assert module is not None
        return module

    def _check_class(self) -> None:
        first = self._members[0]
        for member in self._members[1:]:
            ours, theirs = first.plan.layout.class_name, member.plan.layout.class_name
            if ours != theirs:
                raise MismatchError(
                    f"adapter '{member.name}': was trained on {theirs}, '{first.name}' on {ours}; "
                    "only adapters of one model class can be combined"
                )

    def _check_records(self) -> None:
        """Refuse records that speak of different weights."""
        recorded: dict[str, tuple[str, BaseTensor]] = {}
        for member in self._members:
            record = member.adapter.record
            if record is None:
                continue
            for name, tensor in member.tensors.items():
                assert tensor.module is not None
                origin = record.base[tensor.module]
                other, theirs = recorded.setdefault(name, (member.name, origin))
                if theirs.dtype == origin.dtype and theirs != origin:
                    raise MismatchError(
                        f"adapters '{other}' and '{member.name}': were recorded with different "
                        f"bases (the weight of '{tensor.module}' differs); only adapters of one "
                        "base can be combined"
                    )

    def _saved_tensors(self) -> dict[str, Tensor]:
        """Tensors that replace the base's; equal where several adapters have them."""
        saved: dict[str, Tensor] = {}
        owners: dict[str, str] = {}
        for member in self._members:
            for name, tensor in member.adapter.saved.items():
                owner = owners.setdefault(name, member.name)
                known = saved.setdefault(name, tensor)
                if known.dtype != tensor.dtype or not torch.equal(known, tensor):
                    raise UnsupportedError(
                        f"adapters '{owner}' and '{member.name}': each bring their own '{name}', "
                        "and there is no rotation between two heads; combine adapters of one head"
                    )
        return saved

    def _brought_files(self) -> dict[str, Path]:
        """Tokenizer and processor files; equal where several adapters bring them."""
        files: dict[str, Path] = {}
        owners: dict[str, str] = {}
        for member in self._members:
            for name, path in companions.brought(member.adapter.source.folder).items():
                owner = owners.setdefault(name, member.name)
                if files.setdefault(name, path).read_bytes() != path.read_bytes():
                    raise UnsupportedError(
                        f"adapters '{owner}' and '{member.name}': bring different {name}; keep "
                        "the one that the combination should have"
                    )
        return files


def combined_module(
    combination: Combination, module: str, members: Mapping[str, FactoredRotation]
) -> Combined:
    """The combination of the rotations of one module.

    Args:
        combination: how.
        module: of which the rotations are.
        members: of each adapter by name, in the order of the combination and one basis.

    Raises:
        UnsupportedError: a rotation has no logarithm that the method needs.
        UsageError: the weights have no mean by this method.
    """
    settings, names = combination.settings, list(members)
    random = [_generator(settings.seed, name, module) for name in names]
    method = METHODS[combination.method]
    try:
        return combine_rotations(
            method, list(members.values()), combination.ordered_weights, settings, random
        )
    except NotARotationError as cause:
        number, _, what = str(cause).partition(": ")
        whose = f"adapter '{names[int(number) - 1]}', " if what else ""
        raise UnsupportedError(
            f"{whose}module '{module}': R {what or cause}, so method '{method.name}' has no "
            "rotation to go along; use linear, or ties"
        ) from cause
    except NoMeanError as cause:
        raise UsageError(f"module '{module}': {cause}") from cause


def _angles(turn: FactoredRotation) -> Tensor:
    return rotation_angles(turn.parameters(free=not turn.has_generator, vectors=False))


def _generator(seed: int, task: str, module: str) -> torch.Generator:
    """Random numbers that depend on these alone, and on no order."""
    digest = hashlib.sha256(f"{seed}/{task}/{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(f"'{name}'" for name in names)
