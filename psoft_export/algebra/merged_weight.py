"""The merged weight W + scaling · B (R − I) A, each entry the nearest number of its dtype.

Works in row blocks, so that memory beyond W stays small whatever its size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.algebra.rounding import round_to_nearest, unit_in_last_place

_BLOCK_BYTES = 2 * 2**20  # float64 bytes of one row block; its operands stay in the CPU's caches
_RECOMPUTED = 2048

# Compute capabilities of P100, V100, A100, H100/H200 and B200.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


@dataclass
class MergeFigures:
    """What one merge did, summed up over its row blocks.

    Norms are Frobenius norms. `rounding_ulp` bounds the distance between a merged entry and the
    exact W + ΔW in units of the last place of the output dtype (0.5 is perfect): measured where
    the sum is formed in float64, and 0.5 where the result is known to be the nearest number.
    """

    delta_norm: float
    weight_norm: float = 0.0
    rounding_ulp: float = 0.0
    finite: bool = True

    @property
    def relative_delta(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return self.delta_norm / self.weight_norm if self.weight_norm else 0.0

    def add_weight(self, block: Tensor) -> None:
        """Account for one row block of W."""
        self.weight_norm = math.hypot(self.weight_norm, float(torch.linalg.vector_norm(block)))

    def add_rounding(self, exact: Tensor, merged: Tensor) -> None:
        """Account for one row block: the float64 sum, overwritten here, and its rounding."""
        ulp = unit_in_last_place(exact, merged.dtype)
        error = exact.sub_(merged).div_(ulp)
        largest = float(torch.linalg.vector_norm(error, ord=math.inf))
        # Infinite where an entry overflowed: a number minus infinity.
        self.finite = self.finite and math.isfinite(largest)
        self.rounding_ulp = max(self.rounding_ulp, largest)


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
    return scaling * (basis_b.double() @ (rotation - identity)), basis_a.double()


def product_norm(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖_F from the r × r Gram matrices, without forming the product."""
    squared = torch.sum((left.T @ left) * (right @ right.T))
    return math.sqrt(max(float(squared), 0.0))


def merged_blocks(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    dtype: torch.dtype,
    figures: MergeFigures,
) -> Iterator[Tensor]:
    """Yield the merged weight in consecutive row blocks, in the output dtype, on the CPU.

    Each entry is the number of `dtype` nearest to W + left @ right. For float16 and bfloat16 the
    sum is formed in float32 with a bound of its error, and in float64 only where rounding within
    that bound leaves a choice; so it is as exact as the float64 sum, and several times faster.

    Args:
        weight: W (out × in), float32, float16 or bfloat16, on the device to compute on.
        left: out × r and right: r × in, float64, same device; see `low_rank_factors`.
        dtype: output dtype: float32, float16 or bfloat16.
        figures: filled in as blocks are made.
    """
    interval = _Interval(weight, left, right)
    narrow = interval.largest < torch.finfo(dtype).max and dtype != torch.float32
    compute = torch.float32 if narrow else product_dtype(weight.device)
    rows = max(1, _BLOCK_BYTES // (8 * weight.shape[1]))
    first, second = left.to(compute), right.to(compute)
    for start in range(0, weight.shape[0], rows):
        block, part = weight[start : start + rows], first[start : start + rows]
        if narrow:
            single = block.to(torch.float32, copy=True)
            figures.add_weight(single)
            single.add_(part @ second)
            merged = interval.rounded(single, start, dtype)
            figures.rounding_ulp = 0.5
        else:
            exact = block.double()
            figures.add_weight(exact)
            if compute == torch.float64:
                exact = exact.addmm_(part, second)
            else:
                exact = exact.add_(part @ second)
            merged = round_to_nearest(exact, dtype)
            figures.add_rounding(exact, merged)
        yield merged.cpu()


class _Interval:
    """How far a float32 evaluation of W + left @ right can be from the exact sum.

    With u = 2⁻²⁴: the product of rounded factors is within (r + 3) u ‖leftᵢ‖ ‖rightⱼ‖ (Higham,
    section 3.1, and Cauchy–Schwarz), and the sum and the step to either end of the interval
    round once each.
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        self._weight = weight
        self._left = left
        self._right = right.T.contiguous()
        product = float(left.norm(dim=1).max() * right.norm(dim=0).max())
        entry = float(torch.stack(weight.aminmax()).abs().max())
        self.largest = entry + product
        unit = 2.0**-24
        self._half_width = unit * ((left.shape[1] + 3) * product + 4 * self.largest)

    def rounded(self, single: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        """The exact sum rounded to `dtype`, given its float32 evaluation (rows from `start`)."""
        upper = (single + self._half_width).to(dtype)
        lower = single.sub_(self._half_width).to(dtype)
        # Rounding is monotone: where both ends agree, so does everything between them.
        differ = upper.view(torch.int16) ^ lower.view(torch.int16)
        flat = differ.view(-1)
        if flat.numel() % 4:
            undecided = flat.nonzero()[:, 0]
        else:  # four entries at a time, then those alone
            words = flat.view(torch.int64).nonzero()
            entries = (4 * words + torch.arange(4, device=words.device)).view(-1)
            undecided = entries.index_select(0, flat.index_select(0, entries).nonzero()[:, 0])
        for first in range(0, len(undecided), _RECOMPUTED):
            picked = undecided[first : first + _RECOMPUTED]
            # index_select and in-place products: four times as fast as plain indexing here.
            rows = picked // single.shape[1] + start
            change = self._left.index_select(0, rows)
            change.mul_(self._right.index_select(0, picked % single.shape[1]))
            entries = self._weight.view(-1).index_select(0, picked + start * single.shape[1])
            exact = entries.double().add_(change.sum(1))
            upper.view(-1).index_copy_(0, picked, round_to_nearest(exact, dtype))
        return upper
