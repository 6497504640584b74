"""Finding the few entries of a large tensor that reach a bound."""

import torch
from torch import Tensor

_PIECE = 512


def entries_reaching(values: Tensor, bound: float, *, downwards: bool = False) -> Tensor:
    """Flat indices, in no order, of the entries that are at least `bound`.

    The largest of each piece is found first: comparing every number is several times as slow as a
    maximum, and there are few such entries. NaN hides what else is in its piece.

    Args:
        values: contiguous, any real dtype and shape.
        bound: what to reach.
        downwards: find those that are at most `bound`.
    """
    reaches, farthest = (torch.le, torch.amin) if downwards else (torch.ge, torch.amax)
    flat = values.view(-1)
    whole = flat.numel() // _PIECE * _PIECE
    pieces, behind = flat[:whole].view(-1, _PIECE), flat[whole:]
    chosen = reaches(farthest(pieces, 1), bound).nonzero()[:, 0]
    found = reaches(pieces.index_select(0, chosen), bound).nonzero()
    rest = reaches(behind, bound).nonzero()[:, 0] + whole
    return torch.cat([chosen[found[:, 0]] * _PIECE + found[:, 1], rest])
