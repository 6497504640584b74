"""What a merged weight should be, and how far rounding may take two right evaluations apart."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

Delta = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Expected:
    """ΔW of one weight by a second evaluation, and what rounding may do to it.

    Attributes:
        delta: given rows of W (n × in, float64) and which rows they are, those of ΔW in float64.
        reach_left: a bound for each row (out), float64, and
        reach_right: one for each column (in), whose products bound the sums of |terms| that the
            entries of ΔW are made of.
        terms: how many terms the longest of these sums has.
        basis_doubt: how far A and B may be from those that the weight was merged with, relative
            to their entries.
        condition: how much the evaluation magnifies rounding, at least 1.
        start: the first row that is meant.
    """

    delta: Delta
    reach_left: Tensor
    reach_right: Tensor
    terms: int
    basis_doubt: float = 0.0
    condition: float = 1.0
    start: int = 0

    def of_rows(self, rows: slice) -> "Expected":
        """The same of some rows of W, which are counted from zero again."""
        return replace(self, reach_left=self.reach_left[rows], start=self.start + rows.start)

    def delta_of(self, weight: Tensor, first: int) -> Tensor:
        """ΔW of consecutive rows of W (float64), the first being row `first` of those meant."""
        begin = self.start + first
        return self.delta(weight, slice(begin, begin + len(weight)))
