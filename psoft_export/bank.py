"""Several adapters in one model in memory: switched in place, or one for each row of a batch.

>>> bank = psoft_export.AdapterBank(model)
>>> bank.add("math", "adapters/math")
>>> bank.activate("math")
"""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from psoft_export.adapters.adapter import NeumannTerms, SubspaceAdapter
from psoft_export.adapters.files import FLOATING
from psoft_export.adapters.kinds import load_adapter
from psoft_export.algebra.factored_rotation import FactoredRotation
from psoft_export.bases import BasisFinder
from psoft_export.basis.svd import Basis, BasisOptions
from psoft_export.cache import open_cache
from psoft_export.changes.shared_subspace import Subspace
from psoft_export.changes.subspace import added_by_rotation
from psoft_export.checkpoint.companions import CONFIG
from psoft_export.checkpoint.dtypes import TORCH_DTYPES
from psoft_export.checkpoint.reader import open_checkpoint, tensor_sha256
from psoft_export.checkpoint.source import resolve
from psoft_export.combining import Combination, combined_module
from psoft_export.device import choose_device, full_precision
from psoft_export.errors import MismatchError, UnsupportedError, UsageError
from psoft_export.model.skeleton import Skeleton
from psoft_export.opening import base_files, needed_record
from psoft_export.verification.models import read_tensors

Form = Literal["merged", "unmerged"]

_MARK = "_psoft_export_bank"  # on the model, while it has one
_BLOCK_NUMBERS = 2**21  # of the rows that are merged at a time in a wider dtype


@dataclass(frozen=True)
class BankMemory:
    """Bytes that a bank holds beside the model.

    Attributes:
        basis: A and B of every module, shared by all tasks.
        tasks: task → its rotations.
        originals: copies of the weights that a merge changes; zero where they are read from the
            base's files, and in an unmerged bank.
        hot: merged weights of the tasks that are kept ready (`AdapterBank(hot=…)`).
        mixed: rotations of all tasks stacked for batches of mixed tasks.
    """

    basis: int
    tasks: Mapping[str, int]
    originals: int
    hot: int
    mixed: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.basis + sum(self.tasks.values()) + self.originals + self.hot + self.mixed


@dataclass
class _State:
    """What an unmerged model does at the moment.

    Attributes:
        is_active: one task is active.
        rows: the task of each row of the batch (0 for the base), or None.
        spread: a task may also have so many rows beside each other (beams).
    """

    is_active: bool = False
    rows: Tensor | None = None
    spread: int = 1


@dataclass
class _Layer:
    """A linear layer that some task changes.

    Attributes:
        path: of the module in the model.
        linear: the layer.
        original: its weight as the base has it.
        basis: A and B, float32, on the layer's device.
        options: how they are scaled.
        right: Aᵀ (in × r), in the layer's dtype; of an unmerged bank.
        left: scaling · Bᵀ (r × out), in the layer's dtype; of an unmerged bank.
        core: (R − I)ᵀ of the active task, in the layer's dtype; of an unmerged bank.
        cores: of the base (zero) and of each task, stacked; None until a mixed batch needs it.
    """

    path: str
    linear: nn.Linear
    original: Callable[[], Tensor]
    basis: Basis
    options: BasisOptions
    right: Tensor | None = None
    left: Tensor | None = None
    core: Tensor | None = None
    cores: Tensor | None = None

    @property
    def subspace(self) -> Subspace:
        """The factors that its tasks share."""
        return Subspace.of(self.basis, self.options)

    @property
    def weight(self) -> Tensor:
        """The weight of the layer, to be changed in place."""
        return self.linear.weight.detach()

    def restore_class(self) -> None:
        """Make the layer an ordinary one again."""
        linear = self.linear
        if isinstance(linear, RotatedLinear):
            del linear.psoft_layer, linear.psoft_state
            linear.__class__ = nn.Linear  # type: ignore[assignment]

    def prepare(self) -> None:
        """Make the factors that stand beside the weight."""
        weight = self.weight
        self.right = self.basis.a.T.to(weight).contiguous()
        self.left = (self.options.scaling * self.basis.b.double()).T.to(weight).contiguous()
        self.core = torch.zeros(len(self.left), len(self.left), dtype=weight.dtype).to(weight)
        self.cores = None

    def stand_beside(self, state: _State) -> None:
        """Let the layer add what `state` says to its output, from now on."""
        self.linear.__class__ = RotatedLinear
        assert isinstance(self.linear, RotatedLinear)
        self.linear.psoft_layer, self.linear.psoft_state = self, state

    def rotate(self, turn: FactoredRotation) -> None:
        """Let the layer do a rotation: beside its weight, or merged into it."""
        if self.core is not None:
            self.core.copy_(_core(turn).T)
        else:
            self.merge(turn)

    def merge(self, turn: FactoredRotation) -> None:
        """Make the weight W + scaling · B (R − I) A, formed in float32."""
        weight, original = self.weight, self.original()
        core = self.options.scaling * _core(turn)
        left = self.basis.b @ core.to(self.basis.b)
        if weight.dtype == torch.float32:
            torch.addmm(original, left, self.basis.a, out=weight)
            return
        step = max(1, _BLOCK_NUMBERS // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            weight[rows].copy_(torch.addmm(original[rows].float(), left[rows], self.basis.a))


class RotatedLinear(nn.Linear):
    """A linear layer of an unmerged bank: adds the rotation of the active task, or of each row.

    A layer becomes one by a change of its class, so that names, parameters and hooks stay as they
    are, and `torch.compile` sees that it is another layer. (Hooks it does not look at.)
    """

    psoft_layer: _Layer
    psoft_state: _State

    def forward(self, inputs: Tensor) -> Tensor:
        """Batch × … × in → batch × … × out."""
        output = super().forward(inputs)
        layer, state = self.psoft_layer, self.psoft_state
        if state.rows is None and not state.is_active:
            return output
        assert layer.right is not None and layer.core is not None and layer.left is not None
        core = layer.core if state.rows is None else _row_cores(layer, state, len(inputs))
        return output + added_by_rotation(inputs, layer.right, core, layer.left)


class AdapterBank:
    """The tasks that one transformers model can be switched to, in this process.

    Every task is one PSOFT adapter of the model's base, and costs r² numbers a module: the
    principal subspace of each weight is found once and shared.

    - **merged**: the weights are changed in place, so the model runs at its own full speed. Going
      back to the base is bit-exact however often one switches.
    - **unmerged**: the weights stay, and every layer adds its rotation. Switching is a copy of
      r² numbers a module, and each row of a batch can have its own task:
      `model(…, tasks=["math", None])`, `model.generate(…, tasks=[…])`.

    Not for several threads: only the thread that made a bank may use it, and no other may run
    the model while it switches.

    Attributes:
        form: `merged` or `unmerged`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        form: Form = "merged",
        base: str | Path | None = None,
        hot: int = 0,
        svd_device: str | None = None,
        require_record: bool = False,
        cache: bool = True,
        cache_dir: str | Path | None = None,
        token: str | None = None,
    ) -> None:
        """Take charge of a model that has its base's weights.

        Args:
            model: on any device, in float32, float16 or bfloat16.
            form: see the class.
            base: of a merged bank: the folder or Hub id that the model was loaded from; then the
                base's weights are read from its safetensors files, memory-mapped, whenever they
                are needed. Without it a copy of every weight that a task changes is kept.
            hot: of a merged bank: of how many tasks, the last used, to keep the merged weights:
                switching to one of them is a copy, and each takes as much memory as the weights
                that it changes.
            svd_device: of adapters without a basis record: as for `merge`.
            require_record: refuse adapters without a basis record.
            cache: keep bases on disk, and take them from there.
            cache_dir: folder of that cache.
            token: a Hub token.

        Raises:
            UsageError: the model has a bank already, or an option cannot be used.
            CheckpointError: the base cannot be read.
        """
        if form not in get_args(Form):
            raise UsageError(f"form '{form}': is not one of {', '.join(get_args(Form))}")
        if getattr(model, _MARK, None) is not None:
            raise UsageError("model: has an AdapterBank already; close() that one first")
        if base is not None and form != "merged":
            raise UsageError("base: an unmerged bank leaves the weights as they are; leave it away")
        if hot < 0 or (hot and form != "merged"):
            raise UsageError(f"hot {hot}: a number of tasks of a merged bank is needed")
        self.form = form
        self._hot_limit = hot
        self._hot: dict[str, dict[str, Tensor]] = {}  # the last used at the end
        self._model = model
        self._svd_device = choose_device(svd_device) if svd_device is not None else None
        self._require_record = require_record
        self._cache = open_cache(cache_dir) if cache else None
        self._token = token
        self._layers: dict[str, _Layer] = {}
        self._tasks: dict[str, dict[str, FactoredRotation]] = {}
        self._active: str | None = None
        self._touched: set[str] = set()  # layers that may not be the base's
        self._state = _State()
        self._thread = threading.get_ident()
        self._files = _BaseFiles(model, base, token) if base is not None else None
        self._before: dict[str, Any] = {}
        setattr(model, _MARK, self)
        self._wrap("forward")
        if hasattr(model, "generate"):
            self._wrap("generate")

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order in which they were added."""
        return tuple(self._tasks)

    @property
    def active(self) -> str | None:
        """The task that the model does; None for the base."""
        return self._active

    @property
    def memory(self) -> BankMemory:
        """What the bank holds beside the model, in bytes."""
        layers = self._layers.values()
        basis = sum(_nbytes(layer.basis.a, layer.basis.b) for layer in layers)
        beside = [(layer.right, layer.left, layer.core) for layer in layers]
        basis += sum(_nbytes(*(t for t in tensors if t is not None)) for tensors in beside)
        held = self.form == "merged" and self._files is None
        return BankMemory(
            basis=basis,
            tasks={
                name: sum(_nbytes(t.core, t.vector_a, t.vector_b) for t in turns.values())
                for name, turns in self._tasks.items()
            },
            originals=sum(_nbytes(layer.weight) for layer in layers) if held else 0,
            hot=sum(_nbytes(*ready.values()) for ready in self._hot.values()),
            mixed=sum(_nbytes(layer.cores) for layer in layers if layer.cores is not None),
        )

    @torch.inference_mode(mode=False)  # what it makes is used, and changed, outside as well
    def add(
        self,
        name: str,
        adapter: str | Path,
        *,
        neumann_terms: NeumannTerms | None = None,
    ) -> None:
        """Add a task; the model stays as it is.

        Args:
            name: of the task.
            adapter: folder or Hub id of its PSOFT adapter.
            neumann_terms: as of `load_adapter`.

        Raises:
            UsageError: there is a task of this name, or this is another thread.
            MismatchError: the model's weights are not those that the adapter's basis was recorded
                with, or the adapter has a module that the model has not.
            UnsupportedError: the adapter is not PSOFT or brings a head of its own, or a target is
                no linear layer of its own.
            PsoftExportError: as `load_adapter`.
        """
        self._check_thread()
        self._check_new(name)
        loaded = load_adapter(adapter, neumann_terms=neumann_terms, token=self._token)
        if not isinstance(loaded, SubspaceAdapter):
            raise UnsupportedError(
                f"task '{name}': {loaded.method}: it rotates no principal subspace, so a bank "
                "cannot hold it; merge it on its own"
            )
        if loaded.saved:
            raise UnsupportedError(
                f"task '{name}': brings its own '{next(iter(loaded.saved))}', which a bank does "
                "not switch; merge it on its own"
            )
        if self._require_record and loaded.needs_record:
            needed_record(loaded)
        finders: dict[torch.device, BasisFinder] = {}
        layers, turns = dict(self._layers), {}
        retold: dict[str, dict[str, FactoredRotation]] = {}
        for module in loaded.modules:
            layer = self._layers.get(module)
            linear = layer.linear if layer is not None else self._linear(name, module)
            original = layer.original if layer is not None else self._original(module, linear)
            device = linear.weight.device
            if device not in finders:
                finders[device] = BasisFinder(
                    loaded, device=device, svd_device=self._svd_device, cache=self._cache
                )
            basis = _basis_of(name, loaded, module, original(), finders[device])
            own = Subspace.of(basis, loaded.basis_options)
            turn = FactoredRotation.of(loaded.rotations[module])
            where = f"task '{name}', module '{module}'"
            if layer is not None and loaded.rank <= layer.options.rank:
                turns[module], _ = layer.subspace.rotation(own, turn, where)
                continue
            layers[module] = _Layer(module, linear, original, basis, loaded.basis_options)
            turns[module] = turn
            for other, known in self._tasks.items():
                if module in known:
                    assert layer is not None
                    told, _ = own.rotation(layer.subspace, known[module], f"task '{other}'")
                    retold.setdefault(other, {})[module] = told
        for finder in finders.values():
            for text in finder.warnings:
                warnings.warn(f"task '{name}': {text}", stacklevel=2)
        self._keep(name, layers, turns, retold)

    def combine(
        self,
        name: str,
        weights: Mapping[str, float],
        method: str = "lie",
        *,
        factor: float | None = None,
        density: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Add the combination of tasks as a task, by r × r algebra alone (`Combination`).

        Args:
            name: of the new task.
            weights: task → weight, in the order of the method.
            method: one of `psoft_export.METHODS`.
            factor: see `Combination`.
            density: see `Combination`.
            seed: see `Combination`.

        Raises:
            UsageError: a task, method, weight or option cannot be used.
            UnsupportedError: a rotation has no logarithm that the method needs.
        """
        self._check_thread()
        self._check_new(name)
        for task in weights:
            self._check_task(task)
        adapters: dict[str, str | Path] = {task: task for task in weights}
        combination = Combination(adapters, method, dict(weights), factor, density, seed)
        paths = dict.fromkeys(path for task in weights for path in self._tasks[task])
        turns = {}
        for path in paths:
            rank = self._layers[path].options.rank
            members = {
                task: self._tasks[task].get(path, FactoredRotation.identity(rank))
                for task in weights
            }
            turns[path] = combined_module(combination, path, members).rotation
        self._keep(name, self._layers, turns, {})

    def remove(self, name: str) -> None:
        """Forget a task; where it is active, the model goes back to its base."""
        self._check_thread()
        self._check_task(name)
        if self._active == name:
            self.activate(None)
        del self._tasks[name]
        self._hot.pop(name, None)
        for layer in self._layers.values():
            layer.cores = None

    @torch.no_grad()
    def activate(self, name: str | None) -> None:
        """Switch the model to a task, or back to its base.

        If it fails half-way, the model has its base's weights.

        Raises:
            UsageError: there is no such task, or this is another thread.
        """
        self._check_thread()
        if name is not None:
            self._check_task(name)
        turns = self._tasks[name] if name is not None else {}
        ready = self._hot.pop(name, {}) if name is not None else {}
        self._active, self._state.is_active = None, False
        try:
            with full_precision():
                for path in {*self._touched, *turns}:
                    if path not in turns:
                        self._restore(path)
                        continue
                    self._touched.add(path)
                    if path in ready:
                        self._layers[path].weight.copy_(ready[path])
                    else:
                        self._layers[path].rotate(turns[path])
        except BaseException:
            for path in list(self._touched):  # what is not restored stays touched
                self._restore(path)
            raise
        self._active, self._state.is_active = name, name is not None
        if name is not None and self._hot_limit:
            self._keep_hot(name, ready)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within the block the model does a task; after it, what it did before."""
        before = self._active
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before)

    def close(self) -> None:
        """Give the model back as it was: its base's weights, nothing beside its layers."""
        self.activate(None)
        for layer in self._layers.values():
            layer.restore_class()
        for method, before in self._before.items():
            delattr(self._model, method)
            if before is not None:  # another library's own
                setattr(self._model, method, before)
        delattr(self._model, _MARK)
        self._layers, self._tasks, self._hot = {}, {}, {}

    def _keep(
        self,
        name: str,
        layers: Mapping[str, _Layer],
        turns: dict[str, FactoredRotation],
        retold: Mapping[str, Mapping[str, FactoredRotation]],
    ) -> None:
        """Take over what `add` or `combine` made, once all of it is made."""
        fresh = [layer for path, layer in layers.items() if self._layers.get(path) is not layer]
        if self.form == "unmerged":
            for layer in fresh:
                layer.prepare()  # all that needs memory, before anything changes
            for layer in fresh:
                layer.stand_beside(self._state)
        for layer in layers.values():
            layer.cores = None
        self._layers = dict(layers)
        for other, told in retold.items():
            self._tasks[other] |= told
            self._hot.pop(other, None)
        self._tasks[name] = turns
        if self._active is not None and self.form == "unmerged":
            self.activate(self._active)  # in the buffers of layers made anew

    def _restore(self, path: str) -> None:
        """Let a layer do what the base does."""
        layer = self._layers[path]
        if layer.core is not None:
            layer.core.zero_()
        else:
            layer.weight.copy_(layer.original())
        self._touched.discard(path)

    def _keep_hot(self, name: str, ready: dict[str, Tensor]) -> None:
        """Keep the weights of the task just activated, if there is memory for them."""
        while len(self._hot) >= self._hot_limit:
            del self._hot[next(iter(self._hot))]
        if not ready:
            try:
                ready = {path: self._layers[path].weight.clone() for path in self._tasks[name]}
            except (MemoryError, RuntimeError):  # torch's out-of-memory errors are RuntimeErrors
                return
        self._hot[name] = ready

    @torch.inference_mode(mode=False)
    def _stack(self) -> None:
        """Prepare the layers for batches of mixed tasks."""
        for path, layer in self._layers.items():
            if layer.cores is None:
                assert layer.core is not None
                turns = [turns.get(path) for turns in self._tasks.values()]
                zero = torch.zeros(len(layer.core), len(layer.core), dtype=torch.float64)
                stacked = [zero, *(zero if t is None else _core(t).T for t in turns)]
                layer.cores = torch.stack(stacked).to(layer.core)

    def _wrap(self, method: str) -> None:
        """Let a method of the model take `tasks`."""
        plain = getattr(self._model, method)
        self._before[method] = vars(self._model).get(method)

        @functools.wraps(plain)
        def run(*args: Any, tasks: Sequence[str | None] | None = None, **named: Any) -> Any:
            if tasks is None:
                return plain(*args, **named)
            spread = self._expansion(named) if method == "generate" else 1
            with self._rows_of(tasks, spread):
                self._check_rows(len(tasks), args, named)
                return plain(*args, **named)

        setattr(self._model, method, run)

    @contextmanager
    def _rows_of(self, tasks: Sequence[str | None], spread: int) -> Iterator[None]:
        """Within the block each row of a batch has its own task."""
        if self.form != "unmerged":
            raise UsageError(
                "tasks: a merged model does one task at a time; make the bank with "
                "form='unmerged' for batches of mixed tasks"
            )
        if not torch.compiler.is_compiling():
            self._check_thread()
        for task in tasks:
            if task is not None:
                self._check_task(task)
        self._stack()
        numbers = {name: row + 1 for row, name in enumerate(self._tasks)}
        state, chosen = self._state, [0 if task is None else numbers[task] for task in tasks]
        before = state.rows, state.spread
        state.rows, state.spread = torch.tensor(chosen, device=self._model.device), spread
        try:
            yield
        finally:
            state.rows, state.spread = before

    def _check_rows(self, count: int, args: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Check that there is one task for each row."""
        names = {"input_ids", "inputs", "inputs_embeds", self._model.main_input_name}
        given = [*args[:1], *(named.get(name) for name in names)]
        for tensor in given:
            if isinstance(tensor, Tensor) and len(tensor) != count:
                raise UsageError(f"tasks: {count} are given for a batch of {len(tensor)} rows")

    def _expansion(self, named: Mapping[str, Any]) -> int:
        """How many rows generation makes of each."""
        config = named.get("generation_config") or self._model.generation_config
        counts = (
            named.get(name) or getattr(config, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        )
        return max(counts)

    def _linear(self, task: str, module: str) -> nn.Linear:
        """The layer that an adapter changes."""
        try:
            found = self._model.get_submodule(module)
        except AttributeError as cause:
            raise MismatchError(
                f"task '{task}': target module '{module}' is not in the model "
                f"({type(self._model).__name__}); was the adapter trained on another base?"
            ) from cause
        weight = getattr(found, "weight", None)
        if "forward" in vars(found) or getattr(weight, "is_meta", False):
            raise UnsupportedError(
                f"task '{task}': target module '{module}' is in another library's hands "
                "(accelerate's hooks, or weights that are not loaded); load the model on one device"
            )
        if type(found) is not nn.Linear or weight is None or weight.dtype not in FLOATING:
            raise UnsupportedError(
                f"task '{task}': target module '{module}' is a {type(found).__name__}; a bank "
                "changes float torch.nn.Linear layers"
            )
        parameters = self._model.named_parameters(remove_duplicate=False)
        sharing = [path for path, parameter in parameters if parameter is weight]
        if sharing[1:]:
            raise UnsupportedError(
                f"task '{task}': the weight of '{module}' is tied ({' and '.join(sharing)}); "
                "changing it would change both"
            )
        return found

    def _original(self, module: str, linear: nn.Linear) -> Callable[[], Tensor]:
        """What gives the base's weight of a layer that no task has changed yet."""
        weight = linear.weight.detach()
        if self.form == "unmerged":
            return lambda: weight
        if self._files is None:
            kept = weight.clone()
            return lambda: kept
        return self._files.original(module, weight)

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise UsageError(
                "AdapterBank: is used in another thread than the one that made it; give each "
                "thread its own model, or leave all switching to one"
            )

    def _check_new(self, name: str) -> None:
        if not name:
            raise UsageError("task '': a name is needed")
        if name in self._tasks:
            raise UsageError(f"task '{name}': is in the bank already; remove() it first")

    def _check_task(self, name: str) -> None:
        if name not in self._tasks:
            known = ", ".join(self._tasks) or "it has none"
            raise UsageError(f"task '{name}': is not in the bank ({known})")


class _BaseFiles:
    """The weights of a model's base, in its files, memory-mapped."""

    def __init__(self, model: PreTrainedModel, base: str | Path, token: str | None) -> None:
        source = resolve(base, CONFIG, base_files, token=token)
        skeleton = Skeleton(type(model), model.config)
        self._name = source.name
        self._tensors: dict[str, Tensor] = {}
        for name, tensor in read_tensors(open_checkpoint(source.folder)).items():
            in_model, reshaped = skeleton.tensor_name(name)
            if not reshaped:
                self._tensors[in_model] = tensor

    def original(self, module: str, weight: Tensor) -> Callable[[], Tensor]:
        """What gives the weight of a module in the dtype and on the device of the model's.

        Raises:
            MismatchError: the model's weight is another.
        """
        stored = self._tensors.get(f"{module}.weight")
        if stored is None:
            raise MismatchError(
                f"{self._name}: holds no tensor of '{module}' as the model has it; make the bank "
                "without base, and it keeps a copy"
            )

        def read() -> Tensor:
            return stored.to(weight.dtype).to(weight.device)

        if stored.shape != weight.shape or not torch.equal(read(), weight):
            raise MismatchError(
                f"{self._name}: its weight of '{module}' is not the model's; pass the base that "
                "the model was loaded from"
            )
        return read


def _basis_of(
    name: str, adapter: SubspaceAdapter, module: str, weight: Tensor, finder: BasisFinder
) -> Basis:
    """The basis of a module; errors as of `AdapterBank.add`."""
    adapter.check_target(module, (weight.shape[0], weight.shape[1]))
    record = adapter.record
    trained = weight if record is None else weight.to(TORCH_DTYPES[record.base[module].dtype])
    sha256 = tensor_sha256(trained.cpu())
    if record is not None and record.base[module].sha256 != sha256:
        raise MismatchError(
            f"task '{name}': the model's weight of '{module}' is not the one that the adapter's "
            "basis was recorded with; load the recorded base, in the dtype that it is stored in"
        )
    found = finder.find(module, trained, sha256)
    assert found.basis is not None
    return found.basis


def _row_cores(layer: _Layer, state: _State, batch: int) -> Tensor:
    """(R − I)ᵀ of each row of a batch."""
    rows = state.rows
    assert rows is not None and layer.cores is not None
    if batch != len(rows):
        if batch != state.spread * len(rows):
            raise UnsupportedError(
                f"module '{layer.path}': gets {batch} rows for a batch of {len(rows)} tasks; "
                "this model cannot mix tasks in a batch"
            )
        rows = rows.repeat_interleave(state.spread)
    return layer.cores[rows.to(layer.cores.device)]


def _core(turn: FactoredRotation) -> Tensor:
    """R − I, float64."""
    return turn.matrix - torch.eye(len(turn.core), dtype=torch.float64)


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
