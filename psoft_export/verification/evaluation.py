"""How far a given merged weight is from the one that `reference` says it should be, in float64."""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from psoft_export.reference.expected import Expected

_TILE_BYTES = 2**20  # float64 bytes of a tile: with its temporaries, in a core's caches
_DEVICE_TILE_BYTES = 64 * 2**20
DOUBLE = 2.0**-53  # unit roundoff of float64
_EXPONENT_MASK = 0x7FF0000000000000


class Deviation:
    """How far a weight is from W + ΔW, summed up over row blocks.

    Attributes:
        largest_ulp: largest distance of an entry, in units of the last place; infinite where an
            entry is NaN or infinite.
        not_nearest: number of entries farther than half a unit and than what float64 can tell.
    """

    def __init__(
        self, of: Expected | None, product_unit: float = DOUBLE, *, may_overflow: bool = False
    ) -> None:
        """Start with nothing.

        Args:
            of: ΔW; None for a weight that is only rounded to another dtype.
            product_unit: unit roundoff of the arithmetic that formed ΔW in the weight at hand.
            may_overflow: whether infinity is right for a number beyond the dtype's largest (in a
                buffer, such as the least number of a wider dtype that a mask holds).
        """
        self.largest_ulp = 0.0
        self.not_nearest = 0
        self._expected = of
        self._may_overflow = may_overflow
        terms = 0 if of is None else of.terms
        # Both evaluations err: γ_n of a sum of n terms (Higham, Accuracy and Stability of Numerical
        # Algorithms, section 3.1), with a few roundings for the factors and the last sum. What
        # the change itself is computed from adds its own, twice.
        self._slack = (terms + 4) * (DOUBLE + product_unit)
        if of is not None:
            self._slack += (terms + 4) * 2 * DOUBLE * (of.condition - 1)
        self._rows = 0
        self._error = self._exact = self._delta = self._weight = self._along = 0.0

    def join(self, following: "Deviation") -> None:
        """Account for the rows that another deviation is about."""
        self.largest_ulp = max(self.largest_ulp, following.largest_ulp)
        self.not_nearest += following.not_nearest
        for name in ("_error", "_exact", "_delta", "_weight", "_along"):
            setattr(self, name, getattr(self, name) + getattr(following, name))

    @property
    def relative_error(self) -> float:
        """‖given − (W + ΔW)‖ / ‖W + ΔW‖, Frobenius."""
        return math.sqrt(self._error / self._exact) if self._exact else math.sqrt(self._error)

    @property
    def relative_delta(self) -> float:
        """‖ΔW‖ / ‖W‖, Frobenius."""
        return math.sqrt(self._delta / self._weight) if self._weight else 0.0

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖, Frobenius."""
        return math.sqrt(self._delta)

    @property
    def applied(self) -> float | None:
        """⟨given − W, ΔW⟩ / ‖ΔW‖²; None where ΔW is zero."""
        return self._along / self._delta if self._delta else None

    def add(self, weight: Tensor, given: Tensor) -> None:
        """Account for the next rows.

        Args:
            weight: the rows of W (n × in), any floating dtype.
            given: the same rows as they were written, in their dtype; same device.
        """
        for start, exact, delta in self._tiles(weight):
            rows = slice(start, start + len(exact))
            written = given[rows].to(torch.float64)
            error = torch.sub(written, exact)
            if delta is not None:
                squared = _dot(delta, delta)
                self._delta += squared
                self._along += squared + _dot(error, delta)
            self._exact += _dot(exact, exact)
            self._error += _dot(error, error)
            if not math.isfinite(self._error):
                right = written == exact  # both the same infinity
                if self._may_overflow:
                    beyond = exact.abs() > torch.finfo(given.dtype).max
                    right |= written.isinf() & beyond & (written.sign() == exact.sign())
                error = torch.where(right, 0.0, error)
            ulps = error.abs_().div_(unit_in_last_place(exact, given.dtype)).nan_to_num_(math.inf)
            largest = float(ulps.max()) if ulps.numel() else 0.0
            self.largest_ulp = max(self.largest_ulp, largest)
            if largest >= 0.5:
                self.not_nearest += self._count_beyond(weight[rows], ulps, exact, given[rows])
            self._rows += len(exact)

    def _tiles(self, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Start row, W + ΔW and ΔW of tiles that fit a cache; counts ‖W‖ on the way."""
        size = _TILE_BYTES if weight.device.type == "cpu" else _DEVICE_TILE_BYTES
        step = max(1, size // (8 * max(weight.shape[1], 1)))
        for start in range(0, weight.shape[0], step):
            exact = weight[start : start + step].to(torch.float64)
            self._weight += _dot(exact, exact)
            delta = None
            if self._expected is not None:
                delta = self._expected.delta_of(exact, self._rows)
                exact = exact + delta
            yield start, exact, delta

    def _count_beyond(self, weight: Tensor, ulps: Tensor, exact: Tensor, given: Tensor) -> int:
        """Entries of one tile that are not the nearest number, beyond doubt."""
        row, column = (ulps >= 0.5).nonzero(as_tuple=True)
        doubt = weight[row, column].to(torch.float64).abs()
        if self._expected is not None:
            of = self._expected
            reach = of.reach_left[self._rows + row] * of.reach_right[column]
            doubt = self._slack * (doubt + reach) + 2 * of.basis_doubt * reach
        else:
            doubt = self._slack * doubt
        at, unit = exact[row, column], unit_in_last_place(exact[row, column], given.dtype)
        # Below a power of two numbers are spaced half as wide, down to the subnormals.
        limits = torch.finfo(given.dtype)
        at_power = (at.abs() == unit / limits.eps) & (at.abs() > limits.tiny)
        inwards = given[row, column].to(torch.float64).abs() < at.abs()
        half_unit = torch.where(at_power & inwards, 0.25, 0.5)
        return int((ulps[row, column] > half_unit + doubt / unit).sum())


def measure(
    weight: Tensor, written: Iterable[Tensor], of: Expected, product_unit: float = DOUBLE
) -> Deviation:
    """How far a merged weight is from W + ΔW.

    Args:
        weight: W (out × in), any floating dtype, on the device of `of`.
        written: the merged weight in consecutive row blocks, in its dtype, on any device.
        of: ΔW.
        product_unit: as of `Deviation`.
    """
    deviation, done = Deviation(of, product_unit), 0
    for block in written:
        deviation.add(weight[done : done + len(block)], block.to(weight.device))
        done += len(block)
    return deviation


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` numbers at each entry of a float64 tensor, float64.

    The power of two that is the entry's exponent alone, times the dtype's epsilon; below the
    smallest normal number the constant spacing of the subnormals.
    """
    limits = torch.finfo(dtype)
    powers = values.view(torch.int64).bitwise_and(_EXPONENT_MASK).view(torch.float64)
    return powers.clamp_(limits.tiny, limits.max).mul_(limits.eps)


def _dot(first: Tensor, second: Tensor) -> float:
    return float(torch.dot(first.reshape(-1), second.reshape(-1)))
