"""Adapters as LoRA. PSOFT's ΔW = scaling · B (R − I) A is a LoRA pair already, exactly.

No ΔW is formed and none decomposed, but where the method's ΔW has full rank and an approximation
is asked for. Names and config are those of PEFT's LoRA, which vLLM,
SGLang and llama.cpp's converter read (`docs/lora.md`).
"""

import hashlib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from psoft_export.adapters.adapter import Adapter, NeumannTerms, SubspaceAdapter
from psoft_export.adapters.files import CONFIG, PREFIX, SAFETENSORS, listed_targets, saved_tensors
from psoft_export.algebra.low_rank import (
    needed_rank,
    product_difference,
    product_norm,
    spectral_factors,
)
from psoft_export.algebra.parameters import GivensForm
from psoft_export.algebra.rounding import all_finite, round_to_nearest
from psoft_export.bases import BasisFinder
from psoft_export.basis.solver import leading_triplets
from psoft_export.cache import open_cache
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.dtypes import CODES, TORCH_DTYPES, parse_dtype
from psoft_export.checkpoint.output import OutputFolder, check_target
from psoft_export.checkpoint.reader import raw
from psoft_export.checkpoint.safetensors_file import read_header, read_tensor
from psoft_export.checkpoint.writer import ShardWriter, TensorSpec, aligned_order
from psoft_export.combining import Combination, plan_merge
from psoft_export.device import choose_device
from psoft_export.errors import NonFiniteError, OutputError, UnsupportedError, UsageError
from psoft_export.manifest import FILENAME, LoraModule
from psoft_export.merging import companion_hashes, describe_run
from psoft_export.opening import check_apart
from psoft_export.pipeline import Progress, ProgressCallback, Target, TargetPipeline
from psoft_export.plan import MergePlan, PlannedTensor
from psoft_export.planner import Planner
from psoft_export.weights import BaseReader

_SPOOL = "unreduced.safetensors"  # in the scratch folder, while ranks are not known yet
_SERVED_RANK = 512  # the largest that vLLM takes


@dataclass(frozen=True)
class LoraReport:
    """The outcome of a conversion.

    Attributes:
        output: the folder written.
        rank: r of the LoRA adapter, the same for every module.
        modules: what was done to each module, in the order of the base.
        manifest: all that `psoft_export.json` says.
    """

    output: Path
    rank: int
    modules: tuple[LoraModule, ...]
    manifest: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON-ready object."""
        return {"output": str(self.output), "rank": self.rank, **self.manifest}


def to_lora(
    base: str | Path,
    adapter: str | Path | Combination,
    output: str | Path,
    *,
    device: str = "auto",
    svd_device: str | None = None,
    require_record: bool = False,
    cache: bool = True,
    cache_dir: str | Path | None = None,
    dtype: str = "fp32",
    reduce_rank: float | None = None,
    approximate: int | None = None,
    neumann_terms: NeumannTerms | None = None,
    givens: GivensForm | None = None,
    overwrite: bool = False,
    token: str | None = None,
    progress: ProgressCallback | None = None,
    planner: Planner | None = None,
) -> LoraReport:
    """Write an adapter as a LoRA adapter that PEFT and LoRA servers load.

    Of a PSOFT adapter `lora_A` = A and `lora_B` = B (R − I), formed in float64 and rounded once,
    with `lora_alpha` = `psoft_alpha`; tensors of `modules_to_save` are carried over. A method
    whose ΔW has full rank (qGOFT, OFT, BOFT, HRA) has no LoRA; `approximate` gives the nearest
    one of a rank, and the report says how near.

    Args:
        base: folder or Hub id of the base that the adapter was trained on.
        adapter: folder or Hub id of the adapter, or a combination of several.
        output: folder to write.
        device: `auto` (CUDA when there is one), `cpu`, `cuda` or `cuda:N`.
        svd_device: as for `merge`.
        require_record: refuse an adapter without a basis record.
        cache: keep bases on disk, and take them from there.
        cache_dir: folder of that cache.
        dtype: `fp32`, `fp16` or `bf16`, of `lora_A` and `lora_B`.
        reduce_rank: the largest ‖error‖ / ‖ΔW‖ (Frobenius) that a module may have for a smaller
            rank; every module gets the rank that the most demanding one needs. Below 1.
        approximate: for a ΔW of full rank: the rank of the nearest LoRA, by an SVD of ΔW.
        neumann_terms: as of `load_adapter`.
        givens: as of `load_adapter`.
        overwrite: replace a non-empty output folder.
        token: a Hub token.
        progress: called after each module.
        planner: as for `merge`.

    Raises:
        UsageError: `reduce_rank` or another option cannot be used.
        UnsupportedError: the adapter is a LoRA already, or ΔW has full rank and `approximate` is
            not given.
        NonFiniteError: an entry does not fit `dtype`.
        PsoftExportError: as `merge`.

    Example:
        >>> report = psoft_export.to_lora("base", "adapter", "lora", dtype="bf16")
        >>> max(module.relative_error for module in report.modules)
    """
    if reduce_rank is not None and not 0 <= reduce_rank < 1:
        raise UsageError(f"reduce-rank {reduce_rank}: a relative error from 0 to below 1 is needed")
    code = parse_dtype(dtype)
    on = choose_device(device)
    trained_on = choose_device(svd_device) if svd_device is not None else None
    store = open_cache(cache_dir) if cache else None
    target = Path(output)
    check_target(target.absolute(), overwrite=overwrite)
    plan = plan_merge(
        base,
        adapter,
        device=device,
        svd_device=svd_device,
        cache=cache,
        cache_dir=cache_dir,
        require_record=require_record,
        neumann_terms=neumann_terms,
        givens=givens,
        token=token,
        planner=planner,
    )
    rank = _converted_rank(plan, approximate, reduce_rank)
    check_apart(target, plan)
    bases = BasisFinder(plan.adapter, device=on, svd_device=trained_on, cache=store)
    conversion = _Conversion(plan, bases, on, TORCH_DTYPES[code], rank, reduce_rank, progress)
    files = companions.brought(plan.adapter.source.folder)
    hashes = companion_hashes(plan, files)
    room = companions.ROOM_BYTES + conversion.needed_bytes()
    with OutputFolder(target, overwrite=overwrite, needed_bytes=room) as folder:
        companions.write_companions(files, folder.path)
        rank = conversion.write(folder.path)
        loaded: Adapter = plan.adapter
        alpha: float = rank
        if isinstance(loaded, SubspaceAdapter) and reduce_rank is None:
            alpha = loaded.alpha
        config = _config(plan, rank, alpha)
        companions.write_json(folder.path / CONFIG, config)
        options = {"dtype": code, "reduce_rank": reduce_rank, "approximate": approximate}
        content = describe_run(
            plan,
            bases,
            torch.float64,
            conversion.sha256,
            hashes,
            options,
            conversion.modules,
            files={SAFETENSORS: conversion.written},
            warnings=_serving_warnings(plan.adapter, rank),
        )
        companions.write_json(folder.path / FILENAME, content)
        folder.commit()
    return LoraReport(target, rank, tuple(conversion.modules), content)


def _converted_rank(plan: MergePlan, approximate: int | None, reduce_rank: float | None) -> int:
    """The rank to convert with, before any reduction.

    Raises:
        UnsupportedError: the adapter is a LoRA, or has none and no approximation is asked for.
        UsageError: the options do not go together.
    """
    adapter = plan.adapter
    if isinstance(adapter, SubspaceAdapter):
        if approximate is not None:
            raise UsageError("approximate: this adapter is a LoRA pair exactly; leave it away")
        return adapter.rank
    if adapter.is_lora:
        raise UnsupportedError(f"{adapter.source.name}: is a LoRA adapter already")
    if approximate is None:
        raise UnsupportedError(
            f"{adapter.source.name}: {adapter.method}: its ΔW has full rank, so no LoRA is equal "
            "to it; merge it, or take the nearest LoRA of a rank r with --approximate r (the error "
            "is reported)"
        )
    if reduce_rank is not None:
        raise UsageError("reduce-rank: not with approximate, which chooses the rank")
    largest = min(min(target.spec.shape) for target in plan.targets)
    if not 1 <= approximate <= largest:
        raise UsageError(f"approximate {approximate}: a rank from 1 to {largest} is needed")
    return approximate


class _Conversion:
    """One conversion: the factors of every module, streamed into one file.

    Attributes:
        modules: what was done to each module, in the order of the base.
        sha256: SHA-256 of each weight file of the base, by name.
        written: SHA-256 of `adapter_model.safetensors`.
    """

    def __init__(
        self,
        plan: MergePlan,
        bases: BasisFinder,
        device: torch.device,
        dtype: torch.dtype,
        rank: int,
        tolerance: float | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.modules: list[LoraModule] = []
        self.sha256: dict[str, str] = {}
        self.written = ""
        self._plan = plan
        self._bases = bases
        self._device = device
        self._dtype = dtype
        self._rank = rank
        self._tolerance = tolerance
        adapter = plan.adapter
        self._scaling = (
            adapter.basis_options.scaling if isinstance(adapter, SubspaceAdapter) else 1.0
        )
        self._progress = progress
        self._targets = plan.targets

    def needed_bytes(self) -> int:
        """Disk that the tensors take, at most."""
        spooled = 0 if self._tolerance is None else torch.float64.itemsize
        numbers = sum(self._rank * sum(target.spec.shape) for target in self._targets)
        saved = sum(tensor.nbytes for tensor in self._plan.adapter.saved.values())
        return numbers * (self._dtype.itemsize + spooled) + saved

    def write(self, folder: Path) -> int:
        """Write `adapter_model.safetensors`; returns its rank."""
        if self._tolerance is None:
            adapter = self._plan.adapter
            use = self._exact if isinstance(adapter, SubspaceAdapter) else self._approximated
            self._write_factors(folder, self._rank, self._pairs(use))
            return self._rank
        spool = folder / _SPOOL
        rank = self._spool(spool)
        self._write_factors(folder, rank, self._reduced(spool, rank))
        spool.unlink()
        return rank

    def _write_factors(
        self, folder: Path, rank: int, pairs: Generator[tuple[Tensor, Tensor]]
    ) -> None:
        saved = saved_tensors(self._plan.adapter.saved, self._plan.adapter.modules)
        specs = aligned_order(
            [
                *_factor_specs(self._targets, rank, CODES[self._dtype]),
                *(TensorSpec(n, CODES[t.dtype], tuple(t.shape)) for n, t in saved.items()),
            ]
        )
        factors = (factor for pair in pairs for factor in pair)
        digest = hashlib.sha256()
        writer = ShardWriter(folder / SAFETENSORS, specs, {"format": "pt"}, digest)
        try:
            with closing(pairs):
                for spec in specs:
                    writer.append(raw(saved[spec.name] if spec.name in saved else next(factors)))
                next(factors, None)  # to its end, where the base's files are hashed
            writer.close()
        finally:
            writer.abandon()
        self.written = digest.hexdigest()

    def _pairs(
        self, use: Callable[[Target], tuple[LoraModule, Tensor, Tensor]]
    ) -> Generator[tuple[Tensor, Tensor]]:
        """What `use` makes of each target: A-like and B-like factor; adds to `modules`."""
        largest = max(target.spec.nbytes for target in self._targets)
        pipeline = TargetPipeline(self._bases, self._device, use, largest)
        total = sum(target.spec.nbytes for target in self._targets)
        done = 0
        with BaseReader(self._plan, self._bases.cache) as reader:
            read = (Target(tensor, reader.target(tensor)) for tensor in self._targets)
            with closing(pipeline.run(read)) as finished:
                for target, made in finished:
                    assert made is not None
                    self.modules.append(made[0])
                    done += target.nbytes
                    if self._progress is not None:
                        count = len(self.modules)
                        name = target.tensor.spec.name
                        self._progress(Progress(done, total, count, len(self._targets), name))
                    yield made[1], made[2]
            self.sha256 = reader.sha256()

    def _factors(self, target: Target, scaling: float) -> tuple[Tensor, Tensor]:
        factors = target.change(self._plan.adapter).low_rank_factors(scaling)
        assert factors is not None
        return factors

    def _exact(self, target: Target) -> tuple[LoraModule, Tensor, Tensor]:
        """The report, lora_A and lora_B of one module."""
        left, right = self._factors(target, 1.0)
        rank = right.shape[0]
        a, b, error = self._rounded(target.tensor, left, right, rank)
        return self._report(target, rank, error), a, b

    def _approximated(self, target: Target) -> tuple[LoraModule, Tensor, Tensor]:
        """As `_exact`, of the nearest product of the rank asked for."""
        weight = target.weight.values.to(self._device)
        merge = target.change(self._plan.adapter).merging(weight)
        original = weight.double()
        delta = merge(original.clone(), slice(0, len(weight))).sub_(original)
        found = leading_triplets(delta, self._rank).triplets
        left, right = (found.left * found.values).double(), found.right.double()
        a, b, _ = self._rounded(target.tensor, left, right, self._rank)
        norm = float(torch.linalg.matrix_norm(delta))
        error = float(torch.linalg.matrix_norm(delta.sub_((b.double() @ a.double()).to(delta))))
        return self._report(target, self._rank, error / norm if norm else 0.0), a, b

    def _spectral(self, target: Target) -> tuple[LoraModule, Tensor, Tensor]:
        """As `_exact`, in float64 and in the order of the singular values of ΔW."""
        assert self._tolerance is not None
        left, right, values = spectral_factors(*self._factors(target, self._scaling))
        needed = needed_rank(values, self._tolerance)
        return self._report(target, needed, 0.0), right.cpu(), left.cpu()

    def _spool(self, path: Path) -> int:
        """Write all factors in float64; returns the rank that the modules need."""
        specs = _factor_specs(self._targets, self._rank, "F64")
        writer = ShardWriter(path, specs, {})
        try:
            with closing(self._pairs(self._spectral)) as pairs:
                for right, left in pairs:
                    writer.append(raw(right))
                    writer.append(raw(left))
            writer.close(durable=False)
        finally:
            writer.abandon()
        return max(module.needed_rank for module in self.modules)

    def _reduced(self, spool: Path, rank: int) -> Generator[tuple[Tensor, Tensor]]:
        """lora_A and lora_B of each module, cut to `rank`; completes `modules`."""
        entries, _ = read_header(spool, OutputError)
        by_name = {entry.name: entry for entry in entries}
        for index, target in enumerate(self._targets):
            names = _factor_names(target)
            right, left = (read_tensor(by_name[name], OutputError) for name in names)
            a, b, error = self._rounded(target, left, right, rank)
            self.modules[index] = replace(self.modules[index], relative_error=error)
            yield a, b

    def _rounded(
        self, tensor: PlannedTensor, left: Tensor, right: Tensor, rank: int
    ) -> tuple[Tensor, Tensor, float]:
        """lora_A and lora_B in the output dtype on the CPU, and ‖error‖ / ‖ΔW‖."""
        a = round_to_nearest(right[:rank].contiguous(), self._dtype)
        b = round_to_nearest(left[:, :rank].contiguous(), self._dtype)
        if not (all_finite(a) and all_finite(b)):
            raise NonFiniteError(
                f"result: the factors of '{tensor.spec.name}' do not fit "
                f"{CODES[self._dtype]} (an entry became infinite); write a wider dtype"
            )
        norm = product_norm(left, right)
        error = product_difference(left, right, b.double(), a.double())
        return a.cpu(), b.cpu(), error / norm if norm else 0.0

    def _report(self, target: Target, needed: int, error: float) -> LoraModule:
        assert target.basis is not None
        return LoraModule(
            module=target.module,
            tensor=target.tensor.spec.name,
            shape=target.tensor.weight_shape,
            rank=self._rank,
            needed_rank=needed,
            relative_error=error,
            basis_uncertainty=target.basis.uncertainty,
        )


def _factor_names(target: PlannedTensor) -> tuple[str, str]:
    """The names of lora_A and lora_B in PEFT's format."""
    return (
        f"{PREFIX}{target.module}.lora_A.weight",
        f"{PREFIX}{target.module}.lora_B.weight",
    )


def _factor_specs(targets: list[PlannedTensor], rank: int, code: str) -> list[TensorSpec]:
    specs = []
    for target in targets:
        rows, columns = target.weight_shape
        first, second = _factor_names(target)
        specs += [TensorSpec(first, code, (rank, columns)), TensorSpec(second, code, (rows, rank))]
    return specs


def _config(plan: MergePlan, rank: int, alpha: float) -> dict[str, Any]:
    """`adapter_config.json` of the LoRA adapter: what every loader asks for, and no more."""
    ours, base = plan.adapter.config, plan.base
    from_hub = base.commit is not None
    return {
        "peft_type": "LORA",
        "task_type": ours.get("task_type"),
        "auto_mapping": ours.get("auto_mapping"),
        "base_model_name_or_path": base.name if from_hub else ours.get("base_model_name_or_path"),
        "revision": base.commit if from_hub else ours.get("revision"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(target.transposed for target in plan.targets),
        "target_modules": listed_targets(ours, plan.adapter.modules),
        "modules_to_save": ours.get("modules_to_save"),
    }


def _serving_warnings(adapter: Adapter, rank: int) -> list[str]:
    warnings = []
    if adapter.saved:
        warnings.append(
            "the adapter replaces whole modules (modules_to_save); PEFT loads them, vLLM and "
            "llama.cpp do not: merge for those"
        )
    if rank > _SERVED_RANK:
        warnings.append(f"rank {rank} is above {_SERVED_RANK}, the largest that vLLM serves")
    return warnings
