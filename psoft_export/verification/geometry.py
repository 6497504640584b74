"""What a rotation keeps: norms, angles and hyperspherical energy in the principal subspace.

The columns meant are the paper's (arXiv 2505.11235v2, section 4): one vector for each output,
the rows of scaling · B A. The rotation takes them to the rows of scaling · B R A.
"""

import math

import torch
from torch import Tensor

from psoft_export.algebra.parameters import RotationParameters
from psoft_export.algebra.rotation import rotation_angles
from psoft_export.basis.svd import Basis, BasisOptions
from psoft_export.reference.rotation import reference_rotation
from psoft_export.verification.figures import GeometryFigures

SAMPLE = 256  # columns whose pairs are compared, evenly spaced
_ORTHOGONAL = 1e-10  # of ‖RᵀR − I‖ in float64
_KEPT = 1e-5  # of norms and angles in radians, where A is orthonormal in float32
_RESIDUAL = 1e-4  # of a float32 SVD, relative to σ₁
_HALF_UNITS = 4  # of a half dtype's epsilon, where training held A and B in one
_TOO_CLOSE = 1e-12  # of two columns' distance: their energy is not a number to compare
_BLOCK_ROWS = 512


def examine(
    module: str,
    weight: Tensor,
    basis: Basis,
    parameters: RotationParameters,
    options: BasisOptions,
) -> GeometryFigures:
    """The geometry of one module.

    Args:
        module: its path.
        weight: W (out × in) as training had it, any floating dtype.
        basis: A and B, on the same device.
        parameters: of R.
        options: how A and B are scaled.
    """
    turn = reference_rotation(parameters)
    down = basis.a.double()
    before, after = _columns(basis, turn, options.scaling)
    norms = torch.linalg.vector_norm(before, dim=1)
    used = norms > 0
    changed = torch.linalg.vector_norm(after, dim=1)[used] / norms[used] - 1
    first, second = _unit(before[used]), _unit(after[used])
    angles = torch.rad2deg((_angles(second) - _angles(first)).abs())
    turned = torch.rad2deg(rotation_angles(parameters))
    strict = (
        parameters.orthogonal
        and parameters.series is None
        and all(_is_one(vector) for vector in (parameters.vector_a, parameters.vector_b))
        and options.initialisation == "psoft_init"
    )
    return GeometryFigures(
        module=module,
        strict=strict,
        orthogonality_error=float(
            torch.linalg.matrix_norm(turn.T @ turn - torch.eye(len(turn), dtype=turn.dtype))
        ),
        norm_change=_largest(changed),
        angle_change=_largest(angles),
        energy_change=abs(_energy(second) / energy - 1) if (energy := _energy(first)) else 0.0,
        basis_residual=_residual(
            weight,
            down,
            basis.b.double(),
            options.scaling,
            balanced=options.initialisation == "pissa_init",
        ),
        largest_angle=float(turned[0]),
        median_angle=float(turned.median()),
    )


def problems(figures: GeometryFigures, held: torch.dtype, exact_basis: bool) -> list[str]:
    """What is wrong with one module's geometry.

    Args:
        figures: of the module.
        held: dtype in which training held A and B.
        exact_basis: whether the basis comes from a full SVD, not a low-rank approximation.
    """
    coarse = _HALF_UNITS * torch.finfo(held).eps if held.itemsize == 2 else 0.0
    found = []
    if exact_basis and not figures.basis_residual <= max(_RESIDUAL, coarse):
        found.append(
            f"module '{figures.module}': its basis is not one of this weight (residual "
            f"{figures.basis_residual:.1e} of the largest singular value)"
        )
    kept = max(_KEPT, coarse)
    moved = max(figures.norm_change, math.radians(figures.angle_change))
    if figures.strict and not (figures.orthogonality_error <= _ORTHOGONAL and moved <= kept):
        found.append(
            f"module '{figures.module}': a strict rotation that does not keep the geometry "
            f"(‖RᵀR − I‖ {figures.orthogonality_error:.1e}, norms {figures.norm_change:.1e}, "
            f"angles {figures.angle_change:.1e}°)"
        )
    return found


def _columns(basis: Basis, turn: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A sample of the rows of scaling · B A and of scaling · B R A, in r coordinates.

    A = (lower triangle) (orthonormal rows), so lengths and angles are those of the triangle.
    """
    _, triangle = torch.linalg.qr(basis.a.double().T, mode="r")
    rows = basis.b.shape[0]
    chosen = torch.linspace(0, rows - 1, min(rows, SAMPLE)).round().long()
    up = scaling * basis.b[chosen.to(basis.b.device)].double()
    return up @ triangle.T, up @ turn.to(up.device) @ triangle.T


def _unit(vectors: Tensor) -> Tensor:
    units: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return units


def _angles(units: Tensor) -> Tensor:
    """Pairwise angles of unit vectors in radians, as accurate for small as for large ones.

    2 atan2(‖x − y‖, ‖x + y‖), of the distances themselves rather than of cosines (Kahan).
    """
    halves: Tensor = torch.atan2(_distances(units, units), _distances(units, -units))
    return 2 * halves


def _energy(units: Tensor) -> float:
    """Σ 1 / ‖ŵᵢ − ŵⱼ‖ over all pairs (hyperspherical energy with s = 1, Liu et al., 2018)."""
    distances = _distances(units, units)
    apart = distances.triu(1)
    return float((1 / apart[apart > _TOO_CLOSE]).sum())


def _distances(first: Tensor, second: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"
    distances: Tensor = torch.cdist(first, second, compute_mode=exact)
    return distances


def _residual(weight: Tensor, down: Tensor, up: Tensor, scaling: float, *, balanced: bool) -> float:
    """How far A and B are from singular vectors of W, in float64, W in row blocks.

    The largest of ‖W vᵢ − σᵢ uᵢ‖ / σ₁, of |⟨vᵢ, vⱼ⟩ − δᵢⱼ|, and of what the lengths of A's rows
    are off (1 for `psoft_init`, those of B's columns for `pissa_init`).
    """
    lengths = torch.linalg.vector_norm(down, dim=1)
    used = lengths > 0  # of `pissa_init`, none where σᵢ is 0
    right = (down[used] / lengths[used, None]).T
    image = (scaling * up * lengths)[:, used]  # σᵢ uᵢ in either initialisation
    wanted = torch.linalg.vector_norm(up, dim=0) if balanced else torch.ones_like(lengths)
    off = _largest(lengths - wanted) / (_largest(wanted) or 1.0)
    gram = right.T @ right
    off = max(off, _largest(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
    squares = torch.zeros_like(lengths[used])
    for start in range(0, weight.shape[0], _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        squares += (weight[rows].double() @ right - image[rows]).square().sum(dim=0)
    largest = _largest(torch.linalg.vector_norm(image, dim=0)) or 1.0  # W is zero
    return max(off, _largest(squares.sqrt()) / largest)


def _is_one(vector: Tensor | None) -> bool:
    return vector is None or bool((vector == 1).all())


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
