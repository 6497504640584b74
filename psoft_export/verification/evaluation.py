"""How far a merged weight is from the one that `reference` says it should be, in float64.

A weight that is being merged is made and told right in one pass; one that is given is compared.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from psoft_export.algebra.few import entries_reaching
from psoft_export.algebra.merged_weight import MergeRows
from psoft_export.algebra.rounding import round_to_nearest
from psoft_export.reference.expected import DeltaProduct, Expected

# Float64 bytes of a tile. Smaller ones would fit a core's own cache, but several threads that
# work on small tiles wait for Python's lock longer than for memory.
_TILE_BYTES = 4 * 2**20
_DEVICE_TILE_BYTES = 64 * 2**20
DOUBLE = 2.0**-53  # unit roundoff of float64
_MOST_SUSPECTS = 2**20  # that wait to be judged
_EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
}
_LEAST_SQUARES = 1e-28  # a smaller sum in float32 may lack squares that are next to nothing
# A weight of this many rows has one probe (products by two or more take ten times as long); of a
# smaller one, rows times probes come to `_PROBED`, or there are `_MOST_PROBES`.
_ONE_PROBE = 1024
_PROBED = 4096
_MOST_PROBES = 64


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
        self._error = self._exact = self._delta = self._weight = 0.0
        # ⟨(given − W) V, ΔW V⟩ and ‖ΔW V‖² of the probes V, by probe.
        self._along = self._moved = 0.0

    def join(self, following: "Deviation") -> None:
        """Account for the rows that another deviation is about."""
        self.largest_ulp = max(self.largest_ulp, following.largest_ulp)
        self.not_nearest += following.not_nearest
        for name in ("_error", "_exact", "_delta", "_weight", "_along", "_moved"):
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
        """⟨(given − W) V, ΔW V⟩ / ‖ΔW V‖² of random vectors V; None where ΔW V is zero."""
        return self._along / self._moved if self._moved else None

    @property
    def finite(self) -> bool:
        """Whether every entry is finite, or an infinity that is right."""
        return math.isfinite(self.largest_ulp)

    def add(self, weight: Tensor, given: Tensor, merge: MergeRows | None = None) -> None:
        """Account for the next rows; with `merge`, make them first.

        Numbers far from ties are told in float32 where those of `given` are narrow; only what is
        beside ties, or wrong, is looked at in float64.

        The float64 sums of `merge` count as W + ΔW where ΔW is a product and both map random
        vectors to the same, as far as rounding lets them (Freivalds, Probabilistic machines can
        use less running time, IFIP 1977). Otherwise what was made of them is compared with W + ΔW
        itself, as what is given is.

        Args:
            weight: the rows of W (n × in), any floating dtype.
            given: the same rows as they were written, in their dtype; same device. With `merge`,
                where the numbers nearest to what that makes are put.
            merge: what makes rows of the merged weight.
        """
        suspects, tiles = _Suspects(), _Tiles(weight, given.dtype)
        probes = self._probes(tiles, len(given)) if merge is not None else None
        for start in range(0, len(given), tiles.rows):
            written = given[start : start + tiles.rows]
            total = self._sum(weight, written, start, tiles, merge, probes)
            exact = total.values
            at = tiles.narrowed(exact)
            self._exact += _squares(at)
            if total.is_merged:
                written.copy_(at)  # right but for what is beside ties, which is found below
            numbers = tiles.take("given", written)
            if total.images is not None:
                before, after = total.images
                moved, count = after - before, before.shape[1]
                self._along += _dot(tiles.image(numbers) - before, moved) / count
                self._moved += _dot(moved, moved) / count
            found, error, largest = tiles.compare(numbers, at)
            squares = _squares(error)
            if not math.isfinite(squares):
                found, error, largest = self._compared_beside_infinities(written, exact)
                squares = _squares(error)
            self.largest_ulp = max(self.largest_ulp, largest)
            self._error += squares
            if len(found):
                values = exact.view(-1).index_select(0, found)
                suspects.take(found + start * given.shape[1], values, total.is_merged)
            if suspects.count > _MOST_SUSPECTS:
                self._judge(weight, given, suspects)
                suspects = _Suspects()
        if suspects.count:
            self._judge(weight, given, suspects)
        self._rows += len(given)

    def _probes(self, tiles: "_Tiles", count: int) -> "_Probes | None":
        """What the probes say of the next rows of ΔW; None where it is no product."""
        of = self._expected
        if of is None or not isinstance(of.delta, DeltaProduct):
            return None
        return _Probes(of, of.delta, tiles.probes, self._rows, count)

    def _sum(
        self,
        weight: Tensor,
        written: Tensor,
        start: int,
        tiles: "_Tiles",
        merge: MergeRows | None,
        probes: "_Probes | None",
    ) -> "_Sum":
        """W + ΔW of the tile from row `start` on.

        Where `merge` makes other sums, the numbers nearest to those are in `written`.
        """
        rows = weight[start : start + tiles.rows]
        exact = tiles.take("exact", rows)
        squares = _squares(exact)
        self._weight += squares
        if (of := self._expected) is None:
            return _Sum(exact)
        which = of.rows(self._rows + start, len(rows))
        before = tiles.image(exact)
        if merge is not None:
            made = merge(exact, which)
            if probes is not None:
                after = tiles.image(made)
                here = slice(start, start + len(rows))
                delta_squares = probes.squares(here)
                if probes.agree(after - before, here, squares, delta_squares):
                    self._delta += delta_squares
                    return _Sum(made, (before, after), is_merged=True)
            written.copy_(round_to_nearest(made, written.dtype))
            exact = tiles.take("exact", rows)
        self._delta += of.delta.add_to(exact, which)
        return _Sum(exact, (before, tiles.image(exact)))

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

    def _judge(self, weight: Tensor, given: Tensor, suspects: "_Suspects") -> None:
        """Account for entries that were left out: too far is what is not the nearest, surely."""
        index, at, is_merged = suspects.all()
        row, column = index // given.shape[1], index % given.shape[1]
        if bool(is_merged.any()):
            nearest = round_to_nearest(at[is_merged], given.dtype)
            given[row[is_merged], column[is_merged]] = nearest
        written = given[row, column].to(torch.float64)
        error = written - at
        self._error += _squares(error)
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


@dataclass(frozen=True)
class _Sum:
    """W + ΔW of a tile, float64.

    Attributes:
        values: the sum.
        images: W V and (W + ΔW) V of the probes V; None where there is no ΔW.
        is_merged: whether it is what `merge` made, so that nothing is written yet.
    """

    values: Tensor
    images: tuple[Tensor, Tensor] | None = None
    is_merged: bool = False


class _Probes:
    """What random vectors V say of some rows of a ΔW that is a product."""

    def __init__(
        self, of: Expected, delta: DeltaProduct, vectors: Tensor, first: int, count: int
    ) -> None:
        """Find the image of V, and how large ΔW is.

        Args:
            of: what is known of ΔW.
            delta: ΔW, of `of`.
            vectors: V, in × k, float64.
            first: the first of the rows, of those that `of` means.
            count: how many rows.
        """
        which = of.rows(first, count)
        self._image = delta.image(vectors, which)
        self._squares = delta.squares(which)
        self._norm = _norm(vectors)
        self._reach = of.reach_left[first : first + count]
        self._doubt = math.sqrt(of.terms) * of.condition * _norm(of.reach_right)

    def squares(self, rows: slice) -> float:
        """The sum of the squares of ΔW's entries in some rows, counted from the first."""
        return float(self._squares[rows].sum())

    def agree(self, moved: Tensor, rows: slice, squares: float, delta_squares: float) -> bool:
        """Whether some rows of a sum W + D move V as ΔW does, as far as rounding lets it be told.

        That of the products with V grows with what is multiplied, that of D and of ΔW with what
        their entries are summed up from. Together it came to a fifth of what is allowed, at most.

        Args:
            moved: these rows of (W + D) V − W V.
            rows: which they are, counted from the first.
            squares: the sum of the squares of W there, and
            delta_squares: of ΔW.
        """
        products = (2 * math.sqrt(squares) + math.sqrt(delta_squares)) * self._norm
        sums = self._doubt * _norm(self._reach[rows])
        return _norm(moved - self._image[rows]) <= DOUBLE * (products + sums)


class _Tiles:
    """Row blocks of a weight, compared in memory that is taken once.

    Fresh memory for each tile would come from the operating system page by page.

    Attributes:
        rows: how many rows a tile has; the last may have fewer.
        probes: V, random vectors, in × k, float64; the same for all weights of that width.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Take memory for tiles of `weight`, to be compared with numbers of `dtype`."""
        self._dtype = dtype
        # What is narrow is compared in float32, and what is then beside ties again in float64.
        self._work = torch.float32 if dtype.itemsize < 4 else torch.float64
        self.rows = max(1, min(len(weight), _tile_rows(weight)))
        like = weight.new_empty(self.rows, weight.shape[1], dtype=torch.float64)
        self._memory = {
            "exact": like,
            "at": torch.empty_like(like, dtype=self._work),
            "given": torch.empty_like(like, dtype=self._work),
            "steps": torch.empty_like(like, dtype=torch.int32),
            "marks": torch.empty_like(like, dtype=torch.bool),
        }
        count = min(_MOST_PROBES, _PROBED // max(1, len(weight)))
        if len(weight) >= _ONE_PROBE:
            count = 1
        drawn = torch.Generator().manual_seed(weight.shape[1])
        shape = (weight.shape[1], count)
        self.probes = torch.randn(shape, generator=drawn, dtype=torch.float64).to(weight.device)
        self._probes = {torch.float64: self.probes, self._work: self.probes.to(self._work)}

    def take(self, name: str, values: Tensor) -> Tensor:
        """A copy of `values` in the memory of that name, contiguous, in its dtype."""
        return self._memory[name][: len(values)].copy_(values)

    def narrowed(self, exact: Tensor) -> Tensor:
        """A float64 tile in the dtype that `compare` works in."""
        return exact if self._work == exact.dtype else self.take("at", exact)

    def image(self, tile: Tensor) -> Tensor:
        """A tile times the probes, float64."""
        return (tile @ self._probes[tile.dtype]).double()

    def compare(self, given: Tensor, at: Tensor) -> tuple[Tensor, Tensor, float]:
        """Where `given` may not be the nearest number to `at`, and how far the rest is.

        Args:
            given: a tile as `take` gives it, which becomes the error.
            at: what it should be, as `narrowed` gives it.

        Returns:
            The flat indices of entries that are half a unit in the last place from `at`, or
            farther, or nearly so; the error of all others (0 at those), and the largest of these
            errors in units of the last place (in bfloat16 0 where there are entries found, since
            those are farther). An error that is not finite says that an entry is not either, and
            that nothing else here is known.
        """
        if self._dtype == torch.bfloat16:
            # Its numbers are float32 numbers whose last 16 bits are zeros, so that as integers
            # neighbours are 2^16 apart, and 2^15 from the tie between them. (Not so in float16:
            # its subnormals, which many weights are, have float32's spacing of larger numbers.)
            steps = self._memory["steps"][: len(given)]
            torch.sub(given.view(torch.int32), at.view(torch.int32), out=steps).abs_()
            sizes = steps.view(torch.uint32)  # the least integer is its own absolute value
            found = entries_reaching(sizes, 2**15 - 2, self._memory["marks"][: len(given)])
            largest = 0.0 if len(found) else int(steps.max()) / 2**16
            error = given.sub_(at)
        else:
            bound = 0.5
            if self._work != self._dtype:  # in whose units the rounding to `work` is below this
                bound -= 2 * torch.finfo(self._work).eps / torch.finfo(self._dtype).eps
            error = given.sub_(at)
            ulps = error.abs().div_(unit_in_last_place(at, self._dtype))
            found = entries_reaching(ulps, bound, self._memory["marks"][: len(given)])
            largest = float(ulps.view(-1).index_fill_(0, found, 0).max())
        flat = error.view(-1)
        flat.index_copy_(0, found, flat.index_select(0, found).mul_(0))  # NaN of what is not finite
        return found, error, largest


class _Suspects:
    """Entries to be looked at again.

    Attributes:
        count: how many.
    """

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def take(self, found: Tensor, exact: Tensor, is_merged: bool) -> None:
        """Take entries: their flat indices in the weight, and the sum there as of `_Sum`."""
        self._parts.append((found, exact, torch.full_like(found, is_merged, dtype=torch.bool)))
        self.count += len(found)

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """What was taken, in one: indices, sums, and which sums were made by the merge."""
        index, exact, is_merged = zip(*self._parts, strict=True)
        return torch.cat(index), torch.cat(exact), torch.cat(is_merged)


def measure(
    weight: Tensor,
    written: Tensor,
    of: Expected,
    product_unit: float = DOUBLE,
    merge: MergeRows | None = None,
) -> Deviation:
    """How far a merged weight is from W + ΔW; with `merge`, make it.

    Args:
        weight: W (out × in), any floating dtype, on the device of `of`.
        written: the merged weight, in its dtype, on any device; with `merge` on that of `weight`.
        of: ΔW.
        product_unit: as of `Deviation`.
        merge: as of `Deviation.add`.
    """
    deviation = Deviation(of, product_unit)
    deviation.add(weight, written.to(weight.device), merge)
    return deviation


def row_parts(weight: Tensor, count: int) -> list[slice]:
    """Rows of W in `count` parts of nearly equal size, cut between tiles.

    So that a weight merged in parts is bit for bit the one merged at once.
    """
    rows, step = weight.shape[0], _tile_rows(weight)
    tiles = math.ceil(rows / step)
    ends = [min(rows, step * round(tiles * part / count)) for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends) if start < end]


def _tile_rows(weight: Tensor) -> int:
    size = _TILE_BYTES if weight.device.type == "cpu" else _DEVICE_TILE_BYTES
    return max(1, size // (8 * max(weight.shape[1], 1)))


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


def _squares(values: Tensor) -> float:
    """The sum of the squares, as exactly as the dtype sums up, whatever their size."""
    found = _dot(values, values)
    if values.dtype == torch.float32 and not _LEAST_SQUARES < found < math.inf:
        wide = values.double()
        found = _dot(wide, wide)
    return found


def _norm(values: Tensor) -> float:
    return math.sqrt(_squares(values))
