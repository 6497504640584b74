"""Subspace iteration with a Chebyshev filter: the way to a leading space on a GPU.

Wide blocks and few steps, which is what a GPU is fast at, where block Lanczos takes narrow ones
and many. In float64, with the Gram matrix of the short side formed once. The method: Zhou, Saad,
Tiago and Chelikowsky, J. Comput. Phys. 219, 2006; why here: `docs/solver.md`.
"""

import math

import torch
from torch import Tensor

from psoft_export.basis.space import EPS, TOLERANCE, Space, random_rows
from psoft_export.basis.tall_matrix import TallMatrix

_FEWEST_EXTRA = 128  # vectors iterated beyond r; more make each filter sharper
_EXTRA_SHARE = 1 / 2  # of r, the same
_HIGHEST_DEGREE = 24  # of one filter; after it, where the wanted values end is known better
# By which a filter may magnify the first vector more than the last: float64 still tells the last
# one from the first, to a few digits, which the rounds to come make more.
_MOST_CONTRAST = 1e12
_INDEPENDENT = 1e-5  # what is left of a vector without those before it, for Cholesky to do
_MOST_ROUNDS = 60
_PATIENCE = 6  # rounds in which the error must have been halved


def chebyshev_space(matrix: TallMatrix, rank: int) -> Space | None:
    """The leading Ritz vectors of the Gram matrix, or None where they do not converge.

    Stops when the first `rank` of them are within `TOLERANCE` by their residuals, and returns
    besides them half of what is iterated beyond: the rest has hardly converged.
    """
    size = matrix.size
    extra = max(_FEWEST_EXTRA, int(_EXTRA_SHARE * rank))
    count, kept = min(size, rank + extra), min(size, rank + extra // 2)
    gram = matrix.gram()
    vectors = random_rows(count, size, matrix.device)
    errors: list[float] = []
    while len(errors) < _MOST_ROUNDS:
        image = vectors @ gram
        values, turn = torch.linalg.eigh(image @ vectors.T)
        values, turn = values.flip(0), turn.flip(1).T
        vectors, image = turn @ vectors, turn[:rank] @ image
        residuals = image.addcmul_(values[:rank, None], vectors[:rank], value=-1)
        distances, values = torch.linalg.vector_norm(residuals, dim=1).cpu(), values.cpu()
        if float(values[rank - 1]) <= EPS * size * float(values[0]):
            return None  # W has fewer directions than asked for
        # Infinite where no gap is found behind the vectors.
        error = float((distances / (values[:rank] - values[kept - 1]).clamp(min=0)).max())
        if error <= TOLERANCE:
            return Space(vectors[:kept], "chebyshev")
        errors.append(error)
        if len(errors) > _PATIENCE and not error <= errors[-1 - _PATIENCE] / 2:
            return None
        cut = max(float(values[-1]), EPS * float(values[0]))
        allowed = math.acosh(_MOST_CONTRAST) / _growth(float(values[0]), cut)
        needed = math.acosh(2 * min(error, 1 / EPS) / TOLERANCE) / _growth(
            float(values[rank - 1]), cut
        )
        degree = max(1, int(min(allowed, math.ceil(needed), _HIGHEST_DEGREE)))
        vectors = _filtered(vectors, gram, cut, degree)
    return None


def _growth(value: float, cut: float) -> float:
    """By how much (its logarithm) each degree magnifies an eigenvalue beyond `cut`."""
    return math.acosh(max(2 * value / cut - 1, 1 + EPS))


def _filtered(vectors: Tensor, gram: Tensor, cut: float, degree: int) -> Tensor:
    """The vectors (rows) times a Chebyshev polynomial of the Gram matrix, orthonormal again.

    On eigenvalues in [0, cut] it is at most 1, and beyond grows as fast as a polynomial can.
    """
    step = 4 / cut  # from eigenvalues to [-1, 1], twice
    before, now = vectors, torch.addmm(vectors, vectors, gram, beta=-1, alpha=step / 2)
    for _ in range(degree - 1):
        following = torch.addmm(before, now, gram, beta=-1, alpha=step).sub_(now, alpha=2)
        before, now = now, following
    return _orthonormal(now / torch.linalg.vector_norm(now, dim=1, keepdim=True))


def _orthonormal(vectors: Tensor) -> Tensor:
    """Orthonormal vectors that span the same, of vectors (rows) of length one.

    By Cholesky factors of their products, twice, which a GPU is fast at; by QR where they depend
    on one another so far that this would not be exact.
    """
    rows: Tensor = vectors
    for _ in range(2):
        factor, problem = torch.linalg.cholesky_ex(rows @ rows.T)
        if int(problem) or float(factor.diagonal().min()) < _INDEPENDENT:
            rows = torch.linalg.qr(vectors.T)[0].T.contiguous()
            break
        rows = torch.linalg.solve_triangular(factor, rows, upper=False)
    return rows
