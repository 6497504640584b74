"""What is exported: a checkpoint as it stands, or a base with the rotations of several tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import onnx_ir
import torch
from torch import Tensor
from transformers import PreTrainedModel

from psoft_export.changes.change import WeightChange
from psoft_export.changes.shared_subspace import (
    Subspace,
    cores,
    rotations_of,
    shared_subspaces,
)
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.dtypes import TORCH_DTYPES
from psoft_export.checkpoint.reader import Checkpoint
from psoft_export.errors import MismatchError, UnsupportedError
from psoft_export.model.skeleton import Skeleton
from psoft_export.onnx import adapter_file
from psoft_export.onnx.folder import ADAPTER_SUFFIX, LEFT, RIGHT, ROTATION, ROTATIONS, TASK_IDS
from psoft_export.onnx.layers import MixedLinear, SwitchedLinear, replace_layers
from psoft_export.onnx.tasks import BATCH, Sample
from psoft_export.plan import MergePlan
from psoft_export.verification.models import LoadedModel, PlainLoader, UnmergedLoader
from psoft_export.verification.outputs import Load, numbers_beside


class Subject(Protocol):
    """What is exported."""

    skeleton: Skeleton

    @property
    def numbers(self) -> int:
        """How many numbers its graph holds."""

    @property
    def beside(self) -> int:
        """How many numbers stand beside the layers when it is run in PyTorch."""

    @property
    def outside(self) -> Mapping[str, float]:
        """Task → the largest share of a module's ΔW that the graph leaves out."""

    @property
    def loader(self) -> PlainLoader | UnmergedLoader:
        """Loads it without tasks."""

    @property
    def folder(self) -> Path:
        """Where its config is."""

    def traced(self, code: str) -> PreTrainedModel:
        """The model to trace, in a dtype."""

    def sample(self, sample: Sample) -> Sample:
        """What to trace it with, given what the plain model takes."""

    def finish(self, program: onnx_ir.Model, code: str) -> None:
        """Make of a traced graph the one that is served."""

    def write_tasks(self, folder: Path, code: str) -> dict[str, str | None]:
        """Write the file of each task; its name by task, None where the graph holds it."""

    def describe(self) -> dict[str, Any]:
        """What `psoft_export.json` says of the form of the graph."""

    def references(self) -> Mapping[str | None, Load]:
        """By task (None: no task): what the graph should compute, in PyTorch."""

    def companions(self) -> Mapping[str, Path]:
        """Output name → small file to copy."""


@dataclass
class PlainSubject:
    """A checkpoint on its own, such as a merged one."""

    checkpoint: Checkpoint
    skeleton: Skeleton

    def __post_init__(self) -> None:
        self.loader = PlainLoader(self.checkpoint, self.skeleton)
        self.outside: Mapping[str, float] = {}
        self.folder = self.checkpoint.folder

    @property
    def numbers(self) -> int:
        """See `Subject`."""
        return self.skeleton.numbers

    @property
    def beside(self) -> int:
        """See `Subject`."""
        return 0

    def traced(self, code: str) -> PreTrainedModel:
        """See `Subject`."""
        loaded = self.loader.load(TORCH_DTYPES[code], torch.device("cpu"), attention=None)
        if loaded.missing:
            raise UnsupportedError(
                f"{self.checkpoint.folder}: has no weight '{min(loaded.missing)}', which "
                f"{self.skeleton.class_name} needs; choose another --task"
            )
        return _model(loaded)

    def sample(self, sample: Sample) -> Sample:
        """See `Subject`."""
        return sample

    def finish(self, program: onnx_ir.Model, code: str) -> None:
        """See `Subject`."""

    def write_tasks(self, folder: Path, code: str) -> dict[str, str | None]:
        """See `Subject`."""
        return {}

    def describe(self) -> dict[str, Any]:
        """See `Subject`."""
        return {"mixed_batch": False}

    def references(self) -> Mapping[str | None, Load]:
        """See `Subject`."""
        return {None: self.loader.load}

    def companions(self) -> Mapping[str, Path]:
        """See `Subject`."""
        return companions.gather_one(self.folder)


@dataclass
class ManyTasksSubject:
    """One base, and the rotations of several adapters of it.

    Attributes:
        plans: task → the merge that it would be.
        changes: task → module, as the adapter names it → what it does.
        mixed: each row of a batch has its own task.
        skeleton: the model class.
        subspaces: module path → what all tasks rotate.
        cores: task → module path → R − I.
        outside: task → the largest share of a module's ΔW that the subspaces leave out.
    """

    plans: Mapping[str, MergePlan]
    changes: Mapping[str, Mapping[str, WeightChange]]
    mixed: bool
    skeleton: Skeleton = field(init=False)
    subspaces: Mapping[str, Subspace] = field(init=False)
    cores: Mapping[str, Mapping[str, Tensor]] = field(init=False)
    outside: Mapping[str, float] = field(init=False)

    def __post_init__(self) -> None:
        first = next(iter(self.plans.values()))
        self.loader = UnmergedLoader(first)
        self.folder = first.base.folder
        self.skeleton = self.loader.skeleton
        for task, plan in self.plans.items():
            _check_shares(task, plan, first, self.skeleton)
        named = self.skeleton.module_path
        by_path = {
            task: rotations_of(task, {named(module): change for module, change in changes.items()})
            for task, changes in self.changes.items()
        }
        self.subspaces = shared_subspaces(by_path.values())
        found = {task: cores(task, by_path[task], self.subspaces) for task in by_path}
        self.cores = {task: of_task for task, (of_task, _) in found.items()}
        self.outside = {task: share for task, (_, share) in found.items()}
        self._task_ids: Tensor | None = None

    @property
    def numbers(self) -> int:
        """See `Subject`."""
        extra = sum(
            s.left.numel() + s.right.numel() + s.rank**2 * (1 + len(self.plans) * self.mixed)
            for s in self.subspaces.values()
        )
        return self.skeleton.numbers + extra

    @property
    def beside(self) -> int:
        """See `Subject`."""
        return max(map(numbers_beside, self.plans.values()))

    def traced(self, code: str) -> PreTrainedModel:
        """See `Subject`."""
        dtype = TORCH_DTYPES[code]
        loaded = self.loader.load({}, dtype, torch.device("cpu"), attention=None)
        model = _model(loaded)
        if self.mixed:
            _take_task_ids(model, self._set_task_ids)
        replace_layers(model, ((path, self._beside(model, path, dtype)) for path in self.subspaces))
        return model

    def write_tasks(self, folder: Path, code: str) -> dict[str, str | None]:
        """See `Subject`."""
        if self.mixed:
            return dict.fromkeys(self.plans)
        files: dict[str, str | None] = {}
        for task in self.plans:
            files[task] = name = f"{task}{ADAPTER_SUFFIX}"
            rotations = {
                f"{path}.{ROTATION}": self._core(task, path).T.to(TORCH_DTYPES[code]).contiguous()
                for path in self.subspaces
            }
            adapter_file.write(folder / name, rotations)
        return files

    def describe(self) -> dict[str, Any]:
        """See `Subject`; of each subspace also the weight that it is of, where a record says.

        A record's hash is of the weight in the dtype that training had it in.
        """
        found: dict[str, Any] = {}
        for path, subspace in self.subspaces.items():
            shape = [len(subspace.left), subspace.right.shape[1]]
            found[path] = {"rank": subspace.rank, "shape": shape, "sha256": {}}
        for plan in self.plans.values():
            record = plan.adapter.record
            for module, base in (record.base if record is not None else {}).items():
                if (path := self.skeleton.module_path(module)) in found:
                    found[path]["sha256"][base.dtype] = base.sha256
        return {"mixed_batch": self.mixed, "subspaces": found}

    def sample(self, sample: Sample) -> Sample:
        """See `Subject`; rows of different tasks where each has its own."""
        if not self.mixed:
            return sample
        # Two rows, as every sample has.
        ids = torch.tensor([0, 1])
        arguments = {**sample.arguments, TASK_IDS: ids}
        return replace(sample, arguments=arguments, axes={**sample.axes, TASK_IDS: {0: BATCH}})

    def finish(self, program: onnx_ir.Model, code: str) -> None:
        """See `Subject`: rotations become inputs, zero by default."""
        if self.mixed:
            return
        graph = program.graph
        for path, subspace in self.subspaces.items():
            name = f"{path}.{ROTATION}"
            if name not in graph.initializers:
                raise UnsupportedError(
                    f"module '{path}': its rotation is not in the traced graph; the model does "
                    "not use the module, or uses it in a way that cannot be switched"
                )
            value = graph.initializers[name]
            zero = torch.zeros(subspace.rank, subspace.rank, dtype=TORCH_DTYPES[code])
            value.const_value = onnx_ir.tensor(zero, name=name)
            graph.inputs.append(value)

    def references(self) -> Mapping[str | None, Load]:
        """See `Subject`."""

        def of(plan: MergePlan, changes: Mapping[str, WeightChange]) -> Load:
            loader = UnmergedLoader(plan)
            return lambda dtype, device: loader.load(changes, dtype, device)

        first = next(iter(self.plans.values()))
        found: dict[str | None, Load] = {None: of(first, {})}
        for task, plan in self.plans.items():
            found[task] = of(plan, self.changes[task])
        return found

    def companions(self) -> Mapping[str, Path]:
        """See `Subject`."""
        return companions.gather_one(self.folder)

    def _beside(self, model: PreTrainedModel, path: str, dtype: torch.dtype) -> torch.nn.Module:
        layer, subspace = model.get_submodule(path), self.subspaces[path]
        if not self.mixed:
            return SwitchedLinear(layer, subspace, dtype)
        stacked = [self._core(task, path) for task in self.plans]
        return MixedLinear(layer, subspace, stacked, self._get_task_ids, dtype)

    def _core(self, task: str, path: str) -> Tensor:
        """R − I of a task in a module; zero where it leaves the module alone."""
        rank = self.subspaces[path].rank
        return self.cores[task].get(path, torch.zeros(rank, rank, dtype=torch.float64))

    def _get_task_ids(self) -> Tensor:
        assert self._task_ids is not None
        return self._task_ids

    def _set_task_ids(self, ids: Tensor) -> None:
        self._task_ids = ids


def kept_in_float(program: onnx_ir.Model) -> list[str]:
    """Names of the nodes that multiply with the factors of the subspaces and with rotations."""
    ends = (f".{LEFT}", f".{RIGHT}", f".{ROTATION}", f".{ROTATIONS}")
    return [
        str(node.name)
        for node in program.graph
        if node.op_type == "MatMul" and _comes_from(node, ends)
    ]


def _comes_from(node: onnx_ir.Node, ends: tuple[str, ...]) -> bool:
    return any(value is not None and (value.name or "").endswith(ends) for value in node.inputs)


def _model(loaded: LoadedModel) -> PreTrainedModel:
    model: PreTrainedModel = loaded.model
    return model


def _check_shares(task: str, plan: MergePlan, first: MergePlan, skeleton: Skeleton) -> None:
    """Check that a task changes nothing but rotations, and of the same base and class."""
    if plan.adapter.saved:
        raise UnsupportedError(
            f"task '{task}': its adapter brings whole tensors ('{min(plan.adapter.saved)}'), "
            "which are no rotation; merge it, and export the merged folder with --model"
        )
    if plan.layout.class_name != first.layout.class_name:
        raise MismatchError(
            f"task '{task}': is for {plan.layout.class_name}, the first one for "
            f"{first.layout.class_name}"
        )


def _take_task_ids(model: PreTrainedModel, keep: Callable[[Tensor], None]) -> None:
    """Let a model's `forward` take `task_ids` and hand them on."""
    forward: Callable[..., Any] = model.forward

    def with_task_ids(*, task_ids: Tensor | None = None, **arguments: Any) -> Any:
        rows = next(v for v in arguments.values() if isinstance(v, Tensor)).shape[0]
        keep(task_ids if task_ids is not None else torch.zeros(rows, dtype=torch.long))
        return forward(**arguments)

    model.forward = with_task_ids
