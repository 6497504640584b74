"""Rotations and their logarithms: the orthogonal group SO(r) and its Lie algebra so(r).

All in float64 on the CPU. A rotation C turns r/2 planes by angles θ; its logarithm is the skew
matrix that turns them at the speed θ, and its generator Q, with C = Cayley(Q), the one with
tan(θ/2). Both exist and are unique where no angle is π.
"""

import math

import torch
from torch import Tensor

# Radians from π below which an angle counts as π − HALF_TURN, in a plane chosen among those that
# fit: cosines, from which it is told, have about 1e-16, and 1 + cos is half the square of this.
HALF_TURN = 1e-6

_LARGEST = math.tan((math.pi - HALF_TURN) / 2)  # of a generator's eigenvalues
_SINGULAR = 1e-12  # relative: a smaller singular value leaves the polar factor undetermined


class NotARotationError(ValueError):
    """A matrix has no rotation in it: it is singular, or turns space inside out."""


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """C and P with matrix = C P: the nearest rotation, and a symmetric positive definite factor.

    Raises:
        NotARotationError: the matrix is singular, or its determinant is negative.
    """
    left, values, right = torch.linalg.svd(matrix)
    if values[-1] <= _SINGULAR * values[0]:
        raise NotARotationError("is singular")
    rotation: Tensor = left @ right
    if torch.linalg.det(rotation) < 0:
        raise NotARotationError("holds a reflection (its determinant is negative)")
    return rotation, right.T @ (values[:, None] * right)


def generator(rotation: Tensor) -> Tensor:
    """Q with Cayley(Q) = C, skew: (C − I)(C + I)⁻¹. Angles near π: see `HALF_TURN`."""
    at_once = _tame_generator(rotation)
    if at_once is not None:
        return at_once
    reversed_, others = _split(rotation)
    if not reversed_.shape[1]:
        return _inverse_cayley(rotation)
    rest = _inverse_cayley(others.T @ rotation @ others)
    turn = torch.zeros(reversed_.shape[1], reversed_.shape[1], dtype=rotation.dtype)
    first = torch.arange(0, len(turn), 2)
    turn[first, first + 1], turn[first + 1, first] = -_LARGEST, _LARGEST
    return others @ rest @ others.T + reversed_ @ turn @ reversed_.T


def half_turns(rotation: Tensor) -> int:
    """In how many planes C turns by π, so that its logarithm is not unique."""
    if _tame_generator(rotation) is not None:
        return 0
    return _split(rotation)[0].shape[1] // 2


def logarithm(rotation: Tensor) -> Tensor:
    """The principal logarithm of C, skew. Angles near π: see `HALF_TURN`.

    Of a generator with eigenvalues −iλ the rotation has the angles −2·atan(λ): Hermitian
    eigenvectors, which stay orthogonal where angles coincide.
    """
    values, vectors = torch.linalg.eigh(1j * generator(rotation))
    angles = -2 * values.atan()
    turned: Tensor = (vectors * (1j * angles)) @ vectors.mH
    return _skew(turned.real)


def exponential(skew: Tensor) -> Tensor:
    """The rotation whose logarithm is `skew`.

    By Hermitian eigenvectors: `torch.linalg.matrix_exp` (torch 2.13, CPU) was seen to err by
    3e-10 in float64.
    """
    values, vectors = torch.linalg.eigh(1j * skew)
    turned: Tensor = (vectors * torch.polar(torch.ones_like(values), -values)) @ vectors.mH
    return turned.real


def power(rotation: Tensor, exponent: float) -> Tensor:
    """C to a real power: every angle times `exponent`."""
    if exponent == 1:
        return rotation
    return exponential(exponent * logarithm(rotation))


def symmetric_logarithm(matrix: Tensor) -> Tensor:
    """The logarithm of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = vectors @ (values.log()[:, None] * vectors.T)
    return found


def symmetric_exponential(matrix: Tensor) -> Tensor:
    """The exponential of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    found: Tensor = vectors @ (values.exp()[:, None] * vectors.T)
    return found


def _tame_generator(rotation: Tensor) -> Tensor | None:
    """Q where its entries alone show that no angle is near π: the usual case, and a cheap one."""
    try:
        found = _inverse_cayley(rotation)
    except torch.linalg.LinAlgError:  # C + I is singular
        return None
    return found if float(found.abs().max()) < _LARGEST / len(rotation) else None


def _split(rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span the planes turned by π, and those that span the rest.

    Raises:
        NotARotationError: an odd number of directions is reversed.
    """
    cosines, vectors = torch.linalg.eigh((rotation + rotation.T) / 2)
    reversed_ = int((cosines < -math.cos(HALF_TURN)).sum())
    if reversed_ % 2:
        if torch.linalg.det(rotation) < 0:
            raise NotARotationError("holds a reflection (its determinant is negative)")
        reversed_ += 1  # its twin, on the other side of the limit by a rounding error
    return vectors[:, :reversed_], vectors[:, reversed_:]


def _inverse_cayley(rotation: Tensor) -> Tensor:
    identity = torch.eye(len(rotation), dtype=rotation.dtype)
    found = torch.linalg.solve(rotation + identity, rotation - identity, left=False)
    return _skew(found)


def _skew(matrix: Tensor) -> Tensor:
    return (matrix - matrix.T) / 2
