"""Row blocks of a weight and of what became of it, compared in memory that is taken once.

Fresh memory for each block would come from the operating system page by page. And every call of
torch lets go of Python's lock, for which the threads of a merge then wait for one another, so that
what is done with each block is done in as few calls as can be.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from psoft_export.algebra.few import entries_reaching

# Float64 bytes of a tile. Smaller ones would fit a core's own cache, but several threads that
# work on small tiles wait for Python's lock longer than for memory.
_TILE_BYTES = 4 * 2**20
_DEVICE_TILE_BYTES = 64 * 2**20
_EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
}
# A weight of this many rows has one probe (products by two or more take ten times as long); of a
# smaller one, rows times probes come to `PROBED`, or there are `_MOST_PROBES`.
_ONE_PROBE = 1024
PROBED = 4096
_MOST_PROBES = 64
_LEAST_SQUARES = 1e-28  # a smaller sum in float32 may lack squares that are next to nothing


class Tile:
    """Some rows of W, which are to become those of W + ΔW, and the same rows of the output.

    Attributes:
        number: which of the weight's tiles it is.
        start: the first of its rows, of the weight's.
        exact: n × in, float64; W's rows at first.
        given: n × in, the output's rows, in its dtype.
        at: `exact` in the dtype of the comparison, once `narrow_exact` was called: float32 where
            the output is narrower, else `exact` itself.
        numbers: `given` in that dtype, once `widen_given` was called.
        flat_exact, flat_at: the same memory as `exact` and `at`, in one dimension.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, work: torch.dtype, device: torch.device
    ) -> None:
        """Take memory for tiles of `shape`, compared in `work` with numbers of `dtype`."""
        rows, self._columns = shape
        self.number = self.start = 0
        self._dtype = dtype
        self._is_narrow = work != torch.float64
        dtypes = {"exact": torch.float64, "numbers": work, "marks": torch.bool}
        if self._is_narrow:
            dtypes["at"] = work
        if dtype == torch.bfloat16:
            dtypes["steps"] = torch.int32
        count = rows * self._columns
        self._memory = {n: torch.empty(count, dtype=d, device=device) for n, d in dtypes.items()}
        self.keep(rows)
        self.given = self.exact  # until there are some

    def keep(self, rows: int) -> None:
        """Have so many rows from now on, at most as many as there was taken memory for."""
        flat = {name: memory[: rows * self._columns] for name, memory in self._memory.items()}
        shape = (rows, self._columns)
        self.flat_exact = flat["exact"]
        self.flat_at = flat["at"] if self._is_narrow else self.flat_exact
        self.exact, self.at = self.flat_exact.view(shape), self.flat_at.view(shape)
        self._error, self._marks = flat["numbers"], flat["marks"]
        self.numbers = self._error.view(shape)
        if self._dtype == torch.bfloat16:
            self._steps = flat["steps"]
            self._sizes = self._steps.view(torch.uint32)
            self._bits, self._at_bits = (t.view(torch.int32) for t in (self._error, self.flat_at))

    def become(self, made: Tensor) -> None:
        """Take what was made of `exact`, if it is in another place."""
        if made is not self.exact:
            self.exact.copy_(made)

    def narrow_exact(self) -> None:
        """Set `at`."""
        if self._is_narrow:
            self.at.copy_(self.exact)

    def widen_given(self) -> None:
        """Set `numbers`."""
        self.numbers.copy_(self.given)

    def compare(self) -> tuple[Tensor, Tensor, float]:
        """Where `numbers` may not be the nearest to `at`, and how far they are.

        Returns:
            The flat indices of entries that are half a unit in the last place from `at`, or
            farther, or nearly so; the errors, flat, in the memory of `numbers`; and the largest of
            those of the other entries, in units of the last place (in bfloat16 0 where there are
            entries found, since those are farther). An error that is not finite says that an
            entry is not either, and that nothing else here is known.
        """
        if self._dtype == torch.bfloat16:
            # Its numbers are float32 numbers whose last 16 bits are zeros, so that as integers
            # neighbours are 2^16 apart, and 2^15 from the tie between them. (Not so in float16:
            # its subnormals, which many weights are, have float32's spacing of larger numbers.)
            torch.sub(self._bits, self._at_bits, out=self._steps).abs_()
            # Unsigned, since the least integer is its own absolute value.
            found = entries_reaching(self._sizes, 2**15 - 2, self._marks)
            largest = 0.0 if len(found) else int(self._steps.max()) / 2**16
            return found, self._error.sub_(self.flat_at), largest
        bound = 0.5
        if self._is_narrow:  # in whose units the rounding to `at` is below this
            bound -= 2 * torch.finfo(self.at.dtype).eps / torch.finfo(self._dtype).eps
        error = self._error.sub_(self.flat_at)
        ulps = error.abs().div_(unit_in_last_place(self.flat_at, self._dtype))
        found = entries_reaching(ulps, bound, self._marks)
        return found, error, float(ulps.index_fill_(0, found, 0).max())


class Tiles:
    """The tiles of a weight and its output, one after the other in the same memory.

    Attributes:
        count: how many rows all of them have.
        rows: how many each has; the last may have fewer.
        work: the dtype of the comparison. What is narrow is compared in float32, and what is then
            beside ties again in float64.
        probes: V, random vectors, in × k, float64; the same for all weights of that width.
    """

    def __init__(self, weight: Tensor, output: Tensor) -> None:
        """Prepare to go through `weight` (out × in) and `output`, of the same shape and device."""
        self._weight, self._output = weight, output
        self.count, columns = weight.shape
        self.rows = _tile_rows(weight)
        self.work = torch.float32 if output.dtype.itemsize < 4 else torch.float64
        count = min(_MOST_PROBES, PROBED // max(1, self.count))
        if self.count >= _ONE_PROBE:
            count = 1
        drawn = torch.Generator().manual_seed(columns)
        probes = torch.randn(columns, count, generator=drawn, dtype=torch.float64)
        self.probes = probes.to(weight.device)

    def sums(self, rows: Tensor) -> Tensor:
        """The sums over each tile's rows of one number for each row."""
        tiles = -(-self.count // self.rows)
        return pad(rows, (0, tiles * self.rows - self.count)).view(tiles, self.rows).sum(1)

    def __iter__(self) -> Iterator[Tile]:
        """Each tile in turn, with rows of W in `exact`; the next takes the memory of the last."""
        if not self.count:
            return
        shape = (min(self.count, self.rows), self._weight.shape[1])
        tile = Tile(shape, self._output.dtype, self.work, self._weight.device)
        pairs = zip(*(torch.split(t, self.rows) for t in (self._weight, self._output)), strict=True)
        for number, (weight, given) in enumerate(pairs):
            if len(weight) < len(tile.exact):
                tile.keep(len(weight))
            tile.number, tile.start, tile.given = number, number * self.rows, given
            tile.exact.copy_(weight)
            yield tile


class Images:
    """What the probes V of `Tiles` are mapped to, tile by tile.

    Attributes:
        before: W V, out × k, float64.
        after: (W + ΔW) V, the same.
        given: the output times V, in the dtype that it is compared in.
    """

    def __init__(self, tiles: Tiles) -> None:
        """Take room for all tiles."""
        self._probes = tiles.probes
        self._narrow_probes = tiles.probes.to(tiles.work)
        shape = (tiles.count, tiles.probes.shape[1])
        self.before, self.after = (tiles.probes.new_empty(shape) for _ in range(2))
        self.given = self._narrow_probes.new_empty(shape)
        parts = (torch.split(image, tiles.rows) for image in (self.before, self.after, self.given))
        self._before, self._after, self._given = parts

    def see_weight(self, tile: Tile) -> None:
        """Map W's rows, which `exact` holds."""
        torch.mm(tile.exact, self._probes, out=self._before[tile.number])

    def see_sum(self, tile: Tile) -> None:
        """Map the rows of W + ΔW, which `exact` holds by then."""
        torch.mm(tile.exact, self._probes, out=self._after[tile.number])

    def see_given(self, tile: Tile) -> None:
        """Map `numbers`."""
        torch.mm(tile.numbers, self._narrow_probes, out=self._given[tile.number])


class SquareSums:
    """Sums of squares of one thing, tile by tile, read once at the end."""

    def __init__(self) -> None:
        """Start with no tile."""
        self._parts: list[Tensor] = []

    def add(self, values: Tensor) -> None:
        """Take all entries of a tile as a flat tensor, as its dtype sums up their squares."""
        self._parts.append(torch.dot(values, values))

    def all(self) -> Tensor | None:
        """The sum of each tile, float64; None where the dtype could not hold one of them.

        That is where one is infinite, or next to nothing in float32.
        """
        sums = torch.stack(self._parts)
        least = _LEAST_SQUARES if sums.dtype == torch.float32 else -1.0
        usual = bool(((sums > least) & sums.isfinite()).all())
        return sums.double() if usual else None


def row_parts(weight: Tensor, count: int) -> list[slice]:
    """Rows of W in `count` parts of nearly equal size, cut between tiles.

    So that a weight merged in parts is bit for bit the one merged at once.
    """
    rows, step = weight.shape[0], _tile_rows(weight)
    tiles = math.ceil(rows / step)
    ends = [min(rows, step * round(tiles * part / count)) for part in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends) if start < end]


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of `dtype` numbers at each entry of a float64 or float32 tensor, in its dtype.

    The power of two that is the entry's exponent alone, times the dtype's epsilon; below the
    smallest normal number the constant spacing of the subnormals.
    """
    limits = torch.finfo(dtype)
    bits, mask = _EXPONENTS[values.dtype]
    powers = values.view(bits).bitwise_and(mask).view(values.dtype)
    return powers.clamp_(limits.tiny, limits.max).mul_(limits.eps)


def squares(values: Tensor) -> float:
    """The sum of the squares, as exactly as the dtype sums up, whatever their size."""
    found = dot(values, values)
    if values.dtype == torch.float32 and not _LEAST_SQUARES < found < math.inf:
        wide = values.double()
        found = dot(wide, wide)
    return found


def dot(first: Tensor, second: Tensor) -> float:
    """The inner product of two tensors of the same shape."""
    return float(torch.dot(first.reshape(-1), second.reshape(-1)))


def _tile_rows(weight: Tensor) -> int:
    size = _TILE_BYTES if weight.device.type == "cpu" else _DEVICE_TILE_BYTES
    return max(1, size // (8 * max(weight.shape[1], 1)))
