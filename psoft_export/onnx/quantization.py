"""Weights in 8 bits, by ONNX Runtime's own quantizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from onnxruntime.quantization import QuantType
from transformers.exporters import (
    ExportFormat,
    OnnxRuntimeDynamicConfig,
    OnnxRuntimeQuantizer,
    OnnxRuntimeStaticConfig,
)

from psoft_export.errors import UnsupportedError, UsageError, first_line
from psoft_export.onnx.subjects import kept_in_float
from psoft_export.verification.text import read_text

_PRODUCTS = ["MatMul", "Gemm"]
_INT8 = (onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8)


@dataclass(frozen=True)
class Quantization:
    """How a graph is quantized.

    Attributes:
        calibration: text whose activations say their ranges, or None: each as it comes.
    """

    calibration: Path | None

    @classmethod
    def asked(cls, kind: str | None, calibration: str | Path | None) -> "Quantization | None":
        """From what the user says.

        Raises:
            UsageError: another kind, or a calibration text that cannot be read.
        """
        if kind is None:
            return None
        if kind != "int8":
            raise UsageError(f"quantize '{kind}': is not int8")
        if calibration is not None:
            read_text(Path(calibration))  # refused now rather than after tracing
        return cls(Path(calibration) if calibration is not None else None)

    @property
    def name(self) -> str:
        """In a word or two."""
        return "int8, dynamic" if self.calibration is None else "int8, static"


def quantize_program(
    program: onnx_ir.Model,
    quantization: Quantization,
    samples: list[dict[str, torch.Tensor]],
) -> onnx_ir.Model:
    """A graph with its weights in int8, one scale for each column.

    What multiplies with rotations stays in floating point, and so do embeddings. Weights have 7
    of their 8 bits, which keeps sums from saturating on processors without VNNI.

    Args:
        program: the float graph.
        quantization: how.
        samples: for static quantization, the graph's inputs by name.

    Raises:
        UnsupportedError: ONNX Runtime cannot quantize it.
    """
    more: dict[str, Any] = {
        "op_types_to_quantize": _PRODUCTS,
        "per_channel": True,
        "reduce_range": True,
        "nodes_to_exclude": kept_in_float(program),
    }
    # Products of two activations (queries and keys) stay in floating point.
    extra = {"DefaultTensorType": int(onnx_ir.DataType.FLOAT), "MatMulConstBOnly": True}
    config: OnnxRuntimeDynamicConfig | OnnxRuntimeStaticConfig
    if quantization.calibration is None:
        config = OnnxRuntimeDynamicConfig(**more, extra_options=extra)
    else:
        config = OnnxRuntimeStaticConfig(
            **more,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options=extra,
        )
    try:
        quantizer = OnnxRuntimeQuantizer(config, calibration_dataset=samples or None)
        first = samples[0] if samples else {}
        found: onnx_ir.Model = quantizer.quantize(program, first, ExportFormat.ONNX)
    except Exception as cause:  # its quantizer raises errors of many kinds
        raise UnsupportedError(
            f"the graph: ONNX Runtime cannot quantize it ({first_line(cause)})"
        ) from cause
    weights = (value.const_value for value in found.graph.initializers.values())
    if not any(w is not None and w.dtype in _INT8 and len(w.shape) == 2 for w in weights):
        raise UnsupportedError("the graph: holds no product with a weight that could be int8")
    return found
