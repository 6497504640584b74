"""How far a given merged weight is from the one that `reference` says it should be, in float64."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from psoft_export.algebra.few import entries_reaching
from psoft_export.algebra.merged_weight import Settle
from psoft_export.reference.expected import Expected

# Float64 bytes of a tile. Smaller ones would fit a core's own cache, but several threads that
# work on small tiles wait for Python's lock longer than for memory.
_TILE_BYTES = 2 * 2**20
_DEVICE_TILE_BYTES = 64 * 2**20
DOUBLE = 2.0**-53  # unit roundoff of float64
_MOST_SUSPECTS = 2**20  # that wait to be judged
_EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
}


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
    def relative_rounding(self) -> float:
        """‖given − (W + ΔW)‖ / ‖ΔW‖, Frobenius; 0 where ΔW is zero."""
        return math.sqrt(self._error / self._delta) if self._delta else 0.0

    @property
    def applied(self) -> float | None:
        """⟨given − W, ΔW⟩ / ‖ΔW‖²; None where ΔW is zero."""
        return self._along / self._delta if self._delta else None

    @property
    def finite(self) -> bool:
        """Whether every entry is finite, or an infinity that is right."""
        return math.isfinite(self.largest_ulp)

    def add(self, weight: Tensor, given: Tensor, settle: Settle | None = None) -> None:
        """Account for the next rows.

        Numbers far from ties are told in float32 where those of `given` are narrow; only what is
        beside ties, or wrong, is looked at in float64.

        Args:
            weight: the rows of W (n × in), any floating dtype.
            given: the same rows as they were written, in their dtype; same device.
            settle: called with the rows and columns (of `given`) of entries that are not the
                nearest number, or nearly not; what it returns replaces them in `given` before
                they are judged.
        """
        work = torch.float32 if given.dtype.itemsize < 4 else torch.float64
        bound = 0.5
        if given.dtype != work:  # in whose units the rounding of `work` stays below this
            bound -= 2 * torch.finfo(work).eps / torch.finfo(given.dtype).eps
        suspects = _Suspects()
        for start, exact, delta in self._tiles(weight):
            written = given[start : start + len(exact)]
            at = exact.to(work)
            error = written.to(work, copy=True, memory_format=torch.contiguous_format).sub_(at)
            ulps = error.abs().div_(unit_in_last_place(at, given.dtype))
            found, largest = entries_reaching(ulps, bound)
            if not math.isfinite(largest):
                error = self._error_beside_infinities(written, exact)
                ulps = error.abs().div_(unit_in_last_place(exact, given.dtype))
                ulps.nan_to_num_(math.inf, math.inf)
                found, largest = entries_reaching(ulps, 0.5)
            if len(found):
                suspects.take(start * given.shape[1], found, exact, delta)
                error.view(-1)[found] = ulps.view(-1)[found] = 0  # until they are judged
                largest = float(ulps.max())
            self.largest_ulp = max(self.largest_ulp, largest)
            error = error.to(torch.float64)
            self._exact += _dot(exact, exact)
            self._error += _dot(error, error)
            if delta is not None:
                squared = _dot(delta, delta)
                self._delta += squared
                self._along += squared + _dot(error, delta)
            if suspects.count > _MOST_SUSPECTS:
                self._judge(weight, given, suspects, settle)
                suspects = _Suspects()
        if suspects.count:
            self._judge(weight, given, suspects, settle)
        self._rows += len(given)

    def _error_beside_infinities(self, given: Tensor, exact: Tensor) -> Tensor:
        """The error of each entry of a tile, float64; none where an infinity is right."""
        written = given.to(torch.float64, memory_format=torch.contiguous_format)
        right = written == exact  # both the same infinity, which no merged weight may hold
        if self._expected is not None:
            right.fill_(False)
        if self._may_overflow:
            beyond = exact.abs() > torch.finfo(given.dtype).max
            right |= written.isinf() & beyond & (written.sign() == exact.sign())
        return torch.where(right, 0.0, written - exact)

    def _tiles(self, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Start row, W + ΔW and ΔW of tiles that fit a cache; counts ‖W‖ on the way."""
        size = _TILE_BYTES if weight.device.type == "cpu" else _DEVICE_TILE_BYTES
        step = max(1, size // (8 * max(weight.shape[1], 1)))
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step]
            exact = rows.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
            self._weight += _dot(exact, exact)
            delta = None
            if self._expected is not None:
                delta = self._expected.delta_of(exact, self._rows + start)
                exact.add_(delta)
            yield start, exact, delta

    def _judge(
        self, weight: Tensor, given: Tensor, suspects: "_Suspects", settle: Settle | None
    ) -> None:
        """Account for entries that were left out: too far is what is not the nearest, surely."""
        index, at, delta = suspects.all()
        row, column = index // given.shape[1], index % given.shape[1]
        if settle is not None:
            given[row, column] = settle(row, column)
        written = given[row, column].to(torch.float64)
        error = written - at
        self._error += _dot(error, error)
        self._along += _dot(error, delta)
        doubt = weight[row, column].to(torch.float64).abs()
        if self._expected is not None:
            of = self._expected
            reach = of.reach_left[self._rows + row] * of.reach_right[column]
            doubt = self._slack * (doubt + reach) + 2 * of.basis_doubt * reach
        else:
            doubt = self._slack * doubt
        unit = unit_in_last_place(at, given.dtype)
        # Below a power of two numbers are spaced half as wide, down to the subnormals.
        limits = torch.finfo(given.dtype)
        at_power = (at.abs() == unit / limits.eps) & (at.abs() > limits.tiny)
        inwards = written.abs() < at.abs()
        half_unit = torch.where(at_power & inwards, 0.25, 0.5)
        ulps = (error.abs() / unit).nan_to_num_(math.inf, math.inf)
        self.largest_ulp = max(self.largest_ulp, float(ulps.max()))
        self.not_nearest += int(((ulps >= 0.5) & (ulps > half_unit + doubt / unit)).sum())


class _Suspects:
    """Entries to be looked at again.

    Attributes:
        count: how many.
    """

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self, first: int, found: Tensor, exact: Tensor, delta: Tensor | None) -> None:
        """Take the entries `found` (flat indices) of a tile whose first entry has index `first`."""
        at = exact.view(-1)[found]
        change = delta.reshape(-1)[found] if delta is not None else torch.zeros_like(at)
        self._parts.append((found + first, at, change))
        self.count += len(found)

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Flat indices in the weight, and W + ΔW and ΔW there, float64."""
        index, at, delta = zip(*self._parts, strict=True)
        return torch.cat(index), torch.cat(at), torch.cat(delta)


def measure(
    weight: Tensor,
    written: Tensor,
    of: Expected,
    product_unit: float = DOUBLE,
    settle: Settle | None = None,
) -> Deviation:
    """How far a merged weight is from W + ΔW.

    Args:
        weight: W (out × in), any floating dtype, on the device of `of`.
        written: the merged weight, in its dtype, on any device.
        of: ΔW.
        product_unit: as of `Deviation`.
        settle: as of `Deviation.add`; then `written` is on the device of `weight`.
    """
    deviation = Deviation(of, product_unit)
    deviation.add(weight, written.to(weight.device), settle)
    return deviation


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` numbers at each entry of a float64 or float32 tensor, in its dtype.

    The power of two that is the entry's exponent alone, times the dtype's epsilon; below the
    smallest normal number the constant spacing of the subnormals.
    """
    limits = torch.finfo(dtype)
    bits, mask = _EXPONENTS[values.dtype]
    powers = values.view(bits).bitwise_and(mask).view(values.dtype)
    return powers.clamp_(limits.tiny, limits.max).mul_(limits.eps)


def _dot(first: Tensor, second: Tensor) -> float:
    return float(torch.dot(first.reshape(-1), second.reshape(-1)))
