"""qGOFT (arXiv 2404.04316): W becomes W P, P a product of levels of parallel 2 × 2 transforms.

Of d inputs level 0 pairs (0, 1), (2, 3), …, level 1 (0, 2), (4, 6), …, each time those that are
left over being paired at twice the distance: d − 1 transforms in ⌈log₂ d⌉ levels. Rows of W are
multiplied by two factors of P, small blocks and what joins them, never by a d × d matrix.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["reference", "paper"]
_BLOCK = 64  # inputs that the levels of distances below it mix among themselves


@dataclass(frozen=True)
class GivensParameters:
    """What an adapter stores for one module.

    Attributes:
        angles: d − 1 numbers x, the angles being π · tanh(x); None in the relaxed form.
        blocks: (d − 1) × 2 × 2 transforms; None in the strict form.
        scaler: d numbers, or None.
        form: `paper`: true transforms of the pair (i, i + 2^level), W P = W S L₁ᵀ L₂ᵀ …, as the
            paper and the first version of its code have it. `reference`: what the forward pass
            of the code's second version computes, neighbours paired at every level, W S L₁ L₂ ….
            S is the diagonal of `scaler`.
    """

    angles: Tensor | None
    blocks: Tensor | None
    scaler: Tensor | None
    form: Form

    @property
    def dimension(self) -> int:
        """d."""
        stored = self.angles if self.angles is not None else self.blocks
        assert stored is not None
        return len(stored) + 1


@dataclass(frozen=True)
class Level:
    """`count` pairs (i, i + step), i = 0, 2·step, …; their transforms are from `first` on."""

    step: int
    first: int
    count: int

    @property
    def transforms(self) -> slice:
        """Which of the d − 1 transforms are of this level."""
        return slice(self.first, self.first + self.count)


def levels(dimension: int) -> Iterator[Level]:
    """The levels for d inputs, in the order in which their transforms are stored."""
    left, step, first = dimension, 1, 0
    while left > 1:
        yield Level(step, first, left // 2)
        first += left // 2
        left -= left // 2
        step *= 2


def given_angles(parameters: GivensParameters) -> Tensor:
    """The angles of the strict form in radians, float64, in (−π, π); none of the relaxed one."""
    if parameters.angles is None:
        return torch.empty(0, dtype=torch.float64)
    return math.pi * torch.tanh(parameters.angles.to("cpu", torch.float64))


def transforms(parameters: GivensParameters) -> Tensor:
    """The d − 1 transforms L, 2 × 2, float64: [[cos, −sin], [sin, cos]] in the strict form."""
    if parameters.blocks is not None:
        return parameters.blocks.to("cpu", torch.float64)
    angles = given_angles(parameters)
    rows = (
        torch.stack([angles.cos(), -angles.sin()], 1),
        torch.stack([angles.sin(), angles.cos()], 1),
    )
    return torch.stack(rows, 1)


@dataclass(frozen=True)
class RowMixing:
    """P as two factors: `blocks` of consecutive inputs, then `join` of each block's first.

    Attributes:
        dimension: d.
        blocks: n × b × b; the last is the identity where d ends within it.
        join: n × n, or None.
    """

    dimension: int
    blocks: Tensor
    join: Tensor | None

    def to(self, device: torch.device) -> "RowMixing":
        """The same on a device."""
        join = self.join.to(device) if self.join is not None else None
        return RowMixing(self.dimension, self.blocks.to(device), join)

    def apply(self, rows: Tensor) -> Tensor:
        """rows @ P.

        Args:
            rows: n × d, float64.
        """
        count, size, _ = self.blocks.shape
        if (missing := count * size - self.dimension) > 0:
            rows = torch.nn.functional.pad(rows, (0, missing))
        parts = rows.view(len(rows), count, size).transpose(0, 1)
        mixed = torch.bmm(parts, self.blocks).transpose(0, 1).reshape(len(rows), count * size)
        if self.join is not None:
            mixed[:, ::size] = mixed[:, ::size] @ self.join
        return mixed[:, : self.dimension].contiguous()


def row_mixing(parameters: GivensParameters) -> RowMixing:
    """P (float64, CPU)."""
    stored, dimension = transforms(parameters), parameters.dimension
    count = math.ceil(dimension / _BLOCK)
    blocks = torch.eye(_BLOCK, dtype=torch.float64).repeat(count, 1, 1)
    join = None
    if parameters.scaler is not None:
        scaler = torch.ones(count * _BLOCK, dtype=torch.float64)
        scaler[:dimension] = parameters.scaler.to("cpu", torch.float64)
        blocks *= scaler.view(count, _BLOCK, 1)
    if parameters.form == "reference":
        blocks = blocks @ _neighbours(stored, dimension, count)
        return RowMixing(dimension, blocks, None)
    if count > 1:
        join = torch.eye(count, dtype=torch.float64)
    for level in levels(dimension):
        own = stored[level.transforms]
        if level.step < _BLOCK:
            _mix_columns(blocks.permute(1, 0, 2).reshape(_BLOCK, -1), level, own, blocks)
        else:
            assert join is not None
            _mix_columns(join, Level(level.step // _BLOCK, 0, level.count), own, join)
    return RowMixing(dimension, blocks, join)


def _mix_columns(matrix: Tensor, level: Level, own: Tensor, into: Tensor) -> None:
    """Multiply a matrix by the Lᵀ of a level from the right; columns are inputs.

    Args:
        matrix: n × inputs; blocks side by side, or `join`.
        level: which columns are paired.
        own: its transforms.
        into: what the result is written to.
    """
    stride = 2 * level.step
    end = stride * level.count
    first, second = matrix[:, :end:stride], matrix[:, level.step : end : stride]
    mixed = matrix.clone()
    mixed[:, :end:stride] = first * own[:, 0, 0] + second * own[:, 0, 1]
    mixed[:, level.step : end : stride] = first * own[:, 1, 0] + second * own[:, 1, 1]
    if into.ndim == 3:
        mixed = mixed.view(len(matrix), len(into), -1).permute(1, 0, 2)
    into.copy_(mixed)


def _neighbours(stored: Tensor, dimension: int, count: int) -> Tensor:
    """L₁ L₂ … as the code's second version pairs: all within neighbours; count × b × b.

    At each level the entry L₀₀ stands at i, L₁₁ at i + step, −L₀₁ as the sine at i and L₁₀ at
    i + step; every input then takes its own cosine and the sine of its own place with its
    neighbour. Where a level has nothing, cosine 1 and sine 0.
    """
    pairs = torch.eye(2, dtype=torch.float64).repeat(count * _BLOCK // 2, 1, 1)
    for level in levels(dimension):
        cosine = torch.ones(count * _BLOCK, dtype=torch.float64)
        sine = torch.zeros(count * _BLOCK, dtype=torch.float64)
        stride, own = 2 * level.step, stored[level.transforms]
        end = stride * level.count
        cosine[:end:stride], cosine[level.step : end : stride] = own[:, 0, 0], own[:, 1, 1]
        sine[:end:stride], sine[level.step : end : stride] = -own[:, 0, 1], own[:, 1, 0]
        even, odd = (
            torch.stack([cosine[::2], -sine[::2]], 1),
            torch.stack([sine[1::2], cosine[1::2]], 1),
        )
        pairs = pairs @ torch.stack([even, odd], 1)
    blocks = torch.zeros(count, _BLOCK, _BLOCK, dtype=torch.float64)
    places = torch.arange(0, _BLOCK, 2)
    grouped = pairs.view(count, _BLOCK // 2, 2, 2)
    for row in (0, 1):
        for column in (0, 1):
            blocks[:, places + row, places + column] = grouped[:, :, row, column]
    return blocks
