"""How far a given merged weight is from the one that `reference` says it should be, in float64."""

import math

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
        return 1 + self._along / self._delta if self._delta else None

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
        suspects, tiles = _Suspects(), _Tiles(weight, given.dtype)
        for start in range(0, len(given), tiles.rows):
            rows = weight[start : start + tiles.rows]
            written = given[start : start + tiles.rows]
            exact = tiles.take("exact", rows)
            self._weight += _dot(exact, exact)
            delta = None
            if self._expected is not None:
                delta = self._expected.delta_of(exact, self._rows + start)
                exact.add_(delta)
                self._delta += _dot(delta, delta)
            self._exact += _dot(exact, exact)
            found, error, largest = tiles.compare(written, exact)
            squared = _dot(error, error)
            if not math.isfinite(squared):
                found, error, largest = self._compared_beside_infinities(written, exact)
                squared = _dot(error, error)
            if len(found):
                suspects.take(start * given.shape[1], found, exact, delta)
            self.largest_ulp = max(self.largest_ulp, largest)
            self._error += squared
            if delta is not None:
                self._along += _dot(error, delta)
            if suspects.count > _MOST_SUSPECTS:
                self._judge(weight, given, suspects, settle)
                suspects = _Suspects()
        if suspects.count:
            self._judge(weight, given, suspects, settle)
        self._rows += len(given)

    def _compared_beside_infinities(
        self, given: Tensor, exact: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """What `_Tiles.compare` returns; there is no error where an infinity is right."""
        written = given.to(torch.float64, memory_format=torch.contiguous_format)
        right = written == exact  # both the same infinity, which no merged weight may hold
        if self._expected is not None:
            right.fill_(False)
        if self._may_overflow:
            beyond = exact.abs() > torch.finfo(given.dtype).max
            right |= written.isinf() & beyond & (written.sign() == exact.sign())
        error = torch.where(right, 0.0, written - exact)
        ulps = error.abs().div_(unit_in_last_place(exact, given.dtype))
        ulps.nan_to_num_(math.inf, math.inf)
        found = entries_reaching(ulps, 0.5)
        error.view(-1)[found] = ulps.view(-1)[found] = 0
        return found, error, float(ulps.max())

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


class _Tiles:
    """Row blocks of a weight, compared in memory that is taken once.

    Fresh memory for each tile would come from the operating system page by page.

    Attributes:
        rows: how many rows a tile has; the last may have fewer.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Take memory for tiles of `weight`, to be compared with numbers of `dtype`."""
        self._dtype = dtype
        # What is narrow is compared in float32, and what is then beside ties again in float64.
        self._work = torch.float32 if dtype.itemsize < 4 else torch.float64
        size = _TILE_BYTES if weight.device.type == "cpu" else _DEVICE_TILE_BYTES
        self.rows = max(1, min(len(weight), size // (8 * max(weight.shape[1], 1))))
        like = weight.new_empty(self.rows, weight.shape[1], dtype=torch.float64)
        self._memory = {
            "exact": like,
            "error": torch.empty_like(like),
            "at": torch.empty_like(like, dtype=self._work),
            "given": torch.empty_like(like, dtype=self._work),
            "steps": torch.empty_like(like, dtype=torch.int32),
        }

    def take(self, name: str, values: Tensor) -> Tensor:
        """A copy of `values` in the memory of that name, contiguous, in its dtype."""
        return self._memory[name][: len(values)].copy_(values)

    def compare(self, given: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, float]:
        """Where `given` may not be the nearest number to `exact`, and how far the rest is.

        Args:
            given: a tile, in its dtype.
            exact: what it should be, contiguous float64.

        Returns:
            The flat indices of entries that are half a unit in the last place from `exact`, or
            farther, or nearly so; the error of all others (float64; 0 at those), and the largest
            of these errors in units of the last place. An error that is not finite says that an
            entry is not either, and that nothing else here is known.
        """
        at = exact if self._work == exact.dtype else self.take("at", exact)
        written = self.take("given", given)
        if self._dtype == torch.bfloat16:
            # Its numbers are float32 numbers whose last 16 bits are zeros, so that as integers
            # neighbours are 2^16 apart, and 2^15 from the tie between them. (Not so in float16:
            # its subnormals, which many weights are, have float32's spacing of larger numbers.)
            steps = self._memory["steps"][: len(given)]
            torch.sub(written.view(torch.int32), at.view(torch.int32), out=steps)
            found = entries_reaching(steps, 2**15 - 2, either=True)
            steps.view(-1)[found] = 0
            least, most = steps.aminmax()
            largest = max(-int(least), int(most)) / 2**16
            error = written.sub_(at)
        else:
            bound = 0.5
            if self._work != self._dtype:  # in whose units the rounding to `work` is below this
                bound -= 2 * torch.finfo(self._work).eps / torch.finfo(self._dtype).eps
            error = written.sub_(at)
            ulps = error.abs().div_(unit_in_last_place(at, self._dtype))
            found = entries_reaching(ulps, bound)
            ulps.view(-1)[found] = 0
            largest = float(ulps.max())
        error.view(-1)[found] *= 0  # which leaves NaN where one is not finite
        return found, error if error.dtype == exact.dtype else self.take("error", error), largest


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
