"""qGOFT (arXiv 2404.04316): W becomes W P, P a product of levels of parallel 2 × 2 transforms.

Of d inputs level 0 pairs (0, 1), (2, 3), …, level 1 (0, 2), (4, 6), …, each time those that are
left over being paired at twice the distance: d − 1 transforms in ⌈log₂ d⌉ levels. Rows of W are
multiplied by factors of P, small blocks and what joins their firsts, never by a d × d matrix.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psoft_export.algebra.parameters import GivensParameters

# Inputs that a factor mixes among themselves, measured; with fewer, what joins them costs more.
_BLOCK = 32
_WHOLE = 128  # inputs that one matrix mixes all
_NEIGHBOURS = 8  # where only neighbours are mixed and nothing is joined


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


def givens_angles(parameters: GivensParameters) -> Tensor:
    """The angles of the strict form in radians, float64, in (−π, π); none of the relaxed one."""
    if parameters.angles is None:
        return torch.empty(0, dtype=torch.float64)
    return math.pi * torch.tanh(parameters.angles.to("cpu", torch.float64))


def transforms(parameters: GivensParameters) -> Tensor:
    """The d − 1 transforms L, 2 × 2, float64: [[cos, −sin], [sin, cos]] in the strict form."""
    if parameters.blocks is not None:
        return parameters.blocks.to("cpu", torch.float64)
    angles = givens_angles(parameters)
    rows = (
        torch.stack([angles.cos(), -angles.sin()], 1),
        torch.stack([angles.sin(), angles.cos()], 1),
    )
    return torch.stack(rows, 1)


@dataclass(frozen=True)
class RowMixing:
    """P as small factors: `blocks` of consecutive inputs, then `join` of each block's first.

    Attributes:
        dimension: d.
        blocks: n × b × b; the last is the identity where d ends within it.
        join: the same of n inputs, or None.
    """

    dimension: int
    blocks: Tensor
    join: "RowMixing | None" = None

    def to(self, device: torch.device) -> "RowMixing":
        """The same on a device."""
        join = self.join.to(device) if self.join is not None else None
        return RowMixing(self.dimension, self.blocks.to(device), join)

    def apply(self, rows: Tensor) -> Tensor:
        """rows @ P, contiguous.

        Args:
            rows: n × d, float64.
        """
        count, size, _ = self.blocks.shape
        if (missing := count * size - self.dimension) > 0:
            rows = torch.nn.functional.pad(rows, (0, missing))
        parts = rows.reshape(len(rows), count, size).transpose(0, 1)
        mixed = torch.bmm(parts, self.blocks).transpose(0, 1).reshape(len(rows), count * size)
        if self.join is not None:
            mixed[:, ::size] = self.join.apply(mixed[:, ::size])
        return mixed[:, : self.dimension].contiguous()


def row_mixing(parameters: GivensParameters) -> RowMixing:
    """P (float64, CPU)."""
    stored, dimension = transforms(parameters), parameters.dimension
    if parameters.form == "reference":
        mixing = RowMixing(dimension, _neighbours(stored, dimension))
    else:
        mixing = _joined(stored, list(levels(dimension)), dimension)
    if parameters.scaler is not None:
        count, size, _ = mixing.blocks.shape
        scaler = torch.ones(count * size, dtype=torch.float64)
        scaler[:dimension] = parameters.scaler.to("cpu", torch.float64)
        mixing.blocks.mul_(scaler.view(count, size, 1))
    return mixing


def distance_between_forms(parameters: GivensParameters) -> float:
    """‖P_reference − P_paper‖ / √d, Frobenius: 0 where both mean the same, 1.4 where unrelated.

    P of `reference` is within blocks, so outside of them the entries of P of `paper` are all that
    is left: of a block's first column, times the rest of what joins it.
    """
    one, other = (row_mixing(replace(parameters, form=form)) for form in ("reference", "paper"))
    _, apart, outside = _within_blocks(other)
    count, size, _ = apart.shape
    near = torch.eye(size, dtype=torch.float64).repeat(count, 1, 1)
    width = one.blocks.shape[1]
    for index in range(size // width):  # blocks of `reference` are smaller
        blocks = one.blocks[index :: size // width]
        within = slice(index * width, (index + 1) * width)
        near[: len(blocks), within, within] = blocks
    squares = (apart - near).square().sum() + outside.sum()
    return math.sqrt(float(squares) / parameters.dimension)


def _within_blocks(mixing: RowMixing) -> tuple[Tensor, Tensor, Tensor]:
    """P's diagonal, its entries within blocks, and of each row the sum of squares of the others.

    Of shapes n · b, n × b × b and n · b: d padded to whole blocks.
    """
    count, size, _ = mixing.blocks.shape
    inside, outside = mixing.blocks, torch.zeros(count * size, dtype=torch.float64)
    if mixing.join is not None:
        diagonal, entries, beyond = _within_blocks(mixing.join)
        squares = entries.square()
        squares.diagonal(dim1=1, dim2=2).zero_()
        rest = (squares.sum(2).flatten() + beyond)[:count]
        inside = inside.clone()
        inside[:, :, 0] *= diagonal[:count, None]
        outside = (mixing.blocks[:, :, 0].square() * rest[:, None]).flatten()
    return inside.diagonal(dim1=1, dim2=2).flatten(), inside, outside


def _joined(stored: Tensor, remaining: list[Level], dimension: int) -> RowMixing:
    """L₁ᵀ L₂ᵀ … of true pairs: the first levels within blocks, the others between their firsts.

    Args:
        stored: all transforms.
        remaining: levels that are left, their steps counted in inputs that are left.
        dimension: how many inputs are left.
    """
    size = _BLOCK if dimension > _WHOLE else max(_NEIGHBOURS, 2 ** len(remaining))
    count = math.ceil(dimension / size)
    blocks = torch.eye(size, dtype=torch.float64).repeat(count, 1, 1)
    within = [level for level in remaining if level.step < size]
    columns = blocks.permute(1, 0, 2).reshape(size, count * size)  # a block's columns are inputs
    for level in within:
        columns = _turned(columns, level, stored[level.transforms])
    blocks = columns.view(size, count, size).permute(1, 0, 2).contiguous()
    between = [Level(lv.step // size, lv.first, lv.count) for lv in remaining[len(within) :]]
    return RowMixing(dimension, blocks, _joined(stored, between, count) if between else None)


def _turned(matrix: Tensor, level: Level, own: Tensor) -> Tensor:
    """A matrix whose columns are inputs times the Lᵀ of a level."""
    stride = 2 * level.step
    near, far = (
        slice(0, stride * level.count, stride),
        slice(level.step, stride * level.count, stride),
    )
    first, second = matrix[:, near], matrix[:, far]
    turned = matrix.clone()
    turned[:, near] = first * own[:, 0, 0] + second * own[:, 0, 1]
    turned[:, far] = first * own[:, 1, 0] + second * own[:, 1, 1]
    return turned


def _neighbours(stored: Tensor, dimension: int) -> Tensor:
    """L₁ L₂ … as the code's second version pairs, all within neighbours: n × b × b.

    At each level the entry L₀₀ stands at i, L₁₁ at i + step, −L₀₁ as the sine at i and L₁₀ at
    i + step; every input then takes its own cosine and the sine of its own place with its
    neighbour. Where a level has nothing, cosine 1 and sine 0.
    """
    count = math.ceil(dimension / _NEIGHBOURS)
    inputs = count * _NEIGHBOURS
    pairs = torch.eye(2, dtype=torch.float64).repeat(inputs // 2, 1, 1)
    for level in levels(dimension):
        cosine = torch.ones(inputs, dtype=torch.float64)
        sine = torch.zeros(inputs, dtype=torch.float64)
        stride, own = 2 * level.step, stored[level.transforms]
        near = slice(0, stride * level.count, stride)
        far = slice(level.step, stride * level.count, stride)
        cosine[near], cosine[far] = own[:, 0, 0], own[:, 1, 1]
        sine[near], sine[far] = -own[:, 0, 1], own[:, 1, 0]
        even = torch.stack([cosine[::2], -sine[::2]], 1)
        odd = torch.stack([sine[1::2], cosine[1::2]], 1)
        pairs = pairs @ torch.stack([even, odd], 1)
    blocks = torch.zeros(count, _NEIGHBOURS, _NEIGHBOURS, dtype=torch.float64)
    places = torch.arange(0, _NEIGHBOURS, 2)
    grouped = pairs.view(count, _NEIGHBOURS // 2, 2, 2)
    for row in (0, 1):
        for column in (0, 1):
            blocks[:, places + row, places + column] = grouped[:, :, row, column]
    return blocks
