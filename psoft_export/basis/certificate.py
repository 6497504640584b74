"""Singular triplets of W within a space, and how right they are: measured against W, in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.basis.space import EPS, Space
from psoft_export.basis.tall_matrix import TallMatrix

_ACCEPTED = 2.0**-24
_RESIDUAL_FLOOR = 256 * EPS  # what float64 products leave, relative to σ₁


@dataclass(frozen=True)
class Certificate:
    """What is known of a set of triplets, measured afterwards in float64 against W.

    Attributes:
        method: `block-lanczos`, `mixed-lanczos`, `chebyshev`, `gram` or `svd`.
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
class Found:
    """Triplets found, float64, with singular vectors in rows; at least r of them.

    Attributes:
        near: those on the short side of W, p × k.
        values: singular values, p, descending.
        far: those on the long side, p × l.
        residuals: products of `far` with W less values · near, of the first r, and then of the
            last (others are not asked for).
        errors: of the first r, as `Certificate.vector_error`; on the CPU.
        certificate: what is known of the first r.
    """

    near: Tensor
    values: Tensor
    far: Tensor
    residuals: Tensor
    errors: Tensor
    certificate: Certificate


def rayleigh_ritz(matrix: TallMatrix, space: Space, rank: int) -> Found:
    """The triplets of W within a space."""
    vectors, images = space.vectors, space.images
    if images is None:
        images = matrix.to_long_side(vectors)
    # So the products of `near` with W are values · far by construction.
    orthonormal, triangle = torch.linalg.qr(images.T)
    turn, values, far = torch.linalg.svd(triangle.T)
    near, far = turn.T @ vectors, far @ orthonormal.T
    return measured(matrix, near, values, far, rank, space.method, space.columns)


def measured(
    matrix: TallMatrix,
    near: Tensor,
    values: Tensor,
    far: Tensor,
    rank: int,
    method: str,
    columns: int = 0,
) -> Found:
    """Triplets with their certificate, for whose `near` W gives values · far."""
    which = [*range(min(rank, len(values) - 1)), len(values) - 1]
    residuals = matrix.to_short_side(far[which]) - values[which, None] * near[which]
    distances, sigma = torch.linalg.vector_norm(residuals, dim=1).cpu(), values.cpu()
    whole = len(sigma) == matrix.size
    outside = 0.0 if whole else float(sigma[-1] + distances[-1])
    inner = sigma[:rank]
    room = (inner.square() - outside**2).clamp(min=0)
    errors = torch.where(distances[:rank] > 0, distances[:rank] * inner / room, 0.0)
    errors = errors.nan_to_num(math.inf)
    identity = torch.eye(len(sigma), dtype=torch.float64, device=near.device)
    skew = max(float((v @ v.T - identity).abs().max()) for v in (near, far))
    following = float(sigma[rank]) if rank < len(sigma) else 0.0
    steps = inner - torch.cat([inner[1:], torch.tensor([following], dtype=torch.float64)])
    largest = float(sigma[0]) or 1.0
    certificate = Certificate(
        method=method,
        residual=float(distances[:rank].max()) / largest,
        orthogonality=skew,
        vector_error=float(errors.max()),
        gap=float(steps.min()) / largest,
        next_value=following,
        columns=columns,
    )
    return Found(near, values, far, residuals, errors, certificate)
