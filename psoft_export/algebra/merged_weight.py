"""The merged weight W + scaling · B (R − I) A, in float64, a few rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

# Rows of W in float64, which may be overwritten, and which rows they are → merged rows, float64;
# all contiguous.
MergeRows = Callable[[Tensor, slice], Tensor]

# Compute capabilities of P100, V100, A100, H100/H200 and B200.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the large product on `device`: float64 where the hardware is fast at it.

    Data-centre GPUs run float64 at half the float32 rate; other cards at 1/32 or 1/64 of it, so
    there the product is taken in float32.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) in _FAST_FLOAT64:
        return torch.float64
    return torch.float32


def product_error_bound(rank: int, dtype: torch.dtype) -> float:
    """Bound of |computed − exact| of an entry of ΔW, relative to (|B (R − I)| |A|)ᵢⱼ · scaling.

    The usual γ_r = r·u / (1 − r·u) of a dot product of length r (Higham, Accuracy and Stability
    of Numerical Algorithms, section 3.1), plus one rounding of the left factor.
    """
    unit = torch.finfo(dtype).eps / 2
    return (rank + 1) * unit / (1 - (rank + 1) * unit)


def low_rank_factors(
    basis_a: Tensor, basis_b: Tensor, rotation: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """ΔW = left @ right with left = scaling · B (R − I) (out × r) and right = A (r × in).

    Both float64, on the basis's device.

    Args:
        basis_a: A, r × in. basis_b: B, out × r. Any floating dtype, same device.
        rotation: R, r × r, float64.
        scaling: alpha / r.
    """
    rotation = rotation.to(basis_b.device)
    identity = torch.eye(rotation.shape[0], dtype=torch.float64, device=rotation.device)
    return basis_b.double() @ (scaling * (rotation - identity)), basis_a.double()


def added_product(left: Tensor, right: Tensor) -> MergeRows:
    """What adds left @ right to rows of W, the product in `product_dtype`.

    Args:
        left: out × r and right: r × in, float64, same device; see `low_rank_factors`.
    """
    compute = product_dtype(left.device)
    if compute == torch.float64:
        return lambda exact, rows: exact.addmm_(left[rows], right)
    narrow_left, narrow_right = left.to(compute), right.to(compute)
    return lambda exact, rows: exact.add_(narrow_left[rows] @ narrow_right)
