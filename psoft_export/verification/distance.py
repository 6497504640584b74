"""How far outputs are from the truth, summed up batch by batch in float64."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.verification.figures import OutputDistance

_CHUNK = 2**20  # numbers compared at a time


@dataclass
class DistanceSum:
    """A distance in the making.

    Attributes:
        are_logits: whether a position's outputs are the logits of one distribution.
        positions: number of positions compared, all finite.
        not_finite: number of positions left out because an output there is NaN or infinite.
    """

    are_logits: bool
    positions: int = 0
    not_finite: int = 0
    _numbers: int = 0
    _squares: float = 0.0
    _absolute: float = 0.0
    _largest: float = 0.0
    _divergence: float = 0.0
    _same_top: int = 0

    def add(self, truth: Tensor, outputs: Tensor) -> None:
        """Account for some positions.

        Args:
            truth: positions × outputs, any floating dtype, all finite.
            outputs: the same of the other model.
        """
        rows = max(1, _CHUNK // max(1, truth.shape[1]))
        for start in range(0, len(truth), rows):
            part = slice(start, start + rows)
            self._add(truth[part].double(), outputs[part].double())

    def _add(self, truth: Tensor, outputs: Tensor) -> None:
        finite = outputs.isfinite().all(dim=1)
        self.not_finite += int((~finite).sum())
        truth, outputs = truth[finite], outputs[finite]
        if not len(truth):
            return
        difference = (outputs - truth).abs()
        self.positions += len(truth)
        self._numbers += difference.numel()
        self._squares += float(difference.square().sum())
        self._absolute += float(difference.sum())
        self._largest = max(self._largest, float(difference.max()))
        if self.are_logits:
            expected, found = truth.log_softmax(dim=1), outputs.log_softmax(dim=1)
            self._divergence += float((expected.exp() * (expected - found)).sum())
            self._same_top += int((truth.argmax(dim=1) == outputs.argmax(dim=1)).sum())

    def result(self) -> OutputDistance | None:
        """The distance; None where no position was finite."""
        if not self.positions:
            return None
        return OutputDistance(
            rms=math.sqrt(self._squares / self._numbers),
            largest=self._largest,
            mean=self._absolute / self._numbers,
            divergence=max(0.0, self._divergence / self.positions) if self.are_logits else None,
            top1=self._same_top / self.positions if self.are_logits else None,
        )


def share_followed(truth: Tensor, tokens: Tensor) -> float:
    """The share of tokens before each row's first difference from the truth, over all rows.

    Args:
        truth: rows × length.
        tokens: the same of the other model.
    """
    same = (truth == tokens).long().cumprod(dim=1)
    return float(same.sum()) / truth.numel()


def cross_entropy(logits: Tensor, tokens: Tensor) -> float:
    """Sum of the losses, in nats, of each token after the first given those before it.

    Args:
        logits: rows × length × vocabulary, any floating dtype.
        tokens: rows × length.
    """
    total = 0.0
    for row, expected in zip(logits, tokens, strict=True):
        predicted = row[:-1].double()
        total += float(torch.nn.functional.cross_entropy(predicted, expected[1:], reduction="sum"))
    return total
