"""A low-rank product as two factors: cut to fewer columns, and how far from another it is."""

import math

import torch
from torch import Tensor


def spectral_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same product with factors in the order of its singular values.

    Only matrices as small as the rank are decomposed: with left = Q₁ T₁ and rightᵀ = Q₂ T₂, the
    singular values of the product are those of the core T₁ T₂ᵀ (r × r).

    Args:
        left: out × r, float64.
        right: r × in, float64, same device; r at most out and in.

    Returns:
        left' (out × r, columns U σ), right' (r × in, orthonormal rows) with left' right' =
        left right, and σ (r, descending).
    """
    tall, tall_core = torch.linalg.qr(left)
    wide, wide_core = torch.linalg.qr(right.T)
    inner, values, outer = torch.linalg.svd(tall_core @ wide_core.T)
    return tall @ (inner * values), outer @ wide.T, values


def needed_rank(values: Tensor, tolerance: float) -> int:
    """The fewest leading singular values that leave at most `tolerance` of the Frobenius norm.

    Args:
        values: singular values, descending.
        tolerance: relative; 0 keeps all but exact zeros. At least one is kept.
    """
    left_out = values.double().square().flip(0).cumsum(0).flip(0).sqrt()  # from each to the last
    return max(1, int((left_out > tolerance * left_out[0]).sum()))


def product_norm(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖_F from the r × r Gram matrices, without forming the product."""
    squared = torch.sum((left.T @ left) * (right @ right.T))
    return math.sqrt(max(float(squared), 0.0))


def product_difference(
    left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor
) -> float:
    """‖left @ right − other_left @ other_right‖_F, exact also where the two nearly agree.

    Args:
        left: out × r, right: r × in, float64.
        other_left: out × k, other_right: k × in, float64, k ≤ r: close to the first k columns
            and rows.
    """
    rank = other_left.shape[1]
    # L R − L' R' = (L₁ − L') R' + L₁ (R₁ − R') + L₂ R₂, so that nothing large cancels.
    first, second = left[:, :rank], right[:rank]
    lefts = torch.cat([first - other_left, first, left[:, rank:]], dim=1)
    rights = torch.cat([other_right, second - other_right, right[rank:]])
    return product_norm(lefts, rights)
