"""ONNX Runtime's own adapter files (`.onnx_adapter`): one task's rotations."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir
import onnxruntime
import torch
from torch import Tensor

from psoft_export.errors import CheckpointError, first_line

VERSION = 1


def write(path: Path, rotations: Mapping[str, Tensor]) -> None:
    """Write a task.

    Args:
        path: the file.
        rotations: initializer name → (R − I)ᵀ, r × r, in the dtype of the graph.
    """
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(VERSION)
    file.set_model_version(VERSION)
    file.set_parameters({name: _value(tensor) for name, tensor in rotations.items()})
    file.export_adapter(str(path))


def read(path: Path) -> dict[str, Tensor]:
    """The rotations of a task, as `write` takes them.

    Raises:
        CheckpointError: the file is missing or no such file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; export the task again")
    try:
        found = onnxruntime.AdapterFormat.read_adapter(str(path))
        return {name: torch.from_dlpack(v).clone() for name, v in found.get_parameters().items()}
    except Exception as cause:  # ONNX Runtime raises errors of many kinds
        raise CheckpointError(
            f"{path}: not an .onnx_adapter that ONNX Runtime reads ({first_line(cause)})"
        ) from cause


def _value(tensor: Tensor) -> onnxruntime.OrtValue:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has none
        code = int(onnx_ir.DataType.BFLOAT16)
        bits = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, code)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())
