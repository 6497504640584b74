"""Rounding float64 results to the output dtype, once."""

import torch
from torch import Tensor

from psoft_export.algebra.few import entries_reaching

# Significant bits of each dtype, the hidden one counted.
_PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
_TIE = 2**31 - 1  # a one and zeros, inverted: the largest int32


def round_to_nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of `dtype` to each float64 entry, ties to even.

    `values.to(torch.bfloat16)` rounds twice, by way of float32, and so picks the wrong neighbour
    when the first rounding lands on a tie. Here those entries step to the side of the tie that
    the float64 value is on (in effect rounding to odd: Boldo and Melquiond, IEEE Trans.
    Computers 57(4), 2008).

    Args:
        values: float64, any shape.
        dtype: torch.float32, torch.float16, torch.bfloat16 or torch.float64.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    single = values.contiguous().to(torch.float32)
    bits = single.view(torch.int32)
    suspects = _ties(bits, 24 - _PRECISION[dtype])
    if dtype == torch.float16:
        # Its subnormals are spaced evenly, so their ties have other bits; look at all of them.
        tiny = (single.abs() < torch.finfo(dtype).tiny).flatten().nonzero()[:, 0]
        suspects = torch.cat([suspects, tiny])  # twice the same changes nothing
    if len(suspects):
        value = values.flatten().index_select(0, suspects)
        first = single.flatten().index_select(0, suspects)
        first_bits = first.view(torch.int32)
        # An inexact even number becomes the odd neighbour on the other side of the value.
        step = torch.where((value > first.double()) == (value > 0), 1, -1).to(torch.int32)
        inexact_even = (value != first.double()) & (first_bits & 1 == 0)
        bits.view(-1)[suspects] = first_bits + step * inexact_even
    return single.to(dtype)


def _ties(bits: Tensor, dropped: int) -> Tensor:
    """Flat indices of the float32 numbers (as int32) whose last `dropped` bits are 100…0."""
    last = torch.bitwise_left_shift(bits, 32 - dropped).bitwise_not_()
    return entries_reaching(last, _TIE)


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinity; true of integers and of nothing at all."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.dtype.itemsize == 1:  # float8 has no comparisons
        values = values.to(torch.float32)
    if bool(values.sum().isfinite()):  # so all terms are; twice as fast as the extremes
        return True
    # Or the sum is beyond the dtype's numbers. Both extremes are NaN where any entry is; an order
    # of magnitude faster than isfinite().all().
    return bool(torch.isfinite(torch.stack(values.aminmax())).all())
