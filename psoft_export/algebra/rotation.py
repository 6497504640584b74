"""The r × r algebra of PSOFT: from stored parameters to the rotation R, and what R does.

Letters as in the paper (arXiv 2505.11235v2, section 4): Q is the skew-symmetric generator,
C = Cayley(Q) its rotation, R = diag(vector_b) · C · diag(vector_a). All in float64 on the CPU:
r is at most a few hundred, and the rest of the merge can only be as exact as R.
"""

from dataclasses import replace

import torch
from torch import Tensor

from psoft_export.algebra.parameters import CayleyNeumann, RotationParameters


def generator_size(rank: int) -> int:
    """Number of free entries of an r × r skew-symmetric matrix: r(r−1)/2."""
    return rank * (rank - 1) // 2


def skew_symmetric(entries: Tensor, rank: int) -> Tensor:
    """Q (r × r, float64) from its entries above the diagonal: Q = upper − upperᵀ.

    Args:
        entries: r(r−1)/2 numbers in `torch.triu_indices(r, r, 1)` order, any floating dtype.
        rank: r.
    """
    upper = torch.zeros(rank, rank, dtype=torch.float64)
    rows, columns = torch.triu_indices(rank, rank, 1)
    upper[rows, columns] = entries.to("cpu", torch.float64)
    return upper - upper.T


def conjugated(parameters: RotationParameters, signs: Tensor) -> RotationParameters:
    """The parameters of D R D for D = diag(signs): the same adapter in a basis with other signs.

    D commutes with the scaling vectors, and every form of R is conjugated by conjugating what
    is stored.

    Args:
        parameters: of R.
        signs: r numbers, each 1 or −1.
    """
    signs = signs.to(parameters.weight.dtype)
    if parameters.orthogonal:
        rows, columns = torch.triu_indices(parameters.rank, parameters.rank, 1)
        factors = signs[rows] * signs[columns]
    else:
        factors = signs[:, None] * signs[None, :]
    return replace(parameters, weight=parameters.weight * factors)


def cayley(generator: Tensor) -> Tensor:
    """Cayley(Q) = (I + Q)(I − Q)⁻¹, orthogonal for skew-symmetric Q (paper, equation 6).

    I − Q is never singular: the eigenvalues of Q are purely imaginary.

    Args:
        generator: Q, … × r × r, any floating dtype, on any device.
    """
    identity = _identity(generator)
    solution: Tensor = torch.linalg.solve(identity - generator, identity + generator, left=False)
    return solution


def cayley_neumann(generator: Tensor, series: CayleyNeumann) -> Tensor:
    """The truncated Cayley–Neumann series of Q, term for term the one that training summed.

    PEFT 0.21 (`peft/tuners/psoft/layer.py`, `OrthLayer.get_matrix`) gives for t terms

        t ≤ 1: I      t = 2: I + 2Q      t ≥ 3: I + 2Q + 2Q² + 2 Σ_{k=3..t−2} Q^k + Q^(max(t,4)−1)

    so 3 and 4 terms mean the same series, and the last power has weight one, not two. The paper's
    code (`fei407/PSOFT`, `psoft_layers.py`) gives

        t ≤ 0: I + Q      t ≥ 1: I + 2 Σ_{k=1..t} Q^k + Q^(t+1)

    With `series.max_norm` Q is first scaled down to that Frobenius norm. Argument as of `cayley`.
    """
    if series.convention == "paper":
        return _paper_series(generator, series.terms)
    terms, bound = series.terms, series.max_norm
    if bound is not None:
        norm = torch.linalg.matrix_norm(generator)[..., None, None]
        # 1e-12 as in PEFT: without it the result differs in the last digits.
        generator = torch.where(norm > bound, generator * (bound / (norm + 1e-12)), generator)
    if terms <= 1:
        return _identity(generator).expand_as(generator)
    result = _identity(generator) + 2 * generator
    if terms == 2:
        return result
    power = generator @ generator
    result += 2 * power
    for _ in range(3, terms - 1):
        power = power @ generator
        result += 2 * power
    return result + power @ generator


def _paper_series(generator: Tensor, terms: int) -> Tensor:
    result, power = _identity(generator), generator
    for _ in range(terms):
        result = result + 2 * power
        power = power @ generator
    return result + power


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def peft_terms(series: CayleyNeumann) -> int | None:
    """How PEFT counts the terms of the same series; None where it has none such."""
    if series.convention == "peft":
        return series.terms
    return series.terms + 2 if series.terms >= 2 else None


def core_rotation(parameters: RotationParameters) -> Tensor:
    """C (r × r, float64): the rotation before the scaling vectors, or the free matrix."""
    if not parameters.orthogonal:
        return parameters.weight.to("cpu", torch.float64)
    generator = skew_symmetric(parameters.weight, parameters.rank)
    return turned_by(generator, parameters.series)


def turned_by(generator: Tensor, series: CayleyNeumann | None) -> Tensor:
    """C of a generator, by the Cayley transform or by a series; argument as of `cayley`."""
    return cayley(generator) if series is None else cayley_neumann(generator, series)


def rotation(parameters: RotationParameters) -> Tensor:
    """R = diag(vector_b) · C · diag(vector_a) (r × r, float64, CPU)."""
    matrix = core_rotation(parameters)
    if parameters.vector_b is not None:
        matrix = parameters.vector_b.to("cpu", torch.float64)[:, None] * matrix
    if parameters.vector_a is not None:
        matrix = matrix * parameters.vector_a.to("cpu", torch.float64)[None, :]
    return matrix


def orthogonality_error(matrix: Tensor) -> float:
    """‖MᵀM − I‖_F of an r × r matrix: zero to rounding for a rotation."""
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype)
    return float(torch.linalg.matrix_norm(matrix.T @ matrix - identity))


def rotation_angles(parameters: RotationParameters) -> Tensor:
    """The r rotation angles of C in radians, in [0, π], descending (each plane counts twice).

    For a generator with eigenvalues ±iλ the Cayley transform turns its planes by 2·atan(λ). The
    truncated series is a normal matrix, so the angles are those of its eigenvalues. A free
    matrix is first reduced to its orthogonal polar factor.
    """
    if parameters.orthogonal and parameters.series is None:
        generator = skew_symmetric(parameters.weight, parameters.rank)
        angles: Tensor = 2 * torch.linalg.eigvalsh(1j * generator).abs().atan()
    else:
        matrix = core_rotation(parameters)
        if not parameters.orthogonal:
            left, _, right = torch.linalg.svd(matrix)
            matrix = left @ right
        angles = torch.linalg.eigvals(matrix).angle().abs()
    return angles.sort(descending=True).values


def vector_deviation(vector: Tensor | None) -> float:
    """max |vᵢ − 1| of a scaling vector; zero when the adapter has none."""
    if vector is None:
        return 0.0
    return float((vector.to(torch.float64) - 1).abs().max())
