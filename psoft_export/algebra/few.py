"""Finding the few entries of a large tensor that reach a bound."""

import torch
from torch import Tensor

_PIECE = 512


def entries_reaching(values: Tensor, bound: float) -> tuple[Tensor, float]:
    """Flat indices of the entries that are at least `bound`, and the largest entry.

    The largest of each piece is found first: comparing every number is several times as slow as a
    maximum, and there are few such entries.

    Args:
        values: contiguous, any real dtype and shape.
        bound: what to reach.

    Returns:
        The indices, in no order, and the largest entry: NaN where there is one (then the indices
        say nothing), 0 of nothing at all.
    """
    flat = values.view(-1)
    whole = flat.numel() // _PIECE * _PIECE
    pieces, behind = flat[:whole].view(-1, _PIECE), flat[whole:]
    tops = pieces.amax(1)
    largest = float(torch.cat([tops, behind]).max()) if flat.numel() else 0.0
    if largest < bound:
        return flat.new_empty(0, dtype=torch.long), largest
    chosen = (tops >= bound).nonzero()[:, 0]
    found = (pieces.index_select(0, chosen) >= bound).nonzero()
    rest = (behind >= bound).nonzero()[:, 0] + whole
    return torch.cat([chosen[found[:, 0]] * _PIECE + found[:, 1], rest]), largest
