"""The basis of a live PEFT model: recorded where it trains, restored where it is loaded.

PEFT is not imported: a PSOFT layer is a module that holds A and B of the adapter in
`_psoft_A_cache` and `_psoft_B_cache` (PEFT 0.21, `peft/tuners/psoft/layer.py`).
"""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from psoft_export.adapters.basis_record import (
    FILENAME,
    BaseTensor,
    BasisRecord,
    Kind,
    KindChoice,
    SvdDescription,
    check_fits,
    check_kind,
    read_record,
    write_record,
)
from psoft_export.basis.signs import (
    ADVISED_LIMIT,
    SignRecord,
    proven_signs,
)
from psoft_export.basis.solver import Solution, leading_triplets
from psoft_export.basis.svd import Basis, BasisOptions
from psoft_export.checkpoint.dtypes import CODES, TORCH_DTYPES, WEIGHT_CODES
from psoft_export.checkpoint.output import replacing_file
from psoft_export.checkpoint.reader import tensor_sha256
from psoft_export.errors import (
    MismatchError,
    OutputError,
    RecordError,
    RecordMissingError,
    UnsupportedError,
    UsageError,
)

_Result = TypeVar("_Result")

_PREFIX = "base_model.model."
_DEFAULT = "default"
# How far W v = σ u may be missed, relative to σ₁: a float32 SVD on a CPU leaves 1e-6, the one on a
# GPU up to 2.3e-3 (`docs/basis.md`), bfloat16 copies of A, B and W together about 2e-3.
_BELONGS = 1e-3
_BELONGS_COARSELY = 1e-2


@dataclass(frozen=True)
class _Layer:
    """One PSOFT layer of a live model.

    Attributes:
        path: module path, as the adapter's keys name it.
        weight: W, out × in, as the model holds it.
        a: A, r × in: the model's own buffer.
        b: B, out × r: the model's own buffer.
        rotation: PEFT's module of R.
        options: what the basis depends on.
    """

    path: str
    weight: Tensor
    a: Tensor
    b: Tensor
    rotation: Any
    options: BasisOptions

    def basis(self) -> Basis:
        """A and B in float32."""
        return Basis(self.a.detach().float(), self.b.detach().float())


def record_basis(
    peft_model: nn.Module,
    folder: str | Path,
    adapter_name: str = _DEFAULT,
    *,
    kind: KindChoice = "auto",
) -> Path:
    """Write `psoft_basis.safetensors` from the very A and B that a PEFT model trains with.

    Changes nothing in the model and draws nothing from its random generators. Where the adapter
    was merged and unmerged again before, the base weights are no longer bit for bit those of the
    checkpoint, and the record will not fit that one.

    Args:
        peft_model: the `PeftModel`, in the process that trained it.
        folder: where `save_pretrained` puts the adapters; one that is not `default` gets its
            record in its own folder inside, as PEFT does, where that exists.
        adapter_name: the adapter, by PEFT's name.
        kind: `signs` (small), `full` (A and B themselves), or `auto`: `signs` wherever they
            give ΔW back to `ADVISED_LIMIT`.

    Returns:
        The file written.

    Raises:
        UsageError: not a PeftModel, no such adapter, or it is merged.
        UnsupportedError: `signs` where they do not determine the basis; sharded or quantized
            weights; layers with different options.
        MismatchError: a base weight has changed since the adapter was added.
        OutputError: the folder cannot be written.

    Example:
        >>> model.save_pretrained("adapter")
        >>> psoft_export.record_basis(model, "adapter")
    """
    return _record(peft_model, _adapter_folder(folder, adapter_name), adapter_name, kind)


def restore_basis(peft_model: nn.Module, folder: str | Path, adapter_name: str = _DEFAULT) -> None:
    """Put the recorded A and B into a PEFT model that loaded the adapter.

    From then on PEFT computes the adapter that was trained, whatever the SVD on this machine
    gave. All layers are changed, or none.

    Args:
        peft_model: the `PeftModel`, from `PeftModel.from_pretrained(base, folder)`. Its base may
            be in another dtype than in training, as long as that one holds the same numbers.
        folder: as for `record_basis`.
        adapter_name: the adapter, by PEFT's name in this model.

    Raises:
        RecordMissingError: the adapter has no record.
        RecordError: the record is damaged, or is one of another adapter.
        MismatchError: a base weight is not the one that was recorded.
        UsageError: not a PeftModel, no such adapter, or it is merged.
        UnsupportedError: sharded or quantized weights; layers with different options.

    Example:
        >>> model = PeftModel.from_pretrained(base, "adapter")
        >>> psoft_export.restore_basis(model, "adapter")
    """
    where = _adapter_folder(folder, adapter_name)
    record = read_record(where)
    if record is None:
        raise RecordMissingError(
            f"{where}: no {FILENAME} there; write one with record_basis where the adapter trained"
        )
    layers = _live_layers(peft_model, adapter_name)
    paths = [layer.path for layer in layers]
    check_fits(record, paths, _common_options(layers))
    if absent := sorted(set(record.base) - set(paths)):
        raise RecordError(
            f"{record.path}: holds module '{absent[0]}' ({len(absent)} such), which the model "
            f"does not adapt in '{adapter_name}'; it belongs to another adapter"
        )
    _check_base(record, layers)
    # Held on the CPU until the last is known to be good, so that no device needs room for both.
    found = []
    for layer in layers:
        basis = _recorded_basis(record, layer)
        found.append((basis.a.to("cpu", layer.a.dtype), basis.b.to("cpu", layer.b.dtype)))
    with torch.no_grad():
        for layer, (a, b) in zip(layers, found, strict=True):
            layer.a.copy_(a)
            layer.b.copy_(b)


class RecordBasisCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Writes the basis record into every checkpoint of a Trainer, and into its output folder.

    The basis is constant during training: it is recorded at the first save, into
    `args.output_dir`, and copied into the checkpoints from there. Every active PSOFT adapter is
    recorded, by world process zero. Before a run is resumed on another machine, the basis is to
    be put back with `restore_basis(model, checkpoint)`.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[psoft_export.RecordBasisCallback()])
    """

    def __init__(self, kind: KindChoice = "auto") -> None:
        """Prepare for one training run at a time.

        Args:
            kind: as for `record_basis`.

        Raises:
            UsageError: an unknown kind.
        """
        check_kind(kind)
        self._kind: KindChoice = kind
        self._written: dict[str, Path] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse at once what could not be recorded at the first save."""
        self._written.clear()
        if state.is_world_process_zero:
            model = _unwrapped(kwargs["model"])
            for name in _active_adapters(model):
                _choose_kind(_live_layers(model, name), self._kind)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the record beside the adapter in the checkpoint just written."""
        if not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        for name, path in self._records(args, kwargs["model"]).items():
            target = _own_folder(checkpoint, name)
            _make(target)
            with replacing_file(target / FILENAME) as scratch:
                shutil.copyfile(path, scratch)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the record where `trainer.save_model()` puts the adapter."""
        if state.is_world_process_zero:
            self._records(args, kwargs["model"])

    def _records(self, args: Any, wrapped: nn.Module) -> dict[str, Path]:
        """Adapter name → its record in the output folder, written now if it is not there."""
        model = _unwrapped(wrapped)
        names = _active_adapters(model)
        for name in names:
            if name not in self._written or not self._written[name].exists():
                folder = _own_folder(Path(args.output_dir), name)
                self._written[name] = _record(model, folder, name, self._kind)
        return {name: self._written[name] for name in names}


def _record(model: nn.Module, folder: Path, adapter_name: str, kind: KindChoice) -> Path:
    check_kind(kind)
    layers = _live_layers(model, adapter_name)
    chosen = _choose_kind(layers, kind)
    for layer in layers:
        _with_room(_check_own_basis, layer)
    signs = None
    if chosen != "full":
        signs = _all_signs(layers, math.inf if chosen == "signs" else ADVISED_LIMIT)
    options, first = layers[0].options, layers[0]
    svd = SvdDescription.of(options, first.weight.device, first.a.dtype)
    shapes = {layer.path: _shape(layer.weight) for layer in layers}
    _make(folder)
    written: Kind = "full" if signs is None else "signs"
    return write_record(folder, written, options.rank, svd, shapes, _parts(layers, signs))


def _parts(
    layers: Sequence[_Layer], signs: Sequence[SignRecord] | None
) -> Iterator[tuple[str, BaseTensor, SignRecord | Basis]]:
    """What `write_record` takes; a full basis is copied only when its turn comes."""
    for index, layer in enumerate(layers):
        weight = layer.weight.detach()
        origin = BaseTensor(CODES[weight.dtype], _shape(weight), tensor_sha256(weight))
        yield layer.path, origin, layer.basis() if signs is None else signs[index]


def _choose_kind(layers: Sequence[_Layer], kind: KindChoice) -> KindChoice:
    """`kind`, or `full` for `auto` where signs cannot determine the basis at all.

    Raises:
        UnsupportedError: `signs` where they cannot, or layers with different options.
    """
    options = _common_options(layers)
    reason = None
    if options.solver == "lowrank":
        reason = "the basis of a 'lowrank' adapter cannot be found again"
    for layer in layers:
        if layer.a.dtype != torch.float32 or layer.b.dtype != torch.float32:
            reason = f"the model holds A and B of '{layer.path}' in {layer.a.dtype}"
            break
    if reason is None or kind == "full":
        return kind
    if kind == "signs":
        raise UnsupportedError(f"{reason}, so signs do not determine it; needs kind 'full'")
    return "full"


def _all_signs(layers: Sequence[_Layer], limit: float) -> list[SignRecord] | None:
    """The sign record of every layer, or None where one leaves ΔW less certain than `limit`."""
    records, left_open = [], {}
    for layer in layers:
        solution = _solve(layer)
        next_value = solution.certificate.next_value
        with torch.no_grad():
            turn = layer.rotation.get_matrix().double().cpu()
        record = proven_signs(layer.basis(), layer.options, solution.triplets, next_value, turn)
        left_open[layer.path] = record.left_open(next_value, turn)
        if left_open[layer.path] > limit:
            return None
        records.append(record)
    worst = max(left_open, key=lambda path: left_open[path])
    if ADVISED_LIMIT < left_open[worst] < math.inf:  # infinite: `write_record` refuses it
        warnings.warn(
            f"signs leave {left_open[worst]:.1%} of ΔW open in '{worst}'; kind 'full' leaves "
            "nothing open",
            stacklevel=4,
        )
    return records


def _solve(layer: _Layer) -> Solution:
    return _with_room(lambda at: leading_triplets(at.weight.detach(), at.options.rank), layer)


def _with_room(compute: Callable[[_Layer], _Result], layer: _Layer) -> _Result:
    """The result from the layer's own device, or from the CPU where training leaves no room."""
    try:
        return compute(layer)
    except torch.OutOfMemoryError:
        pass  # tried again outside, where the failed attempt's tensors are free
    a, b, weight = (tensor.detach().cpu() for tensor in (layer.a, layer.b, layer.weight))
    return compute(replace(layer, a=a, b=b, weight=weight))


def _check_own_basis(layer: _Layer) -> None:
    """Check that A and B hold singular vectors of the weight as it is now.

    With U, σ, V from A and B: W vᵢ = σᵢ uᵢ or Wᵀ uᵢ = σᵢ vᵢ. The full SVD gives both, the
    low-rank one only that of the side it projects onto.

    Raises:
        MismatchError: they do not.
    """
    weight, basis, scaling = layer.weight.detach().float(), layer.basis(), layer.options.scaling
    tiny = torch.finfo(torch.float32).tiny  # a vanishing σ leaves a zero column in A or B
    size_a = torch.linalg.vector_norm(basis.a, dim=1).clamp(min=tiny)
    size_b = torch.linalg.vector_norm(basis.b, dim=0).clamp(min=tiny)
    right = weight @ (basis.a.T / size_a) - scaling * basis.b * size_a
    left = weight.T @ (basis.b / size_b) - scaling * basis.a.T * size_b
    error = min(float(torch.linalg.vector_norm(m, dim=0).max()) for m in (right, left))
    on_cpu = layer.weight.device.type == "cpu"
    exact = on_cpu and layer.a.dtype == layer.b.dtype == torch.float32
    limit = _BELONGS if exact else _BELONGS_COARSELY
    if not error <= limit * float((scaling * size_a * size_b).max()):
        raise _changed(layer)


def _changed(layer: _Layer) -> MismatchError:
    return MismatchError(
        f"module '{layer.path}': its base weight has changed since the adapter was added, so A "
        "and B are not its singular vectors; record from the model as it was trained"
    )


def _check_base(record: BasisRecord, layers: Sequence[_Layer]) -> None:
    """Check that every live weight is the recorded one, in the recorded dtype.

    Raises:
        MismatchError: some are not; up to three are named.
    """
    wrong = []
    for layer in layers:
        origin, weight = record.base[layer.path], layer.weight.detach()
        dtype = TORCH_DTYPES.get(origin.dtype)
        if (
            dtype is None
            or _shape(weight) != origin.shape
            or tensor_sha256(weight.to(dtype)) != origin.sha256
        ):
            wrong.append(layer)
    if not wrong:
        return
    named = ", ".join(f"'{layer.path}'" for layer in wrong[:3])
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    recorded, live = record.base[wrong[0].path].dtype, CODES[wrong[0].weight.dtype]
    as_what = "" if recorded == live else f" (recorded as {recorded}, loaded as {live})"
    raise MismatchError(
        f"{record.path}: the base weight of {named}{more} is not the one recorded{as_what}; load "
        "the base that the adapter was trained on, in the dtype it is stored in"
    )


def _recorded_basis(record: BasisRecord, layer: _Layer) -> Basis:
    """A and B of one layer from its record, float32, on any device.

    Raises:
        RecordError: the record cannot be read.
        MismatchError: its singular values are not those of the weight.
    """
    if record.kind == "full":
        return record.basis(layer.path)
    return record.restored(layer.path, _solve(layer).triplets, layer.options)[0]


def _live_layers(model: nn.Module, adapter_name: str) -> list[_Layer]:
    """The layers that an adapter adapts, checked to be whole and unmerged.

    Raises:
        UsageError: not a PeftModel, no such adapter, or it is merged.
        UnsupportedError: a weight is sharded, offloaded or quantized.
    """
    layers = []
    # A module with two names has both in the adapter's file.
    for name, module in model.named_modules(remove_duplicate=False):
        if adapter_name not in getattr(module, "_psoft_A_cache", ()):
            continue
        if not name.startswith(_PREFIX):
            raise UsageError(
                f"module '{name}': the model must be the PeftModel itself, not what it wraps or "
                "what wraps it"
            )
        layers.append(_live_layer(name.removeprefix(_PREFIX), module, adapter_name))
    if not layers:
        raise UsageError(
            f"{type(model).__name__}: no PSOFT layer holds adapter '{adapter_name}'; pass the "
            "PeftModel and one of its PSOFT adapters"
        )
    return layers


def _live_layer(path: str, module: Any, adapter_name: str) -> _Layer:
    if module.merged_adapters:
        raise UsageError(f"module '{path}': adapters are merged into it; unmerge first")
    weight = module.get_base_layer().weight
    a, b = module._psoft_A_cache[adapter_name], module._psoft_B_cache[adapter_name]
    # DeepSpeed leaves an empty weight, FSDP a DTensor or a flat piece of one.
    whole = not hasattr(weight, "full_tensor") and tuple(weight.shape) == (len(b), a.shape[1])
    if not whole and CODES.get(weight.dtype) in WEIGHT_CODES:
        raise UnsupportedError(
            f"module '{path}': its weight is sharded (ZeRO-3, FSDP); use the whole model in one "
            "process, loaded on the machine that trained"
        )
    if not whole or CODES.get(weight.dtype) not in WEIGHT_CODES:
        raise UnsupportedError(
            f"module '{path}': its weight is {weight.dtype} {list(weight.shape)}; a basis belongs "
            f"to a float32, float16 or bfloat16 weight of shape {[len(b), a.shape[1]]}"
        )
    if any(tensor.is_meta for tensor in (weight, a, b)):
        raise UnsupportedError(f"module '{path}': it is not in memory; load without offloading")
    options = BasisOptions(
        rank=module.r[adapter_name],
        scaling=module.scaling[adapter_name],
        solver=module.psoft_svd[adapter_name],
        initialisation=module.ab_svd_init[adapter_name],
        power_iterations=module.psoft_svd_lowrank_niter[adapter_name],
        random_seed=module.random_seed[adapter_name],
    )
    return _Layer(path, weight, a, b, module.psoft_R[adapter_name], options)


def _common_options(layers: Sequence[_Layer]) -> BasisOptions:
    """The options that all layers share.

    Raises:
        UnsupportedError: they do not share them.
    """
    options = layers[0].options
    for layer in layers:
        if layer.options != options:
            raise UnsupportedError(
                f"module '{layer.path}': its rank or its other PSOFT options are not those of "
                f"'{layers[0].path}' (rank_pattern); a record holds one set for all modules"
            )
    return options


def _active_adapters(model: nn.Module) -> list[str]:
    """The active adapters that are PSOFT.

    Raises:
        UsageError: there is none, or the model is not a PeftModel.
    """
    active = getattr(model, "active_adapters", None)
    names = [
        name
        for name in (active if isinstance(active, list) else [])
        if any(name in getattr(module, "_psoft_A_cache", ()) for module in model.modules())
    ]
    if not names:
        raise UsageError(
            f"{type(model).__name__}: not a PeftModel with an active PSOFT adapter; take "
            "RecordBasisCallback out of the callbacks"
        )
    return names


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    for attribute in ("_orig_mod", "module", "_orig_mod"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            model = inner
    return model


def _adapter_folder(folder: str | Path, adapter_name: str) -> Path:
    """Where PEFT keeps an adapter: its own folder inside `folder`, where there is one."""
    own = _own_folder(Path(folder), adapter_name)
    return own if own.is_dir() else Path(folder)


def _own_folder(folder: Path, adapter_name: str) -> Path:
    return folder if adapter_name == _DEFAULT else folder / adapter_name


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise OutputError(f"{folder}: cannot be made ({cause.strerror or cause})") from cause


def _shape(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return rows, columns
