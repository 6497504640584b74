"""Finding the few entries of a large tensor that reach a bound."""

import numpy as np
import torch
from torch import Tensor


def entries_reaching(values: Tensor, bound: float, marks: Tensor | None = None) -> Tensor:
    """Flat indices of the entries that are at least `bound`, of which NaN is none.

    Args:
        values: contiguous, float64, float32, int32 or uint32, any shape.
        bound: what to reach; below 2^31 for integers.
        marks: memory to work in, flat, bool, as many entries.
    """
    flat = values if values.ndim == 1 else values.view(-1)
    if flat.device.type != "cpu":
        if flat.dtype == torch.uint32:  # which torch itself does not compare
            signed = flat.view(torch.int32)
            return ((signed >= bound) | (signed < 0)).nonzero()[:, 0]
        return (flat >= bound).nonzero()[:, 0]
    # NumPy compares, and finds what is true, several times as fast as torch does.
    out = None if marks is None else marks.numpy()
    return torch.from_numpy(np.flatnonzero(np.greater_equal(flat.numpy(), bound, out=out)))
