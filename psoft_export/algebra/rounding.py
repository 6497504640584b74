"""Rounding float64 results to the output dtype once, and measuring what the rounding cost."""

import torch
from torch import Tensor

# Significant bits (the hidden one counted) and exponent of the smallest normal number in the
# convention of `torch.frexp` (mantissa in [0.5, 1)).
_FORMATS = {
    torch.float32: (24, -125),
    torch.float16: (11, -13),
    torch.bfloat16: (8, -125),
}


def round_to_nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of `dtype` to each float64 entry, ties to even.

    `values.to(torch.bfloat16)` rounds twice, by way of float32, and so picks the wrong neighbour
    when the first rounding lands on a tie. Here the step to float32 rounds to odd, which keeps
    the second rounding exact (Boldo and Melquiond, IEEE Trans. Computers 57(4), 2008).

    Args:
        values: float64, any shape.
        dtype: torch.float32, torch.float16, torch.bfloat16 or torch.float64.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    single = values.to(torch.float32)
    bits = single.view(torch.int32)
    error = values - single.double()
    # An even last bit that is inexact becomes the odd neighbour on the other side of the value.
    away_from_zero = (error > 0) == (values > 0)
    step = torch.where(away_from_zero, 1, -1).to(torch.int32)
    fix = (error != 0) & ((bits & 1) == 0) & torch.isfinite(single)
    return (bits + step * fix).view(torch.float32).to(dtype)


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` numbers at each float64 entry, float64.

    Below the smallest normal number it is the constant spacing of the subnormals.
    """
    precision, smallest = _FORMATS[dtype]
    _, exponent = torch.frexp(values)
    exponent = exponent.clamp(min=smallest)
    return torch.ldexp(torch.ones_like(values), exponent - precision)
