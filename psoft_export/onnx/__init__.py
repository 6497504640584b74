"""ONNX: from an adapter to a graph that serves, and one graph for many tasks.

    >>> psoft_export.onnx.export("onnx", base="base", adapter="adapter")
    >>> psoft_export.onnx.load("onnx").generate(ids)

Needs the `onnx` extra: pip install 'psoft-export[onnx]'.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from psoft_export.onnx.requirements import require_onnx

if TYPE_CHECKING:
    from psoft_export.onnx.adding import AddedTask, add_task
    from psoft_export.onnx.exporting import OnnxReport, export
    from psoft_export.onnx.runtime import OnnxModel, OnnxModelForGeneration, load

__all__ = [
    "AddedTask",
    "OnnxModel",
    "OnnxModelForGeneration",
    "OnnxReport",
    "add_task",
    "export",
    "load",
]

_HOMES = {
    "AddedTask": "adding",
    "OnnxModel": "runtime",
    "OnnxModelForGeneration": "runtime",
    "OnnxReport": "exporting",
    "add_task": "adding",
    "export": "exporting",
    "load": "runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'psoft_export.onnx' has no attribute '{name}'")
    require_onnx()
    value = getattr(import_module(f"psoft_export.onnx.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
