"""Finding the few entries of a large tensor that reach a bound."""

import numpy as np
import torch
from torch import Tensor


def entries_reaching(values: Tensor, bound: float, *, either: bool = False) -> Tensor:
    """Flat indices of the entries that are at least `bound`, of which NaN is none.

    Args:
        values: contiguous, float64, float32 or int32, any shape.
        bound: what to reach.
        either: also those that are at most its negative, the least integer among them.
    """
    flat = values.view(-1)
    # NumPy compares, and finds what is true, several times as fast as torch does.
    array = flat.numpy() if flat.device.type == "cpu" else flat
    reaches = array >= bound
    if either:
        reaches |= array <= -bound
    if isinstance(reaches, Tensor):
        return reaches.nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(reaches))
