"""The leading singular triplets of a weight, found without a full SVD, with a certificate.

Block Lanczos on a CPU and filtered subspace iteration on a GPU, both on the Gram matrix of the
short side; small problems go to an eigensolver instead. In float64, or found in float32 and then
refined. What is found is measured against W in float64, and what cannot be certified is found by
the full SVD. Why these methods, and what else was measured: `docs/solver.md`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.basis.certificate import Certificate, Found, measured, rayleigh_ritz
from psoft_export.basis.chebyshev import chebyshev_space
from psoft_export.basis.lanczos import lanczos_spaces
from psoft_export.basis.refinement import refined
from psoft_export.basis.space import Space
from psoft_export.basis.svd import Triplets
from psoft_export.basis.tall_matrix import TallMatrix, Workspace

SOLVER = "leading-triplets/9"  # goes up whenever the bits of a result can change

_SMALL_SIDE = 512  # up to here an eigensolver of the whole Gram matrix is cheaper
_LARGE_SHARE = 1 / 8  # r beyond this share of the short side: likewise


@dataclass(frozen=True)
class Solution:
    """Leading triplets, float32 (rounded once from float64), and their certificate."""

    triplets: Triplets
    certificate: Certificate


def leading_triplets(weight: Tensor, rank: int, workspace: Workspace | None = None) -> Solution:
    """The r leading singular triplets of W, as a float64 SVD rounded to float32 would give them.

    Deterministic for a given device and thread count. Signs are arbitrary, as those of any SVD.

    Args:
        weight: W, out × in, float32, float16 or bfloat16, finite, on the device to compute on.
        rank: r, at most min(out, in).
        workspace: memory to use again, where several weights follow one another.

    Returns:
        The triplets and what certifies them. `certificate.method` is `svd` where the faster
        methods could not be certified (no gap behind the vectors, W of lower rank, say).
    """
    memory = workspace or Workspace()
    matrix = TallMatrix(weight, memory)
    kept = min(matrix.size, rank + max(16, rank // 4))
    for found in _attempts(matrix, rank, kept, memory):
        if found.certificate.accepted:
            break
    left, right = (found.far.T, found.near) if matrix.is_tall else (found.near.T, found.far)
    triplets = Triplets(left, found.values, right).truncated(rank).to(torch.float32)
    return Solution(triplets, found.certificate)


def _attempts(matrix: TallMatrix, rank: int, kept: int, memory: Workspace) -> Iterator[Found]:
    """What each method finds, the cheapest first; the last is taken as it comes."""
    for space in _spaces(matrix, rank, kept, memory):
        found = rayleigh_ritz(matrix, space, rank)
        if space.following is not None:
            found = refined(matrix, found, rank, space.following)
        yield found
    # CUDA's own choice (Jacobi) leaves residuals above what float64 can do.
    driver = None if matrix.device.type == "cpu" else "gesvd"
    left, values, right = torch.linalg.svd(matrix.whole(), full_matrices=False, driver=driver)
    yield measured(matrix, left.T[:kept], values[:kept], right[:kept], rank, "svd")


def _spaces(matrix: TallMatrix, rank: int, kept: int, memory: Workspace) -> Iterator[Space]:
    if matrix.size > _SMALL_SIDE and rank <= _LARGE_SHARE * matrix.size:
        if matrix.device.type == "cpu":
            yield from lanczos_spaces(matrix, rank, kept, memory)
        elif (space := chebyshev_space(matrix, rank)) is not None:
            yield space
    _, vectors = torch.linalg.eigh(matrix.gram())
    yield Space(vectors.flip(1)[:, :kept].T, "gram")
