"""Block Lanczos on the Gram matrix of the short side: the way to a leading space on a CPU.

With full orthogonalisation and no restart; in float64, but on flat spectra, which need many
vectors, first in float32, for a space that is to be refined. Why: `docs/solver.md`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.basis.space import TOLERANCE, RitzPairs, Space, random_rows
from psoft_export.basis.tall_matrix import TallMatrix, Workspace
from psoft_export.device import multiplies_by_avx2

# Columns of a block: of narrow ones fewer are needed in all, but products by them are slower. With
# AVX2 12 took 6 to 9 % less than 16; with AVX-512 it was not tried. Products in float32 with the
# Gram matrix take no less time by 12 than by 16.
_EXACT_BLOCK = 12 if multiplies_by_avx2() else 16
_ROUGH_BLOCK = 16
_SHARE = 0.6  # of the short side; a larger space costs more than the whole spectrum
_COLUMNS = 3  # for each vector kept: the fewest in which the wanted ones may have converged
# Of the leading vector of the first block, the residual over the value is about the standard
# deviation of the Gram matrix's eigenvalues over their mean: below this, many vectors are needed.
_FLAT = 2.7
_SWEEP_ROWS = 128  # of the basis: they stay in a processor's caches
_ROUGH_RANGE = (2.0**-90, 2.0**100)  # of the first block's value: far inside float32's own


@dataclass(frozen=True)
class _Precision:
    """How a Krylov space is grown, and until when.

    Attributes:
        dtype: of the vectors and the products.
        block: columns of a block.
        tolerance: of the vectors wanted, as an angle.
        crowded: values closer than this, relative to the first, may be one.
        resolved: the least distance from the last value wanted to the last one kept, likewise.
        first_look: columns at the first look, besides `_COLUMNS` for each vector kept.
    """

    dtype: torch.dtype
    block: int
    tolerance: float
    crowded: float
    resolved: float
    first_look: int


_EXACT = _Precision(
    torch.float64, _EXACT_BLOCK, TOLERANCE, crowded=1e-8, resolved=0.0, first_look=0
)
_ROUGH = _Precision(torch.float32, _ROUGH_BLOCK, 1e-3, crowded=1e-5, resolved=1e-4, first_look=384)


def lanczos_spaces(matrix: TallMatrix, rank: int, kept: int, memory: Workspace) -> Iterator[Space]:
    """Spaces of the leading `kept` Ritz vectors of the Gram matrix, where they converge.

    Of a flat spectrum first one found in float32, to be refined. Else, or if the next is asked
    for, one whose first `rank` vectors are within `TOLERANCE` by their residuals.
    """
    room = int(_SHARE * matrix.size)
    if _COLUMNS * kept > room:
        return
    krylov = _KrylovSpace(matrix, room, memory, _EXACT)
    krylov.grow()
    first = krylov.ritz(1)
    largest = float(first.values[0])
    if float(first.residuals[0]) < _FLAT * largest:
        if _ROUGH_RANGE[0] < largest < _ROUGH_RANGE[1]:
            rough = _KrylovSpace(matrix, room, memory, _ROUGH)
            rough.use_gram()
            yield from _converged(rough, rank, kept)
            if rough.is_full:
                return  # float64 would need as many
        krylov.use_gram()
    yield from _converged(krylov, rank, kept)


@dataclass(frozen=True)
class _Ritz:
    """The Gram matrix within a Krylov space, by its eigenvectors; on the CPU.

    Attributes:
        values: eigenvalues, descending.
        turn: eigenvectors, in columns, by the vectors of the space.
        residuals: of the first of them, as norms.
    """

    values: Tensor
    turn: Tensor
    residuals: Tensor


class _KrylovSpace:
    """Blocks of orthonormal vectors, in rows, and the Gram matrix of the short side within them.

    Attributes:
        columns: how many vectors there are.
        room: how many there may be.
        precision: float64's or float32's.
        is_exhausted: whether the Gram matrix leads nowhere outside of them.
    """

    def __init__(
        self, matrix: TallMatrix, room: int, memory: Workspace, precision: _Precision
    ) -> None:
        """Take memory for `room` vectors; there are none yet."""
        dtype, block, device = precision.dtype, precision.block, matrix.device
        self.columns = 0
        self.room = room
        self.precision = precision
        self.is_exhausted = False
        self._matrix = matrix
        self._basis = memory.take("basis", room, matrix.size, device, dtype)
        # Products of the vectors with W, while those with the Gram matrix go by way of them.
        self._images: Tensor | None = memory.take("images", room, matrix.length, device)
        self._projected = torch.empty(room, room, dtype=torch.float64)  # up to `columns`
        self._block = random_rows(block, matrix.size, device).to(dtype)
        self._coupling = torch.zeros(block, block, dtype=torch.float64)

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another block."""
        return self.columns + self.precision.block > self.room

    def use_gram(self) -> None:
        """Go on with the Gram matrix, formed in this precision."""
        self._matrix.gram(self.precision.dtype)
        self._images = None

    def grow(self) -> None:
        """Take in the next block, and find the one after it."""
        block = self.precision.block
        before, self.columns = self.columns, self.columns + block
        self._projected[before : self.columns, : self.columns] = 0
        self._basis[before : self.columns] = self._block
        images = self._images[before : self.columns] if self._images is not None else None
        image = self._matrix.gram_product(self._block, images)
        # In exact arithmetic only the last two blocks matter; the whole basis takes up rounding.
        self._take_away(image, max(0, before - block), self.columns)
        for start in range(0, self.columns, _SWEEP_ROWS):
            self._take_away(image, start, min(self.columns, start + _SWEEP_ROWS))
        orthonormal, triangle = torch.linalg.qr(image.T)
        self._block, self._coupling = orthonormal.contiguous().T, triangle.to(self._coupling)
        smallest = float(self._coupling.diagonal().abs().min())
        rounding = torch.finfo(self.precision.dtype).eps * self._matrix.size
        self.is_exhausted = smallest <= rounding * float(self._projected[0, 0])

    def _take_away(self, image: Tensor, start: int, end: int) -> None:
        """Make the newest image orthogonal to some of the vectors, and keep what was along them."""
        known = self._basis[start:end]
        along = known @ image.T
        image.addmm_(along.T, known, alpha=-1)
        newest = slice(self.columns - self.precision.block, self.columns)
        self._projected[newest, start:end] += along.T.cpu()

    def ritz(self, count: int) -> _Ritz:
        """The eigenproblem within the space, with the residuals of the first `count`."""
        lower = self._projected[: self.columns, : self.columns].tril()
        values, turn = torch.linalg.eigh((lower + lower.tril(-1).T).to(self.precision.dtype))
        values, turn = values.flip(0).double(), turn.flip(1).double()
        outwards = self._coupling @ turn[self.columns - self.precision.block :, :count]
        return _Ritz(values, turn, torch.linalg.vector_norm(outwards, dim=0))

    def space(self, ritz: _Ritz, rank: int, kept: int) -> Space:
        """The first `kept` Ritz vectors, to be refined by the next `rank` if found in float32."""
        if self.precision is _EXACT:
            turn, images = ritz.turn[:, :kept], self._images
            if images is not None:
                images = turn.T.to(images) @ images[: self.columns]
            return Space(self._vectors(turn), "block-lanczos", self.columns, images)
        vectors = self._vectors(ritz.turn[:, : kept + rank])
        following = RitzPairs(ritz.values[kept : kept + rank].to(vectors), vectors[kept:])
        orthonormal = torch.linalg.qr(vectors[:kept].T.to(torch.float64))[0].T
        return Space(orthonormal, "mixed-lanczos", self.columns, following=following)

    def _vectors(self, turn: Tensor) -> Tensor:
        """What some columns of `_Ritz.turn` stand for, in rows."""
        return turn.T.to(self._basis) @ self._basis[: self.columns]


def _converged(krylov: _KrylovSpace, rank: int, kept: int) -> Iterator[Space]:
    """The space of the leading Ritz vectors once the first `rank` are as exact as asked for.

    Nothing where they do not converge within the room, where W has fewer directions, and where
    there may be more of those found, or float32 cannot tell them from those behind.
    """
    precision = krylov.precision
    schedule = _Schedule(precision.first_look + _COLUMNS * kept, precision)
    while True:
        while krylov.columns < schedule.next and not (krylov.is_full or krylov.is_exhausted):
            krylov.grow()
        if krylov.columns <= kept:
            return
        ritz = krylov.ritz(rank)
        behind = ritz.values[:rank] - ritz.values[kept - 1]
        if float(behind[-1]) <= precision.resolved * float(ritz.values[0]):
            return
        error = float((ritz.residuals / behind).max())
        if error <= precision.tolerance or krylov.is_exhausted:
            break
        if krylov.is_full:
            return
        schedule.update(krylov.columns, error)
    if not _crowded(ritz.values[:kept], precision):
        yield krylov.space(ritz, rank, kept)


def _crowded(values: Tensor, precision: _Precision) -> bool:
    """Whether as many eigenvalues as a block is wide coincide: there may be more of them.

    A Krylov space holds at most as many vectors of one eigenvalue as its blocks are wide. Of
    eigenvalues closer than what a residual within the tolerance resolves, no more may show up.
    """
    first = values[: -precision.block + 1]
    resolved = 16 * precision.tolerance * (first - values[-1]) + precision.crowded * values[0]
    return bool((first - values[precision.block - 1 :] <= resolved).any())


class _Schedule:
    """When to look at the Ritz values next: an eigenproblem costs as much as several steps."""

    def __init__(self, first: int, precision: _Precision) -> None:
        """Look at `first` columns for the first time, and until the error is within tolerance."""
        self.next = first
        self._precision = precision
        self._last: tuple[int, float] | None = None

    def update(self, columns: int, error: float) -> None:
        """Place the next look where the error, falling on as before, is small enough.

        Of the fall from the start on only half is reckoned with: the longer, the faster it gets.
        """
        step = columns // 4
        if self._last is None and 0 < error < 1:
            step = min(step, int(0.5 * self._left(error) * columns / -math.log(error)))
        elif self._last is not None:
            before, previous = self._last
            if 0 < error < 0.3 * previous:
                rate = math.log(previous / error) / (columns - before)
                step = min(int(0.75 * self._left(error) / rate), columns // 3)
        self._last = (columns, error)
        self.next = columns + max(self._precision.block, step)

    def _left(self, error: float) -> float:
        """The logarithm of what the error is still too large by."""
        return math.log(error / self._precision.tolerance)
