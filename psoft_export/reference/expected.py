"""What a merged weight should be, and how far rounding may take two right evaluations apart."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


class Delta(ABC):
    """ΔW of one weight, a few rows at a time."""

    @abstractmethod
    def add_to(self, weight: Tensor, rows: slice) -> float:
        """Add ΔW's rows to those of W, in place; returns the sum of the squares of ΔW there.

        Args:
            weight: rows of W, n × in, float64, contiguous.
            rows: which of W's they are.
        """


class DeltaRows(Delta):
    """ΔW by a function: given rows of W (n × in, float64) and which they are, ΔW's in float64."""

    def __init__(self, of: Callable[[Tensor, slice], Tensor]) -> None:
        self._of = of

    def add_to(self, weight: Tensor, rows: slice) -> float:
        """As of `Delta`."""
        delta = self._of(weight, rows)
        weight.add_(delta)
        flat = delta.reshape(-1)
        return float(torch.dot(flat, flat))


class DeltaProduct(Delta):
    """ΔW = left right, of which an image and a norm are far less work than the whole."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        """Take the factors, out × r and r × in, float64, on one device."""
        self._left, self._right = left, right

    def add_to(self, weight: Tensor, rows: slice) -> float:
        """As of `Delta`."""
        weight.addmm_(self._left[rows], self._right)
        return float(self.squares(rows).sum())

    def image(self, vectors: Tensor, rows: slice) -> Tensor:
        """Rows of ΔW V.

        Args:
            vectors: V, in × k, float64.
            rows: which.
        """
        return self._left[rows] @ (self._right @ vectors)

    def squares(self, rows: slice) -> Tensor:
        """The sum of the squares of ΔW's entries in each of some rows."""
        left = self._left[rows]
        return torch.sum((left @ self._gram) * left, 1).clamp_(min=0)  # below 0 by rounding

    @cached_property
    def _gram(self) -> Tensor:
        """The r × r Gram matrix of `right`."""
        return self._right @ self._right.T


@dataclass(frozen=True)
class Expected:
    """ΔW of one weight by a second evaluation, and what rounding may do to it.

    Attributes:
        delta: ΔW.
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

    def rows(self, first: int, count: int) -> slice:
        """Which of W's rows those from `first` on are, of those meant."""
        return slice(self.start + first, self.start + first + count)
