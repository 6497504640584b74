"""The leading singular triplets of a weight, found without a full SVD, with a certificate.

Block Lanczos on a CPU and filtered subspace iteration on a GPU, both on the Gram matrix of the
short side and in float64 throughout; small problems go to an eigensolver instead. What is found is
measured against W afterwards, and what cannot be certified is found by the full SVD. Why these
methods, and what else was measured: `docs/solver.md`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.basis.chebyshev import chebyshev_space
from psoft_export.basis.lanczos import lanczos_space
from psoft_export.basis.space import EPS, Space
from psoft_export.basis.svd import Triplets
from psoft_export.basis.tall_matrix import TallMatrix, Workspace

SOLVER = "leading-triplets/5"  # goes up whenever the bits of a result can change

_ACCEPTED = 2.0**-24
_RESIDUAL_FLOOR = 256 * EPS  # what float64 products leave, relative to σ₁
_SMALL_SIDE = 512  # up to here an eigensolver of the whole Gram matrix is cheaper
_LARGE_SHARE = 1 / 8  # r beyond this share of the short side: likewise


@dataclass(frozen=True)
class Certificate:
    """What is known of a set of triplets, measured afterwards in float64 against W.

    Attributes:
        method: `block-lanczos`, `chebyshev`, `gram` or `svd`.
        residual: the largest ‖Wᵀuᵢ − σᵢvᵢ‖ for i ≤ r (‖Wvᵢ − σᵢuᵢ‖ where W has fewer rows than
            columns), relative to σ₁; the other of the two is zero to rounding by construction.
        orthogonality: the largest entry of |UᵀU − I| and |VᵀV − I|.
        vector_error: bound of the angle between a found vector and the true one, in radians,
            turning among the found vectors themselves apart (of second order in the residual).
        gap: the smallest distance of neighbours among σ₁ … σ_{r+1}, relative to σ₁.
        next_value: σ_{r+1}, or 0 where there is none.
        columns: dimension of the Krylov space; 0 for the other methods.
    """

    method: str
    residual: float
    orthogonality: float
    vector_error: float
    gap: float
    next_value: float
    columns: int

    @property
    def accepted(self) -> bool:
        """Whether the vectors are right to float32, or as right as float64 can make them."""
        if not self.orthogonality <= _ACCEPTED:
            return False
        return self.vector_error <= _ACCEPTED or self.residual <= _RESIDUAL_FLOOR


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
    size = matrix.size
    kept = min(size, rank + max(16, rank // 4))
    found = None
    if size > _SMALL_SIDE and rank <= _LARGE_SHARE * size:
        if weight.device.type == "cpu":
            space = lanczos_space(matrix, rank, kept, memory)
        else:
            space = chebyshev_space(matrix, rank)
        found = _certified(matrix, space, rank)
    if found is None:
        found = _certified(matrix, _gram(matrix, kept), rank)
    if found is None:
        found = _full(matrix, kept, rank)
    near, values, far, certificate = found
    left, right = (far.T, near) if matrix.is_tall else (near.T, far)
    triplets = Triplets(left, values, right).truncated(rank).to(torch.float32)
    return Solution(triplets, certificate)


# Below, singular vectors stand in rows: `near` (p × k) on the short side of W, `far` (p × l) on
# the long one.
_Found = tuple[Tensor, Tensor, Tensor, Certificate]


def _certified(matrix: TallMatrix, space: Space | None, rank: int) -> _Found | None:
    """The triplets within a space, or None where they cannot be certified."""
    if space is None:
        return None
    # Rayleigh–Ritz: the products of `near` with W are values · far by construction.
    orthonormal, triangle = torch.linalg.qr(matrix.to_long_side(space.vectors).T)
    turn, values, far = torch.linalg.svd(triangle.T)
    near, far = turn.T @ space.vectors, far @ orthonormal.T
    certificate = _certificate(matrix, near, values, far, rank, space.method, space.columns)
    return (near, values, far, certificate) if certificate.accepted else None


def _full(matrix: TallMatrix, kept: int, rank: int) -> _Found:
    # CUDA's own choice (Jacobi) leaves residuals above what float64 can do.
    driver = None if matrix.device.type == "cpu" else "gesvd"
    left, values, right = torch.linalg.svd(matrix.whole(), full_matrices=False, driver=driver)
    near, values, far = left.T[:kept], values[:kept], right[:kept]
    return near, values, far, _certificate(matrix, near, values, far, rank, "svd", 0)


def _gram(matrix: TallMatrix, kept: int) -> Space:
    _, vectors = torch.linalg.eigh(matrix.gram())
    return Space(vectors.flip(1)[:, :kept].T, "gram")


def _certificate(
    matrix: TallMatrix,
    near: Tensor,
    values: Tensor,
    far: Tensor,
    rank: int,
    method: str,
    columns: int,
) -> Certificate:
    residual = torch.linalg.vector_norm(
        matrix.to_short_side(far) - values[:, None] * near, dim=1
    ).cpu()
    sigma = values.cpu()
    whole = len(sigma) == matrix.size
    outside = 0.0 if whole else float(sigma[-1] + residual[-1])
    inner = sigma[:rank]
    distance = (inner.square() - outside**2).clamp(min=0)
    error = torch.where(residual[:rank] > 0, residual[:rank] * inner / distance, 0.0)
    identity = torch.eye(len(sigma), dtype=torch.float64, device=near.device)
    skew = max(float((v @ v.T - identity).abs().max()) for v in (near, far))
    following = float(sigma[rank]) if rank < len(sigma) else 0.0
    steps = inner - torch.cat([inner[1:], torch.tensor([following], dtype=torch.float64)])
    largest = float(sigma[0]) or 1.0
    return Certificate(
        method=method,
        residual=float(residual[:rank].max()) / largest,
        orthogonality=skew,
        vector_error=float(error.nan_to_num(math.inf).max()),
        gap=float(steps.min()) / largest,
        next_value=following,
        columns=columns,
    )
