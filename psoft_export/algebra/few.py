"""Finding the few entries of a large tensor that reach a bound."""

import numpy as np
import torch
from torch import Tensor


def entries_reaching(values: Tensor, bound: float) -> Tensor:
    """Flat indices of the entries that are at least `bound`, of which NaN is none.

    Args:
        values: contiguous, float64, float32 or int32, any shape.
        bound: what to reach.
    """
    flat = values.view(-1)
    if flat.device.type != "cpu":
        return (flat >= bound).nonzero()[:, 0]
    # NumPy compares, and finds what is true, several times as fast as torch does.
    return torch.from_numpy(np.flatnonzero(flat.numpy() >= bound))


def entries_reaching_either(values: Tensor, bound: float) -> Tensor:
    """The same of the entries that are at least `bound`, or at most its negative.

    Unlike by their absolute values this finds the least integer, too.
    """
    flat = values.view(-1)
    if flat.device.type != "cpu":
        return ((flat >= bound) | (flat <= -bound)).nonzero()[:, 0]
    array = flat.numpy()
    return torch.from_numpy(np.flatnonzero((array >= bound) | (array <= -bound)))
