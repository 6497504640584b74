"""How far a merged weight is from the one that `reference` says it should be, in float64.

A weight that is being merged is made and told right in one pass; one that is given is compared.
"""

import math

import torch
from torch import Tensor

from psoft_export.algebra.few import entries_reaching
from psoft_export.algebra.merged_weight import MergeRows
from psoft_export.algebra.rounding import round_to_nearest
from psoft_export.reference.expected import DeltaProduct, Expected
from psoft_export.verification.tiles import (
    Images,
    SquareSums,
    Tile,
    Tiles,
    dot,
    squares,
    unit_in_last_place,
)

DOUBLE = 2.0**-53  # unit roundoff of float64
_MOST_SUSPECTS = 2**20  # that wait to be judged


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

    def add(self, weight: Tensor, given: Tensor) -> None:
        """Account for the next rows.

        Numbers far from ties are told in float32 where those of `given` are narrow; only what is
        beside ties, or wrong, is looked at in float64.

        Args:
            weight: the rows of W (n × in), any floating dtype.
            given: the same rows as they were written, in their dtype; same device.
        """
        of, tiles, suspects = self._expected, Tiles(weight, given), _Suspects()
        images = None if of is None else Images(tiles)
        for tile in tiles:
            self._weight += squares(tile.flat_exact)
            if of is not None and images is not None:
                images.see_weight(tile)
                self._delta += of.delta.add_to(tile.exact, self._which(tile))
                images.see_sum(tile)
            tile.narrow_exact()
            tile.widen_given()
            self._exact += squares(tile.flat_at)
            if images is not None:
                images.see_given(tile)
            found, error, largest = tile.compare()
            error_squares = squares(error)
            if not math.isfinite(error_squares):
                found, error, largest = self._compared_beside_infinities(tile)
                error_squares = squares(error)
            self.largest_ulp = max(self.largest_ulp, largest)
            self._error += error_squares
            suspects.take(tile, found)
            if suspects.count > _MOST_SUSPECTS:
                self._judge(weight, given, suspects)
                suspects = _Suspects()
        self._judge(weight, given, suspects)
        if images is not None:
            self._account_for(images)
        self._rows += len(given)

    def make(self, weight: Tensor, merged: Tensor, merge: MergeRows) -> None:
        """Merge the next rows, and account for them.

        The float64 sums of `merge` count as W + ΔW where ΔW is a product and both map random
        vectors to the same, as far as rounding lets them (Freivalds, Probabilistic machines can
        use less running time, IFIP 1977). Otherwise what was made of them is compared with W + ΔW
        itself, as what is given is.

        Args:
            weight: as of `add`.
            merged: where the numbers nearest to what `merge` makes are put; same device.
            merge: what makes rows of the merged weight.
        """
        if self._made_in_one_pass(weight, merged, merge):
            return
        for tile in Tiles(weight, merged):
            made = merge(tile.exact, self._which(tile))
            tile.given.copy_(round_to_nearest(made, merged.dtype))
        self.add(weight, merged)

    def _made_in_one_pass(self, weight: Tensor, merged: Tensor, merge: MergeRows) -> bool:
        """What `make` does where the probes tell the sums right.

        Returns:
            Whether all is done. If not, nothing is accounted for: ΔW is no product, the sums are
            not right, or there is something unusual, such as infinities or very many ties.
        """
        of = self._expected
        if of is None or not isinstance(of.delta, DeltaProduct) or not len(merged):
            return False
        tiles, suspects, largest = Tiles(weight, merged), _Suspects(), 0.0
        images = Images(tiles)
        weights, exacts, errors = SquareSums(), SquareSums(), SquareSums()
        for tile in tiles:
            weights.add(tile.flat_exact)
            images.see_weight(tile)
            tile.become(merge(tile.exact, self._which(tile)))
            images.see_sum(tile)
            tile.narrow_exact()
            exacts.add(tile.flat_at)
            tile.given.copy_(tile.at)  # right but for what is beside ties, which is found below
            tile.widen_given()
            images.see_given(tile)
            found, error, farthest = tile.compare()
            errors.add(error)
            largest = max(largest, farthest)
            suspects.take(tile, found)
            if suspects.count > _MOST_SUSPECTS:
                return False
        weight_squares, exact_squares, error_squares = weights.all(), exacts.all(), errors.all()
        if weight_squares is None or exact_squares is None or error_squares is None:
            return False
        changes = of.delta.squares(of.rows(self._rows, len(merged)))
        if not self._agree(of, of.delta, tiles, images, weight_squares, changes):
            return False
        self._weight += float(weight_squares.sum())
        self._exact += float(exact_squares.sum())
        self._error += float(error_squares.sum())
        self._delta += float(changes.sum())
        self.largest_ulp = max(self.largest_ulp, largest)
        if suspects.count:
            row, column, exact = suspects.all(merged.shape[1])
            merged[row, column] = round_to_nearest(exact, merged.dtype)
            self._judge(weight, merged, suspects)
        self._account_for(images)
        self._rows += len(merged)
        return True

    def _agree(
        self,
        of: Expected,
        delta: DeltaProduct,
        tiles: Tiles,
        images: Images,
        weights: Tensor,
        changes: Tensor,
    ) -> bool:
        """Whether the sums move the probes as ΔW does, as far as rounding lets it be told.

        That of the products with V grows with what is multiplied, that of the sums and of ΔW with
        what their entries are summed up from. Together it came to a fifth of what is allowed, at
        most. Each tile is judged by itself, since what is allowed to many rows could hide a wrong
        entry of one.

        Args:
            of: what is known of ΔW, and
            delta: ΔW itself.
            tiles: the tiles, and
            images: what the probes V are mapped to.
            weights: the sum of the squares of W in each tile, float64.
            changes: that of ΔW in each row, float64.
        """
        which = of.rows(self._rows, tiles.count)
        wrong = images.after - images.before - delta.image(tiles.probes, which)
        reach = tiles.sums(of.reach_left[self._rows : self._rows + tiles.count].square()).sqrt()
        products = 2 * weights.sqrt() + tiles.sums(changes).sqrt()
        allowed = _norm(tiles.probes) * products
        allowed += math.sqrt(of.terms) * of.condition * _norm(of.reach_right) * reach
        return bool((tiles.sums(wrong.square().sum(1)).sqrt() <= DOUBLE * allowed).all())

    def _account_for(self, images: Images) -> None:
        """Account for how far along ΔW the probes are moved."""
        moved, count = images.after - images.before, images.before.shape[1]
        self._along += dot(images.given.double() - images.before, moved) / count
        self._moved += dot(moved, moved) / count

    def _which(self, tile: Tile) -> slice:
        """The rows of W that a tile has."""
        assert self._expected is not None
        return self._expected.rows(self._rows + tile.start, len(tile.exact))

    def _compared_beside_infinities(self, tile: Tile) -> tuple[Tensor, Tensor, float]:
        """What `Tile.compare` returns; there is no error where an infinity is right."""
        exact, dtype = tile.exact, tile.given.dtype
        written = tile.given.to(torch.float64, memory_format=torch.contiguous_format)
        right = written == exact  # both the same infinity, which no merged weight may hold
        if self._expected is not None:
            right.fill_(False)
        if self._may_overflow:
            beyond = exact.abs() > torch.finfo(dtype).max
            right |= written.isinf() & beyond & (written.sign() == exact.sign())
        error = torch.where(right, 0.0, written - exact)
        ulps = error.abs().div_(unit_in_last_place(exact, dtype))
        ulps.nan_to_num_(math.inf, math.inf)
        found = entries_reaching(ulps, 0.5)
        ulps.view(-1)[found] = 0
        return found, error, float(ulps.max())

    def _judge(self, weight: Tensor, given: Tensor, suspects: "_Suspects") -> None:
        """Account for entries that were left out: too far is what is not the nearest, surely."""
        if not suspects.count:
            return
        row, column, at = suspects.all(given.shape[1])
        written = given[row, column].to(torch.float64)
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
        ulps = ((written - at).abs() / unit).nan_to_num_(math.inf, math.inf)
        self.largest_ulp = max(self.largest_ulp, float(ulps.max()))
        self.not_nearest += int(((ulps >= 0.5) & (ulps > half_unit + doubt / unit)).sum())


class _Suspects:
    """Entries to be looked at again.

    Attributes:
        count: how many.
    """

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[tuple[int, Tensor, Tensor]] = []

    def take(self, tile: Tile, found: Tensor) -> None:
        """Take entries of a tile by their flat indices, with W + ΔW there."""
        self._parts.append((tile.start, found, tile.flat_exact.index_select(0, found)))
        self.count += len(found)

    def all(self, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """What was taken of tiles that wide: rows and columns, and W + ΔW there."""
        index = torch.cat([found + start * columns for start, found, _ in self._parts])
        exact = torch.cat([exact for _, _, exact in self._parts])
        return index // columns, index % columns, exact


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
        merge: as of `Deviation.make`.
    """
    deviation = Deviation(of, product_unit)
    if merge is None:
        deviation.add(weight, written.to(weight.device))
    else:
        deviation.make(weight, written, merge)
    return deviation


def _norm(values: Tensor) -> float:
    return math.sqrt(squares(values))
