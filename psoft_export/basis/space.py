"""What the solver's methods find on the short side of W, how exactly, and where they start."""

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
TOLERANCE = 2.0**-26  # of a vector, as an angle: a quarter of float32's rounding
_SEED = 20261122


@dataclass(frozen=True)
class RitzPairs:
    """Eigenvectors of the Gram matrix within a space, in rows (p × k), and their values (p)."""

    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Space:
    """Orthonormal rows (p × k, float64) that span the leading vectors on the short side of W.

    Attributes:
        vectors: the rows.
        method: what found them.
        columns: dimension of the Krylov space that they come from, 0 where there is none.
        images: their products with W (p × l, float64), where they are known.
        following: the Ritz pairs after them, float32, where the rows are to be refined: found
            in float32, and right to a few digits. Else None.
    """

    vectors: Tensor
    method: str
    columns: int = 0
    images: Tensor | None = None
    following: RitzPairs | None = None


def random_rows(count: int, size: int, device: torch.device) -> Tensor:
    """Orthonormal rows to start from (count × size, float64), the same each time on a device."""
    generator = torch.Generator(device).manual_seed(_SEED)
    drawn = torch.randn(size, count, dtype=torch.float64, device=device, generator=generator)
    rows: Tensor = torch.linalg.qr(drawn)[0].contiguous().T
    return rows
