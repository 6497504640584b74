"""The rotation R and ΔW = scaling · B (R − I) A, a second time.

Written out again on purpose: nothing of `algebra` is used, the rotation is computed by other
formulas and the products are taken in another order, so that a mistake there shows here.
"""

import math

import torch
from torch import Tensor

from psoft_export.algebra.parameters import CayleyNeumann, RotationParameters
from psoft_export.reference.expected import DeltaProduct, Expected


def reference_rotation(parameters: RotationParameters) -> Tensor:
    """R (r × r, float64, CPU) from an adapter's stored parameters.

    Cayley(Q) as 2 (I − Q)⁻¹ − I; the Cayley–Neumann series by Horner's scheme on its
    coefficients 1, 2, …, 2, 1.
    """
    rank = parameters.rank
    stored = parameters.weight.to("cpu", torch.float64)
    identity = torch.eye(rank, dtype=torch.float64)
    if not parameters.orthogonal:
        turn = stored.clone()
    else:
        generator = _generator(parameters)
        if parameters.series is None:
            turn = 2 * torch.linalg.inv(identity - generator) - identity
        else:
            turn = _series(generator, parameters.series)
    for vector, shape in ((parameters.vector_b, (rank, 1)), (parameters.vector_a, (1, rank))):
        if vector is not None:
            turn = turn * vector.to("cpu", torch.float64).reshape(shape)
    return turn


def rotation_condition(parameters: RotationParameters) -> float:
    """How much a rotation magnifies rounding: ‖I − Q‖₂ of the exact Cayley transform, else 1.

    ‖(I − Q)⁻¹‖₂ is at most 1. Towards half turns ‖I − Q‖₂ = 1 / cos(angle / 2) grows.
    """
    if not parameters.orthogonal or parameters.series is not None:
        return 1.0
    system = torch.eye(parameters.rank, dtype=torch.float64) - _generator(parameters)
    return float(torch.linalg.matrix_norm(system, 2))


def _generator(parameters: RotationParameters) -> Tensor:
    """Q from its entries above the diagonal, row by row as `triu_indices` goes."""
    rank = parameters.rank
    above = torch.ones(rank, rank, dtype=torch.bool).triu(1)
    upper = torch.zeros(rank, rank, dtype=torch.float64)
    upper[above] = parameters.weight.to("cpu", torch.float64)
    return upper - upper.mT


def _series(generator: Tensor, series: CayleyNeumann) -> Tensor:
    bound = series.max_norm
    if bound is not None and (norm := float(generator.square().sum().sqrt())) > bound:
        generator = generator * (bound / (norm + 1e-12))  # 1e-12: PEFT's own
    coefficients = _coefficients(series)
    identity = torch.eye(generator.shape[0], dtype=torch.float64)
    total = coefficients[-1] * identity
    for coefficient in reversed(coefficients[:-1]):
        total = coefficient * identity + generator @ total
    return total


def _coefficients(series: CayleyNeumann) -> list[float]:
    """Of 1, Q, Q², … in the series."""
    terms = series.terms
    if series.convention == "paper":
        return [1.0, *[2.0] * max(terms, 0), 1.0]
    if terms <= 1:
        return [1.0]
    return [1.0, 2.0] if terms == 2 else [1.0, *[2.0] * (max(terms, 4) - 2), 1.0]


def expected_product(
    a: Tensor, b: Tensor, parameters: RotationParameters, scaling: float
) -> Expected:
    """ΔW = B (scaling · (R A − A)).

    Args:
        a: A, r × in. b: B, out × r. Any floating dtype, same device.
        parameters: of R.
        scaling: alpha / r.
    """
    down, up = a.to(torch.float64), b.to(torch.float64)
    turn = reference_rotation(parameters)
    # By how much columns of |R| |A| are longer than those of A at most: ‖|R|‖₂, or a little more.
    sums = turn.abs().sum(0).max() * turn.abs().sum(1).max()
    growth = math.sqrt(float(sums))
    right = scaling * (turn.to(down.device) @ down - down)
    lengths = torch.linalg.vector_norm(down, dim=0)
    return Expected(
        delta=DeltaProduct(up, right),
        reach_left=torch.linalg.vector_norm(up, dim=1),
        reach_right=abs(scaling) * (growth + 1) * lengths,
        terms=up.shape[1],
        condition=rotation_condition(parameters),
    )
