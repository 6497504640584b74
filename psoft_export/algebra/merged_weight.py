"""The merged weight W + scaling · B (R − I) A, each entry the nearest number of its dtype.

Works in row blocks, so that memory beyond W stays small whatever its size.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from psoft_export.algebra.rounding import round_to_nearest

# Rows of W in float64, which may be overwritten, and which rows they are → merged rows; both
# contiguous.
MergeRows = Callable[[Tensor, slice], Tensor]

# float64 bytes of one row block: its operands stay in a CPU's caches, and fill a GPU.
_BLOCK_BYTES = 2 * 2**20
_DEVICE_BLOCK_BYTES = 64 * 2**20

# Compute capabilities of P100, V100, A100, H100/H200 and B200.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


@dataclass
class MergeFigures:
    """What the merge of some rows did, summed up over row blocks.

    Frobenius norms of W, and of the merged weight minus the float64 sum.
    """

    weight_norm: float = 0.0
    rounding_norm: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether every entry fits the output dtype; a number minus infinity is infinite."""
        return math.isfinite(self.rounding_norm)

    @classmethod
    def of(cls, parts: Iterable["MergeFigures"]) -> "MergeFigures":
        """The figures of several parts of a weight together."""
        norms = [(part.weight_norm, part.rounding_norm) for part in parts]
        return cls(*(math.hypot(*column) for column in zip(*norms, strict=True)))

    def add_weight(self, block: Tensor) -> None:
        """Account for one row block of W, float64."""
        self.weight_norm = math.hypot(self.weight_norm, _norm(block))

    def add_rounding(self, exact: Tensor, merged: Tensor) -> None:
        """Account for one row block: the float64 sum, overwritten here, and its rounding."""
        error = exact.sub_(merged.double())
        self.rounding_norm = math.hypot(self.rounding_norm, _norm(error))


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
    """Rows of W in `count` parts of nearly equal size, cut between blocks of `merged_blocks`.

    So that a weight merged in parts is bit for bit the one merged at once.
    """
    rows, step = weight.shape[0], _block_rows(weight)
    blocks = math.ceil(rows / step)
    ends = [min(rows, step * round(blocks * part / count)) for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends) if start < end]


def with_product(left: Tensor, right: Tensor) -> MergeRows:
    """What adds left @ right to rows of W, the product in `product_dtype`.

    Args:
        left: out × r and right: r × in, float64, same device; see `low_rank_factors`.
    """
    compute = product_dtype(left.device)
    first, second = left.to(compute), right.to(compute)

    def merge(exact: Tensor, rows: slice) -> Tensor:
        if compute == torch.float64:
            return exact.addmm_(first[rows], second)
        return exact.add_(first[rows] @ second)

    return merge


def merged_blocks(
    weight: Tensor,
    rows: slice,
    merge: MergeRows,
    dtype: torch.dtype,
    figures: MergeFigures,
) -> Iterator[Tensor]:
    """Yield some rows of the merged weight in consecutive blocks, in the output dtype, on the CPU.

    Each entry is the number of `dtype` nearest to what `merge` gives in float64.

    Args:
        weight: W (out × in), float32, float16 or bfloat16, on the device to compute on.
        rows: which rows; see `row_parts`.
        merge: makes merged rows of rows of W.
        dtype: output dtype: float32, float16 or bfloat16.
        figures: filled in as blocks are made.
    """
    step = _block_rows(weight)
    for start in range(rows.start, rows.stop, step):
        block = slice(start, min(start + step, rows.stop))
        exact = weight[block].to(torch.float64, memory_format=torch.contiguous_format)
        figures.add_weight(exact)
        exact = merge(exact, block)
        merged = round_to_nearest(exact, dtype)
        figures.add_rounding(exact, merged)
        yield merged.cpu()


def _norm(block: Tensor) -> float:
    """The Frobenius norm of a contiguous float64 block; a dot product is the fastest way to it."""
    flat = block.view(-1)
    return math.sqrt(float(flat.dot(flat)))


def _block_rows(weight: Tensor) -> int:
    size = _BLOCK_BYTES if weight.device.type == "cpu" else _DEVICE_BLOCK_BYTES
    return max(1, size // (8 * weight.shape[1]))
