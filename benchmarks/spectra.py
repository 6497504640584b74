"""Random matrices by their singular values: float32, the same for the same seed."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

_NOISE = 0.02  # standard deviation of an entry, as Llama is initialised
_RANK = 256  # singular values that stand out of the noise at most
_DECAY = 0.7  # k-th of them falls as k^-0.7
_TOP = 25.0  # the first, in units of the noise's largest: so about 100 stand out
_GAP = 1e-3


def gaussian(rows: int, columns: int, random: Generator) -> Tensor:
    """Noise alone, without structure: leading singular values a few 1e-4 of the first apart."""
    return torch.randn(rows, columns, generator=random).mul_(_NOISE)


def decaying(rows: int, columns: int, random: Generator) -> Tensor:
    """Noise and a part of low rank whose singular values fall as k^-0.7, made without any SVD."""
    noise = gaussian(rows, columns, random)
    count = min(_RANK, rows // 2, columns // 2)
    top = _TOP * _NOISE * (math.sqrt(rows) + math.sqrt(columns))
    values = top * torch.arange(1, count + 1).pow(-_DECAY)
    # Gaussian columns of length one are nearly orthogonal, so `values` are nearly singular values.
    left = torch.randn(rows, count, generator=random).mul_(values / math.sqrt(rows))
    right = torch.randn(count, columns, generator=random).div_(math.sqrt(columns))
    return noise.addmm_(left, right)


def spaced(rows: int, columns: int, random: Generator) -> Tensor:
    """σ_k = exp(-k / 1000), neighbours 1e-3 apart; made in float64 and rounded."""
    count = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(side, count, dtype=torch.float64, generator=random))[0]
        for side in (rows, columns)
    )
    values = torch.arange(count, dtype=torch.float64).mul_(-_GAP).exp_()
    return ((left * values) @ right.T).float()


SPECTRA: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "decaying": decaying,
    "gaps 1e-3": spaced,
    "gaussian": gaussian,
}
