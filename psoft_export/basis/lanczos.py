"""Block Lanczos on the Gram matrix of the short side: the way to a leading space on a CPU.

In float64 throughout, with full orthogonalisation and no restart. Why: `docs/solver.md`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.basis.space import EPS, TOLERANCE, Space, random_rows
from psoft_export.basis.tall_matrix import TallMatrix, Workspace

_BLOCK = 16
_SHARE = 0.6  # of the short side; a larger space costs more than the whole spectrum
_MIDDLE_SIDE = 1536  # below, a space of half that size costs about as much: it must be promising
_PROMISING = 1e-2
_CROWDED = 1e-8
_EARLY = 6 * _BLOCK  # columns by which the first vector has settled, but where many are needed
_SETTLED = 1e-2  # residual of the first vector, relative to its value
_SWEEP_ROWS = 128  # of the basis: in float64 they stay in a processor's caches


def lanczos_space(matrix: TallMatrix, rank: int, kept: int, memory: Workspace) -> Space | None:
    """The leading `kept` Ritz vectors of the Gram matrix, or None where it does not converge.

    Stops when the first `rank` of them are within `TOLERANCE` by their residuals, and gives up
    on short sides below `_MIDDLE_SIDE` where half the room leaves an error above `_PROMISING`.
    """
    limit = int(_SHARE * matrix.size) // _BLOCK * _BLOCK
    midway = limit // 2 if matrix.size < _MIDDLE_SIDE else limit
    schedule = _Schedule(first=3 * kept)
    if schedule.next > midway:
        return None
    krylov = _KrylovSpace(matrix, limit, memory)
    while krylov.columns + _BLOCK <= limit:
        krylov.grow()
        columns = krylov.columns
        if columns == _EARLY:
            first = krylov.ritz(1)
            if float(first.residuals[0]) > _SETTLED * float(first.values[0]):
                matrix.gram()  # to be used from now on
        if columns < schedule.next and not krylov.is_exhausted:
            continue
        if columns <= kept:
            if krylov.is_exhausted:
                return None  # W has fewer directions than asked for
            continue
        ritz = krylov.ritz(rank)
        error = float((ritz.residuals / (ritz.values[:rank] - ritz.values[kept - 1])).max())
        if krylov.is_exhausted or error <= TOLERANCE:
            return None if _crowded(ritz.values[:kept]) else krylov.space(ritz.turn[:, :kept])
        if columns >= midway and error > _PROMISING:
            return None
        schedule.update(columns, error)
    return None


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
        is_exhausted: whether the Gram matrix leads nowhere outside of them.
    """

    def __init__(self, matrix: TallMatrix, limit: int, memory: Workspace) -> None:
        """Take memory for `limit` vectors; there are none yet."""
        self.columns = 0
        self.is_exhausted = False
        self._matrix = matrix
        self._basis = memory.take("basis", limit, matrix.size, matrix.device)
        self._projected = torch.zeros(limit, limit, dtype=torch.float64)
        self._block = random_rows(_BLOCK, matrix.size, matrix.device)
        self._coupling = torch.zeros(_BLOCK, _BLOCK, dtype=torch.float64)

    def grow(self) -> None:
        """Take in the next block, and find the one after it."""
        before, self.columns = self.columns, self.columns + _BLOCK
        self._basis[before : self.columns] = self._block
        image = self._matrix.gram_product(self._block)
        # In exact arithmetic only the last two blocks matter; the whole basis takes up rounding.
        self._take_away(image, max(0, before - _BLOCK), self.columns)
        for start in range(0, self.columns, _SWEEP_ROWS):
            self._take_away(image, start, min(self.columns, start + _SWEEP_ROWS))
        orthonormal, triangle = torch.linalg.qr(image.T)
        self._block, self._coupling = orthonormal.contiguous().T, triangle.cpu()
        smallest = float(self._coupling.diagonal().abs().min())
        self.is_exhausted = smallest <= EPS * float(self._projected[0, 0]) * self._matrix.size

    def _take_away(self, image: Tensor, start: int, end: int) -> None:
        """Make the newest image orthogonal to some of the vectors, and keep what was along them."""
        known = self._basis[start:end]
        along = known @ image.T
        image.addmm_(along.T, known, alpha=-1)
        self._projected[self.columns - _BLOCK : self.columns, start:end] += along.T.cpu()

    def ritz(self, count: int) -> _Ritz:
        """The eigenproblem within the space, with the residuals of the first `count`."""
        lower = self._projected[: self.columns, : self.columns].tril()
        values, turn = torch.linalg.eigh(lower + lower.tril(-1).T)
        values, turn = values.flip(0), turn.flip(1)
        outwards = self._coupling @ turn[self.columns - _BLOCK :, :count]
        return _Ritz(values, turn, torch.linalg.vector_norm(outwards, dim=0))

    def space(self, turn: Tensor) -> Space:
        """What some columns of `_Ritz.turn` stand for."""
        vectors = turn.T.to(self._basis.device) @ self._basis[: self.columns]
        return Space(vectors, "block-lanczos", self.columns)


def _crowded(values: Tensor) -> bool:
    """Whether as many eigenvalues as a block is wide coincide: there may be more of them.

    A Krylov space holds at most as many vectors of one eigenvalue as its blocks are wide. Of
    eigenvalues closer than what a residual within `TOLERANCE` resolves, no more may show up.
    """
    first = values[: -_BLOCK + 1]
    resolved = 16 * TOLERANCE * (first - values[-1]) + _CROWDED * values[0]
    return bool((first - values[_BLOCK - 1 :] <= resolved).any())


class _Schedule:
    """When to look at the Ritz values next: an eigenproblem costs as much as several steps."""

    def __init__(self, first: int) -> None:
        """Look at `first` columns for the first time."""
        self.next = first
        self._last: tuple[int, float] | None = None

    def update(self, columns: int, error: float) -> None:
        """Place the next look where the error, falling on as since the last, is small enough."""
        step = columns // 4
        if self._last is not None:
            before, previous = self._last
            if 0 < error < 0.3 * previous:
                rate = math.log(previous / error) / (columns - before)
                step = min(int(0.75 * math.log(error / TOLERANCE) / rate), columns // 3)
        self._last = (columns, error)
        self.next = columns + max(_BLOCK, step)
