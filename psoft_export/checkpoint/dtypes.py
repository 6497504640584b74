"""The dtype codes of the safetensors format and the torch dtypes they stand for."""

import torch

from psoft_export.errors import UsageError

# https://github.com/huggingface/safetensors#format
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}

# The dtypes that PEFT's PSOFT accepts for a target, and that a merge can write.
WEIGHT_CODES = ("F32", "F16", "BF16")

_NAMES = {
    "F32": ("fp32", "float32"),
    "F16": ("fp16", "float16"),
    "BF16": ("bf16", "bfloat16"),
}


def parse_dtype(name: str) -> str:
    """The code of a dtype named as on the command line (fp32, float32, …).

    Raises:
        UsageError: the name is none of those.
    """
    for code, names in _NAMES.items():
        if name.lower().removeprefix("torch.") in names:
            return code
    known = ", ".join(names[0] for names in _NAMES.values())
    raise UsageError(f"dtype '{name}' is not one of {known}")


def config_name(code: str) -> str:
    """The name that a transformers config uses for a weight dtype (`bfloat16`)."""
    return _NAMES[code][1]
