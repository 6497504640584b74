"""From vectors found in float32 to vectors right to float32: corrections measured in float64.

Each round measures in float64 how far the vectors are from singular vectors of W, solves in
float32 for what is missing, and turns the sum to the triplets within it. What float32 does wrong
is of the order of the correction, so each round adds about four digits. The equation is that of
Jacobi–Davidson (Sleijpen and van der Vorst, SIAM J. Matrix Anal. Appl. 17, 1996).
"""

import torch
from torch import Tensor

from psoft_export.basis.certificate import Found, rayleigh_ritz
from psoft_export.basis.space import TOLERANCE, RitzPairs, Space
from psoft_export.basis.tall_matrix import TallMatrix

_MOST_ROUNDS = 4
_LEAST_GAIN = 8.0  # by which a round must lower the error, or it leads nowhere
_AIM = 1 / 2  # of the tolerance: what is solved for
_MOST_EXACT = 1e-5  # of a residual: what float32 can surely solve for
_MOST_STEPS = 60


def refined(matrix: TallMatrix, found: Found, rank: int, following: RitzPairs) -> Found:
    """The triplets with the first r within `TOLERANCE`, or as near to it as this comes.

    Args:
        matrix: W; its Gram matrix is formed in float32, if it is not yet.
        found: triplets right to a few digits, more than r of them.
        rank: r.
        following: Ritz pairs after those found, roughly; they speed it up.
    """
    for _ in range(_MOST_ROUNDS):
        before = found.certificate
        if before.vector_error <= TOLERANCE:
            break
        vectors = found.near.clone()
        vectors[:rank] += _corrections(matrix, found, rank, following)
        if not torch.isfinite(vectors).all():
            break
        orthonormal = torch.linalg.qr(vectors.T)[0].T
        space = Space(orthonormal, before.method, before.columns)
        found = rayleigh_ritz(matrix, space, rank)
        if not found.certificate.vector_error <= before.vector_error / _LEAST_GAIN:
            break
    return found


def _corrections(matrix: TallMatrix, found: Found, rank: int, following: RitzPairs) -> Tensor:
    """What to add to each of the first r vectors (r × k, float64): t of (λ − G) t = G v − λ v.

    With λ = σ², G the Gram matrix and t orthogonal to every vector found; there λ − G is positive
    definite. By conjugate gradients in float32 on all at once, each until its own error allows.
    """
    matrix.gram(torch.float32)
    near = found.near.to(torch.float32)
    wrong = (found.errors > _AIM * TOLERANCE).nonzero().squeeze(1).to(near.device)
    wanted = (_AIM * TOLERANCE / found.errors).clamp(min=_MOST_EXACT).to(near)
    lengths = torch.linalg.vector_norm(found.residuals[:rank], dim=1, keepdim=True)
    shifts = found.values[:rank, None].square().to(torch.float32)
    solution = torch.zeros(rank, matrix.size, dtype=torch.float32, device=near.device)
    # Below, rows are of those vectors that are still to be corrected, of residuals of length one.
    residual = _outside(near, (found.residuals[wrong] / lengths[wrong]).to(torch.float32))
    direction, power = torch.zeros_like(residual), torch.ones_like(shifts[wrong])
    for _ in range(_MOST_STEPS):
        if not len(wrong):
            break
        shift = shifts[wrong]
        image = _preconditioned(residual, shift, following)
        previous, power = power, _dots(residual, image)
        direction = image.addcmul_(direction, power / previous)
        image = _outside(near, shift * direction - matrix.gram_product(direction))
        step = power / _dots(direction, image)
        solution.index_add_(0, wrong, step * direction)
        residual = residual.addcmul_(step, image, value=-1)
        left = torch.linalg.vector_norm(residual, dim=1) > wanted[wrong]
        if not left.all():
            wrong, residual = wrong[left], residual[left]
            direction, power = direction[left], power[left]
    corrections: Tensor = solution * (lengths * found.values[:rank, None])
    return corrections


def _outside(near: Tensor, rows: Tensor) -> Tensor:
    """Rows without what they have of the vectors found; in place."""
    rest: Tensor = rows.addmm_(rows @ near.T, near, alpha=-1)
    return rest


def _preconditioned(rows: Tensor, shift: Tensor, following: RitzPairs) -> Tensor:
    """(λ − G)⁻¹ of rows, as if G were zero but for the Ritz pairs."""
    values = following.values
    along = (rows @ following.vectors.T) * (1 / (shift - values) - 1 / shift)
    image: Tensor = (rows / shift).addmm_(along, following.vectors)
    return image


def _dots(rows: Tensor, others: Tensor) -> Tensor:
    return (rows * others).sum(1, keepdim=True)
