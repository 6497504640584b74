"""Running an exported folder: sessions of ONNX Runtime, called the way the model itself is.

>>> model = psoft_export.onnx.load("exported")
>>> model(input_ids=ids, attention_mask=mask, task="math").logits
>>> model.generate(ids, max_new_tokens=20, tasks=["math", None])
"""

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import AutoConfig, GenerationConfig, GenerationMixin
from transformers.exporters import ExportMetadata, OnnxExporter
from transformers.exporters.metadata import load_treespec
from transformers.exporters.utils import onnx_inputs

from psoft_export.checkpoint.companions import CONFIG
from psoft_export.checkpoint.dtypes import TORCH_DTYPES
from psoft_export.errors import (
    CheckpointError,
    MismatchError,
    UnsupportedError,
    UsageError,
    first_line,
)
from psoft_export.onnx import adapter_file
from psoft_export.onnx.folder import TASK_IDS, GraphFolder, read_folder
from psoft_export.onnx.tracing import widen_bfloat16

_CUDA = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_ERRORS_ONLY = 3
_CACHE = "past_key_values"
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
}


def load(folder: str | Path, *, device: str = "auto") -> "OnnxModel":
    """An exported folder, ready to run.

    Args:
        folder: what `psoft-export onnx` wrote.
        device: `cpu`, `cuda`, or `auto` for CUDA where ONNX Runtime and a GPU have it.

    Returns:
        The model; one that generates for the tasks `text-generation` and
        `text2text-generation`.

    Raises:
        CheckpointError: the folder is not such an export, or is damaged.
        UsageError: ONNX Runtime has no CUDA here.
        UnsupportedError: ONNX Runtime cannot run the graph on this device.
    """
    found = read_folder(Path(folder))
    kind = OnnxModelForGeneration if found.generates else OnnxModel
    graphs = {
        name: Graph.open(found.path / file, metadata, providers(device))
        for name, (file, metadata) in found.components.items()
    }
    return kind(found, graphs)


def load_in_float32(folder: Path) -> "OnnxModel":
    """As `load`, on the CPU, with bfloat16 widened to float32, for machines without bfloat16."""
    found = read_folder(folder)
    kind = OnnxModelForGeneration if found.generates else OnnxModel
    graphs = {}
    for name, (file, metadata) in found.components.items():
        program = OnnxExporter.load_program(found.path / file)
        onnx_ir.external_data.load_to_model(program)
        widen_bfloat16(program)
        with tempfile.TemporaryDirectory(prefix="psoft-export-") as folder_of_twin:
            path = Path(folder_of_twin) / file
            onnx_ir.save(program, path, external_data=f"{file}.data")
            del program
            graphs[name] = Graph.open(path, metadata, [_CPU])
    return kind(found, graphs)


def providers(device: str) -> list[Any]:
    """ONNX Runtime's execution providers for a device.

    Raises:
        UsageError: there is no such device, or no CUDA.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (
        number and not (kind == "cuda" and number.isdigit())
    ):
        raise UsageError(f"device '{device}': is not auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not has_cuda():
        raise UsageError(
            "device 'cuda': ONNX Runtime has no CUDA here; on a machine with an NVIDIA GPU run: "
            "pip install 'psoft-export[onnx-gpu]'"
        )
    if kind == "cpu" or not has_cuda():
        return [_CPU]
    return [(_CUDA, {"device_id": number or "0"}), _CPU]


def has_cuda() -> bool:
    """Whether ONNX Runtime and a GPU have CUDA here."""
    return _CUDA in onnxruntime.get_available_providers() and torch.cuda.is_available()


@dataclass
class Graph:
    """One session.

    Attributes:
        session: ONNX Runtime's.
        metadata: what the exporter recorded of the graph.
    """

    session: onnxruntime.InferenceSession
    metadata: ExportMetadata

    def __post_init__(self) -> None:
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        overridable = self.session.get_overridable_initializers()
        self.overridable = {value.name: tuple(value.shape) for value in overridable}
        takes = (*self.inputs.values(), *overridable)
        self._dtypes = {value.name: _DTYPES[value.type] for value in takes}
        self._outputs = [value.name for value in self.session.get_outputs()]
        self._spec = load_treespec(self.metadata.out_spec or "")
        self._constants = dict(self.metadata.out_constants)
        self.device = torch.device("cpu")
        if self.session.get_providers()[0] == _CUDA:
            options = self.session.get_provider_options()[_CUDA]
            self.device = torch.device("cuda", int(options["device_id"]))

    @classmethod
    def open(cls, path: Path, metadata: ExportMetadata, on: list[Any]) -> "Graph":
        """A session for a file.

        Raises:
            UnsupportedError: ONNX Runtime cannot run it there.
        """
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=on)
        except Exception as cause:  # ONNX Runtime raises errors of many kinds
            raise UnsupportedError(
                f"{path}: ONNX Runtime cannot run it on {_name(on[0])} ({first_line(cause)})"
            ) from cause
        return cls(session, metadata)

    def __call__(self, arguments: Mapping[str, Any], overriding: Mapping[str, Tensor]) -> Any:
        """What the model returns.

        Args:
            arguments: of its `forward`; those that the graph does not take are left out.
            overriding: initializer name → what it is in this call.

        Raises:
            UsageError: an input is missing.
        """
        given = self.completed(arguments)
        missing = [name for name in self.inputs if name not in given]
        if missing:
            raise UsageError(f"input '{missing[0]}': is not given, and the graph takes it")
        binding = self.session.io_binding()
        held = [self._bind(binding, n, t) for n, t in (*given.items(), *overriding.items())]
        for name in self._outputs:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has its own
        self.session.run_with_iobinding(binding)
        if self.device.type == "cuda":
            binding.synchronize_outputs()
        del held
        tensors = iter([torch.from_dlpack(v) for v in binding.get_outputs()])
        constants, leaves = self._constants, range(self._spec.num_leaves)
        values = [constants[leaf] if leaf in constants else next(tensors) for leaf in leaves]
        return pytree.tree_unflatten(values, self._spec)

    def _bind(self, binding: Any, name: str, tensor: Tensor) -> Tensor:
        """Bind an input; returns the memory that must live until the run is over."""
        tensor = tensor.to(self._dtypes[name])
        # Integers stay on the host: ONNX Runtime computes shapes from them there.
        on_host = not tensor.is_floating_point()
        tensor = (tensor.cpu() if on_host else tensor.to(self.device)).contiguous()
        # ONNX Runtime refuses the null pointer of an empty tensor.
        memory = tensor if tensor.numel() else torch.empty(1, dtype=tensor.dtype)
        memory = memory.to(tensor.device)
        binding.bind_input(
            name,
            tensor.device.type,
            tensor.device.index or 0,
            int(onnx_ir.tensor_adapters.from_torch_dtype(tensor.dtype)),
            list(tensor.shape),
            memory.data_ptr(),
        )
        return memory

    def completed(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """The graph's inputs by name, with those that models make themselves if none are given."""
        return dict(onnx_inputs(list(self.inputs), self._with_defaults(dict(arguments))))

    def _with_defaults(self, arguments: dict[str, Any]) -> dict[str, Any]:
        ids, states = arguments.get("input_ids"), arguments.get("encoder_outputs")
        if states is not None and arguments.get("attention_mask") is None:
            rows, length = states.last_hidden_state.shape[:2]
            arguments["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
        if states is not None or ids is None:
            return arguments
        given = onnx_inputs(list(self.inputs), arguments)
        caches = [name for name in self.inputs if name.startswith(f"{_CACHE}.")]
        past = given[caches[0]].shape[2] if caches and caches[0] in given else 0
        rows, length = ids.shape
        if arguments.get("attention_mask") is None:
            arguments["attention_mask"] = torch.ones(rows, past + length, dtype=torch.long)
        if "position_ids" in self.inputs and arguments.get("position_ids") is None:
            # As the models do: the mask is no part of it.
            arguments["position_ids"] = torch.arange(past, past + length).expand(rows, length)
        if "token_type_ids" in self.inputs and arguments.get("token_type_ids") is None:
            arguments["token_type_ids"] = torch.zeros_like(ids)
        if caches and not past:
            arguments.pop(_CACHE, None)
            arguments |= {name: self._empty_cache(name, ids.shape[0]) for name in caches}
        return arguments

    def _empty_cache(self, name: str, rows: int) -> Tensor:
        spec = self.inputs[name]
        _, heads, _, width = spec.shape
        return torch.empty(rows, heads, 0, width, dtype=_DTYPES[spec.type])


def _name(provider: Any) -> str:
    return str(provider[0] if isinstance(provider, tuple) else provider)


class OnnxModel:
    """An exported model.

    Attributes:
        config: the transformers config.
        tasks: names of the tasks that the graph can be switched to; empty for a merged model.
        device: where it runs.
        dtype: dtype of its weights.
    """

    main_input_name = "input_ids"

    def __init__(self, folder: GraphFolder, graphs: Mapping[str, Graph]) -> None:
        """Use `load`."""
        self._folder = folder
        self._graphs = graphs
        self._task: str | None = None
        self._rows_of_tasks: Tensor | None = None
        self._copies_rows = False  # generation makes several rows of one
        self._rotations: dict[str, dict[str, Tensor]] = {}
        self.tasks = tuple(folder.tasks)
        first = next(iter(graphs.values()))
        self.device = first.device
        self.dtype = TORCH_DTYPES[folder.dtype]
        try:
            self.config = AutoConfig.from_pretrained(
                folder.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as cause:  # config classes raise errors of many kinds
            raise CheckpointError(
                f"{folder.path / CONFIG}: transformers cannot read it ({first_line(cause)})"
            ) from cause

    def in_task(self, task: str | None) -> "OnnxModel":
        """This model, switched to a task for good; None for the base."""
        switched = copy.copy(self)
        if task is not None:
            with self.using(task):
                switched._task, switched._rows_of_tasks = self._task, self._rows_of_tasks
        return switched

    def __call__(
        self,
        *,
        task: str | None = None,
        tasks: Sequence[str | None] | None = None,
        **arguments: Any,
    ) -> Any:
        """Run the model.

        Args:
            task: the task of the whole batch; None for the base.
            tasks: the task of each row, of a graph made with `--mixed-batch`.
            arguments: of the model's `forward`; those that the graph does not take are ignored,
                as are output flags.

        Returns:
            What the transformers model returns.

        Raises:
            UsageError: an unknown task, or arguments that do not fit.
        """
        with self.using(task, tasks):
            return self.forward(**arguments)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **others: Any,
    ) -> Any:
        """Run the model in the task that is in use; see `__call__`.

        `cache` is what transformers from 5.24 on calls `past_key_values`.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            _CACHE: past_key_values if cache is None else cache,
            **others,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        if "encoder" in self._graphs and "encoder_outputs" not in arguments:
            arguments["encoder_outputs"] = self._run(self._graphs["encoder"], arguments)
        return self._run(self._graph(arguments), arguments)

    def _run(self, graph: Graph, arguments: dict[str, Any]) -> Any:
        if TASK_IDS in graph.inputs:
            arguments = {**arguments, TASK_IDS: self._task_ids(_rows(arguments))}
        return graph(arguments, self._overriding(graph))

    def graph_inputs(self, **arguments: Any) -> dict[str, Tensor]:
        """What a model of one graph gives ONNX Runtime for a call, by the graph's names.

        Raises:
            KeyError: the model has several graphs.
        """
        graph = self._graphs["model"]
        if TASK_IDS in graph.inputs:
            arguments[TASK_IDS] = self._task_ids(_rows(arguments))
        return graph.completed(arguments)

    @contextmanager
    def using(
        self, task: str | None = None, tasks: Sequence[str | None] | None = None
    ) -> Iterator[None]:
        """Within the block the model is that of a task, or of one for each row.

        Not for several threads at once: give each its own model, or use ONNX Runtime's
        `RunOptions.add_active_adapter`.
        """
        if task is not None and tasks is not None:
            raise UsageError("task, tasks: give one task for the batch, or one for each row")
        for name in [task, *(tasks or ())]:
            if name is not None and name not in self.tasks:
                known = ", ".join(self.tasks) or "none: it is one merged model"
                raise UsageError(f"task '{name}': is not one of this graph's ({known})")
        if tasks is not None and not self._folder.mixed_batch:
            raise UsageError(
                "tasks: this graph has one task for a whole batch; one for each row needs an "
                "export with --mixed-batch"
            )
        if task is None and tasks is None:
            yield  # what is in use around the block stays so
            return
        before = self._task, self._rows_of_tasks
        numbers = {name: row + 1 for row, name in enumerate(self.tasks)}
        self._task = task
        self._rows_of_tasks = None
        if tasks is not None:
            self._rows_of_tasks = torch.tensor([numbers[t] if t else 0 for t in tasks])
        try:
            yield
        finally:
            self._task, self._rows_of_tasks = before

    def _graph(self, arguments: Mapping[str, Any]) -> Graph:
        """The graph of a call: the only one, or of an encoder-decoder by what is given."""
        if len(self._graphs) == 1:
            return next(iter(self._graphs.values()))
        cache = arguments.get(_CACHE)
        is_first = cache is None or cache.get_seq_length() == 0
        return self._graphs["prefill" if is_first else "decode"]

    def _task_ids(self, rows: int) -> Tensor:
        """The task of each row; those of a beam search have several rows each."""
        chosen = self._rows_of_tasks
        if chosen is None:
            number = 0 if self._task is None else 1 + self.tasks.index(self._task)
            return torch.full((rows,), number)
        if rows % len(chosen) or (rows > len(chosen) and not self._copies_rows):
            raise UsageError(f"tasks: {len(chosen)} are given for a batch of {rows} rows")
        return chosen.repeat_interleave(rows // len(chosen))

    def _overriding(self, graph: Graph) -> dict[str, Tensor]:
        if self._task is None or self._folder.mixed_batch:
            return {}
        if self._task not in self._rotations:
            path = self._folder.path / self._folder.tasks[self._task]
            read = adapter_file.read(path)
            for name, expected in graph.overridable.items():
                found = tuple(read[name].shape) if name in read else None
                if found != expected or len(read) != len(graph.overridable):
                    raise MismatchError(
                        f"{path}: does not fit the graph beside it ('{name}' is "
                        f"{list(found) if found else 'missing'}, {list(expected)} is needed); add "
                        "the task again with 'psoft-export onnx-adapter'"
                    )
            self._rotations[self._task] = {n: t.to(self.device) for n, t in read.items()}
        return self._rotations[self._task]


class OnnxModelForGeneration(OnnxModel, GenerationMixin):
    """An exported model that generates, with every option of transformers' `generate`.

    Attributes:
        generation_config: how it generates by default.
    """

    _is_stateful = False
    base_model_prefix = "model"

    def __init__(self, folder: GraphFolder, graphs: Mapping[str, Graph]) -> None:
        """Use `load`."""
        super().__init__(folder, graphs)
        try:
            self.generation_config = GenerationConfig.from_pretrained(
                folder.path, local_files_only=True
            )
        except OSError:  # no such file
            self.generation_config = GenerationConfig.from_model_config(self.config)

    @classmethod
    def can_generate(cls) -> bool:
        """True, as transformers asks."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """False, as transformers asks."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None that could be switched, as transformers asks."""
        return {}

    def get_encoder(self) -> "_Encoder":
        """The encoder, as transformers asks of an encoder-decoder."""
        return _Encoder(self._graphs["encoder"], self)

    def generate(
        self,
        *arguments: Any,
        task: str | None = None,
        tasks: Sequence[str | None] | None = None,
        **options: Any,
    ) -> Any:
        """Generate token ids, as `transformers.GenerationMixin.generate`.

        Args:
            arguments: `inputs`, and so on.
            task: as of `__call__`.
            tasks: as of `__call__`.
            options: as of transformers.
        """
        prompts = next((a for a in (*arguments, options.get("input_ids")) if a is not None), None)
        if tasks is not None and isinstance(prompts, Tensor) and len(prompts) != len(tasks):
            raise UsageError(f"tasks: {len(tasks)} are given for a batch of {len(prompts)} rows")
        generate: Any = GenerationMixin.generate
        with self.using(task, tasks):
            self._copies_rows = True
            try:
                return generate(self, *arguments, **options)
            finally:
                self._copies_rows = False


class _Encoder:
    """The encoder's graph, called as transformers calls an encoder."""

    main_input_name = "input_ids"

    def __init__(self, graph: Graph, model: OnnxModel) -> None:
        self._graph = graph
        self._model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """The source's states."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        arguments = {name: value for name, value in given.items() if value is not None}
        return self._model._run(self._graph, arguments)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return self.forward(input_ids, attention_mask)


def _rows(arguments: Mapping[str, Any]) -> int:
    """The number of rows of a batch."""
    for name in ("decoder_input_ids", "input_ids", "pixel_values"):
        if name in arguments:
            return int(arguments[name].shape[0])
    raise UsageError("input_ids: is not given, and the graph takes it")
