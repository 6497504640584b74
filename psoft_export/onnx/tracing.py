"""Tracing a model into graphs, by `transformers.exporters`, and naming what goes in and out."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Literal

import onnx_ir
from transformers import PreTrainedModel
from transformers.exporters import ExportedComponent, OnnxConfig, OnnxExporter

from psoft_export.errors import UnsupportedError, UsageError, first_line
from psoft_export.onnx.tasks import Sample
from psoft_export.verification.models import quiet

Fusion = Literal["cpu", "cuda"]
LOWEST_OPSET = 18  # torch's own; graphs are not converted to older ones
# As other programs know a cache, and what transformers calls it from 5.24 on.
_CACHE, _NEWER_CACHE = "past_key_values", "cache"
_BFLOAT16 = onnx_ir.DataType.BFLOAT16
_FLOAT = onnx_ir.DataType.FLOAT


def check_opset(opset: int | None) -> None:
    """Check that graphs can be written for a version of the operator set.

    Raises:
        UsageError: it is too low, or newer than the installed ONNX.
    """
    import onnx

    highest = onnx.defs.onnx_opset_version()
    if opset is not None and not LOWEST_OPSET <= opset <= highest:
        raise UsageError(
            f"opset {opset}: must be from {LOWEST_OPSET} (the lowest that torch exports) to "
            f"{highest} (the highest of the installed onnx)"
        )


def trace(
    model: PreTrainedModel, sample: Sample, *, opset: int | None = None, fuse: Fusion | None = None
) -> ExportedComponent:
    """A model as a graph of dynamic extents.

    Inputs have the names of `forward`'s arguments; a cache's are `past_key_values.layers.N.keys`
    and `.values`, which come back as `present.layers.N.keys` and `.values`.

    Args:
        model: in the dtype of the graph, on the CPU.
        sample: what to trace it with.
        opset: version of the operator set; None for the exporter's own.
        fuse: `cpu` or `cuda`, for ONNX Runtime's fused operators; None for standard ones.

    Raises:
        UnsupportedError: the model cannot be traced.
    """
    config = OnnxConfig(dynamic=True, opset_version=opset, ort_fusions=fuse)
    try:
        with _silence():
            exporter = OnnxExporter()  # type: ignore[no-untyped-call]
            exported = exporter.export(model, dict(sample.arguments), config)
    except Exception as cause:  # tracing raises errors of many kinds
        raise UnsupportedError(
            f"{type(model).__name__}: transformers cannot export it ({first_line(cause)})"
        ) from cause
    component: ExportedComponent = exported.components["model"]
    graph = component.program.graph
    written = component.program.opset_imports.get("")
    if opset is not None and written != opset:
        raise UnsupportedError(
            f"opset {opset}: the graph needs operators of {written}; pass --opset {written}"
        )
    _drop_origins(component.program)
    _name_values(graph)
    traced = component.metadata.kwargs  # which the exporters' runner takes, by these names
    if _NEWER_CACHE in traced:
        traced[_CACHE] = traced.pop(_NEWER_CACHE)
    _name_extents(component.program, sample.axes)
    return component


def widen_bfloat16(program: onnx_ir.Model) -> None:
    """Make float32 of a graph's bfloat16, to run it where there is no bfloat16."""
    for graph in program.graphs():
        for value in [*graph.inputs, *graph.initializers.values()]:
            _widen(value)
        for node in graph:
            for value in node.outputs:
                _widen(value)
            for name, attribute in list(node.attributes.items()):
                node.attributes[name] = _widened(name, attribute)


def _widen(value: onnx_ir.Value) -> None:
    if value.const_value is not None and value.const_value.dtype == _BFLOAT16:
        value.const_value = onnx_ir.tensor(value.const_value.numpy().astype("float32"))
    if value.dtype == _BFLOAT16:
        value.dtype = _FLOAT


def _widened(name: str, attribute: onnx_ir.Attr) -> onnx_ir.Attr:
    if attribute.type == onnx_ir.AttributeType.TENSOR and attribute.value.dtype == _BFLOAT16:
        wide = onnx_ir.tensor(attribute.value.numpy().astype("float32"))
        return onnx_ir.AttrTensor(name, wide)
    if name == "to" and attribute.value == int(_BFLOAT16):
        return onnx_ir.AttrInt64(name, int(_FLOAT))
    return attribute


def _drop_origins(program: onnx_ir.Model) -> None:
    """Without the lines of source that nodes come from: paths of this machine, and bulk."""
    program.metadata_props.clear()
    for graph in program.graphs():
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


def _name_values(graph: onnx_ir.Graph) -> None:
    for value in graph.inputs:
        assert value.name is not None
        name = value.name.removeprefix("input.")
        is_newer = name.startswith(f"{_NEWER_CACHE}.")
        value.name = _CACHE + name.removeprefix(_NEWER_CACHE) if is_newer else name
    for value in graph.outputs:
        assert value.name is not None
        name = value.name.removeprefix("output.")
        for cache in (_CACHE, _NEWER_CACHE):
            if name.startswith(f"{cache}."):
                name = "present" + name.removeprefix(cache)
        value.name = name


def _name_extents(program: onnx_ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give the symbols of traced extents (`s44`) the names of what they count."""
    names: dict[str, str] = {}
    for value in program.graph.inputs:
        assert value.name is not None and value.shape is not None
        for prefix, named in axes.items():
            if value.name == prefix or value.name.startswith(f"{prefix}."):
                for axis, name in named.items():
                    names[str(value.shape[axis])] = name
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")

    def renamed(extent: int | onnx_ir.SymbolicDim) -> int | str | None:
        if isinstance(extent, int) or extent.value is None:
            return extent if isinstance(extent, int) else None
        name = pattern.sub(lambda found: names[found[1]], extent.value)
        return int(name) if name.isdecimal() else name  # a symbol that was found to be fixed

    for graph in program.graphs():
        values = [*graph.inputs, *(out for node in graph for out in node.outputs)]
        for value in values:
            if value.shape is not None:
                value.shape = onnx_ir.Shape([renamed(extent) for extent in value.shape])


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the progress and the warnings of the exporters' internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
