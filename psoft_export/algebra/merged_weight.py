"""The merged weight W + scaling · B (R − I) A, each entry the nearest number of its dtype.

Works in row blocks, so that memory beyond W stays small whatever its size.
"""

import math
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from psoft_export.algebra.rounding import round_to_nearest

# Rows of W in float64, which may be overwritten, and which rows they are → merged rows; both
# contiguous.
MergeRows = Callable[[Tensor, slice], Tensor]
# Rows and columns of entries → those entries of the merged weight, in the output dtype.
Settle = Callable[[Tensor, Tensor], Tensor]

# float64 bytes of one row block: its operands stay in a CPU's caches, and fill a GPU.
_BLOCK_BYTES = 4 * 2**20
_DEVICE_BLOCK_BYTES = 64 * 2**20
_GATHERED_BYTES = 8 * 2**20  # of each factor, where single entries are computed

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
    return scaling * (basis_b.double() @ (rotation - identity)), basis_a.double()


def row_parts(weight: Tensor, count: int) -> list[slice]:
    """Rows of W in `count` parts of nearly equal size, cut between blocks of `WeightMerge`.

    So that a weight merged in parts is bit for bit the one merged at once.
    """
    rows, step = weight.shape[0], _block_rows(weight)
    blocks = math.ceil(rows / step)
    ends = [min(rows, step * round(blocks * part / count)) for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends) if start < end]


class AddedProduct:
    """Adds left @ right to rows of W, the product in `product_dtype`: a `MergeRows`."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """Take factors.

        Args:
            left: out × r and right: r × in, float64, same device; see `low_rank_factors`.
        """
        self._left, self._right = left, right
        compute = product_dtype(left.device)
        self._compute = left.to(compute), right.to(compute)

    @cached_property
    def _single(self) -> tuple[Tensor, Tensor]:
        return self._left.float(), self._right.float()

    @cached_property
    def _by_columns(self) -> Tensor:
        return self._right.T.contiguous()

    def __call__(self, exact: Tensor, rows: slice) -> Tensor:
        """Rows of the merged weight, float64."""
        left, right = self._compute
        if left.dtype == torch.float64:
            return exact.addmm_(left[rows], right)
        return exact.add_(left[rows] @ right)

    def estimate(self, weight: Tensor, rows: slice) -> Tensor:
        """The same of rows of W (any floating dtype), all in float32, which is faster."""
        left, right = self._single
        return torch.addmm(weight.float(), left[rows], right)

    def entries(self, weight: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Some entries of the merged weight, float64.

        Args:
            weight: W.
            row: where each entry is; and column.
        """
        found = weight[row, column].to(torch.float64)
        step = max(1, _GATHERED_BYTES // (8 * len(self._right)))
        for start in range(0, len(row), step):
            part = slice(start, start + step)
            products = self._left[row[part]].mul_(self._by_columns[column[part]])
            found[part] += products.sum(1)
        return found


class WeightMerge:
    """Merges one weight, row blocks at a time.

    Each entry is the number of the output dtype nearest to what a `MergeRows` gives in float64.
    Where ΔW is a product and the output dtype narrow, `fill` takes it in float32: then a few
    entries have the wrong neighbour, which a check against W + ΔW finds, and `settling` mends.
    """

    def __init__(self, weight: Tensor, merge: MergeRows, dtype: torch.dtype) -> None:
        """Prepare; nothing is computed yet.

        Args:
            weight: W (out × in), float32, float16 or bfloat16, on the device to compute on.
            merge: makes merged rows of rows of W.
            dtype: output dtype: float32, float16 or bfloat16.
        """
        self._weight = weight
        self._merge = merge
        self._dtype = dtype
        estimates = weight.device.type == "cpu" and dtype.itemsize < 4
        self._product = merge if estimates and isinstance(merge, AddedProduct) else None

    def fill(self, merged: Tensor, rows: slice) -> None:
        """Write some rows (see `row_parts`) of the merged weight, a block at a time.

        Args:
            merged: the merged weight, in the output dtype, on the CPU.
            rows: which rows of it.
        """
        step = _block_rows(self._weight)
        for start in range(rows.start, rows.stop, step):
            block = slice(start, min(start + step, rows.stop))
            weight = self._weight[block]
            if self._product is not None:
                merged[block] = self._product.estimate(weight, block)
            else:
                exact = weight.to(torch.float64, memory_format=torch.contiguous_format)
                merged[block] = round_to_nearest(self._merge(exact, block), self._dtype)

    def settling(self, rows: slice) -> Settle | None:
        """What gives single entries of some rows from float64; None where `fill` does.

        It takes rows, counted from the first of `rows`, and columns.
        """
        product = self._product
        if product is None:
            return None

        def settled(row: Tensor, column: Tensor) -> Tensor:
            exact = product.entries(self._weight, rows.start + row, column)
            return round_to_nearest(exact, self._dtype)

        return settled


def _block_rows(weight: Tensor) -> int:
    size = _BLOCK_BYTES if weight.device.type == "cpu" else _DEVICE_BLOCK_BYTES
    return max(1, size // (8 * weight.shape[1]))
