"""The leading singular triplets of a weight, found without a full SVD, with a certificate.

Block Lanczos on the Gram matrix of the short side, in float64 throughout, with full
orthogonalisation and no restart; small problems go to an eigensolver instead. What is found is
measured against W afterwards, and what cannot be certified is found by the full SVD. Why this
method, and what else was measured: `docs/solver.md`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.basis.svd import Triplets

SOLVER = "block-lanczos/3"  # goes up whenever the bits of a result can change

_BLOCK = 16
_TILE_ROWS = 128  # of W, for each thread: in float64 they stay in a processor's caches
# Behind each row, in numbers: rows a power of two apart would all fall into the same few lines of
# a cache, which costs a product a tenth of its time and more.
_PADDING = 8
_SEED = 20261122
_EPS = torch.finfo(torch.float64).eps
_TOLERANCE = 2.0**-26  # of a vector, as an angle: a quarter of float32's rounding
_ACCEPTED = 2.0**-24
_RESIDUAL_FLOOR = 256 * _EPS  # what float64 products leave, relative to σ₁
_SMALL_SIDE = 512  # up to here the whole Gram matrix is cheaper than a Krylov space
_LARGE_SHARE = 1 / 8  # r beyond this share of the short side: likewise
_KRYLOV_SHARE = 0.6  # of the short side; a larger space costs more than the whole spectrum
_MIDDLE_SIDE = 1536  # below, a space of half that size costs about as much: it must be promising
_PROMISING = 1e-2
_CROWDED = 1e-8


@dataclass(frozen=True)
class Certificate:
    """What is known of a set of triplets, measured afterwards in float64 against W.

    Attributes:
        method: `block-lanczos`, `gram` or `svd`.
        residual: the largest ‖Wᵀuᵢ − σᵢvᵢ‖ for i ≤ r (‖Wvᵢ − σᵢuᵢ‖ where W has fewer rows than
            columns), relative to σ₁; the other of the two is zero to rounding by construction.
        orthogonality: the largest entry of |UᵀU − I| and |VᵀV − I|.
        vector_error: bound of the angle between a found vector and the true one, in radians,
            turning among the found vectors themselves apart (of second order in the residual).
        gap: the smallest distance of neighbours among σ₁ … σ_{r+1}, relative to σ₁.
        next_value: σ_{r+1}, or 0 where there is none.
        columns: dimension of the Krylov space; 0 for the other methods.
    """

    method: str
    residual: float
    orthogonality: float
    vector_error: float
    gap: float
    next_value: float
    columns: int

    @property
    def accepted(self) -> bool:
        """Whether the vectors are right to float32, or as right as float64 can make them."""
        if not self.orthogonality <= _ACCEPTED:
            return False
        return self.vector_error <= _ACCEPTED or self.residual <= _RESIDUAL_FLOOR


@dataclass(frozen=True)
class Solution:
    """Leading triplets, float32 (rounded once from float64), and their certificate."""

    triplets: Triplets
    certificate: Certificate


class Workspace:
    """The large arrays of a solve, kept for the next one; for one thread at a time.

    Fresh memory of that size comes from the operating system page by page, a tenth of a solve.
    """

    def __init__(self) -> None:
        """Takes no memory yet."""
        self._kept: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(
        self,
        name: str,
        rows: int,
        columns: int,
        device: torch.device,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """An uninitialised matrix, until `name` is asked for again with that device and dtype.

        Its rows are padded, so it is not contiguous.
        """
        key, count = (name, device, dtype), rows * (columns + _PADDING)
        if key not in self._kept or self._kept[key].numel() < count:
            self._kept.pop(key, None)  # before the larger one is made
            self._kept[key] = torch.empty(count, dtype=dtype, device=device)
        return self._kept[key][:count].view(rows, columns + _PADDING)[:, :columns]


class _TallMatrix:
    """W with its longer side (l) in rows and its shorter (k) in columns, and products in float64.

    On a CPU it stays in its own dtype, where it lies if its longer side is in rows, and is made
    float64 a tile at a time: less memory to read, and a tile that serves both products with W
    while it is in the caches.
    """

    def __init__(self, weight: Tensor, memory: Workspace) -> None:
        """Take W, which must not change meanwhile."""
        self.is_tall = weight.shape[0] >= weight.shape[1]
        values = weight if self.is_tall else weight.T
        on_cpu = weight.device.type == "cpu"
        dtype = weight.dtype if on_cpu else torch.float64
        self.length, self.size = values.shape
        self.device = weight.device
        if dtype == weight.dtype and values.is_contiguous():
            self._values = values
        else:
            kept = memory.take("weight", self.length, self.size, weight.device, dtype)
            self._values = kept.copy_(values)
        self._step = _TILE_ROWS * torch.get_num_threads() if on_cpu else self.length
        narrow = dtype != torch.float64
        self._tile = memory.take("tile", self._step, self.size, weight.device) if narrow else None

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows in float64, and which."""
        for start in range(0, self.length, self._step):
            rows = slice(start, min(start + self._step, self.length))
            values = self._values[rows]
            if self._tile is not None:
                values = self._tile[: len(values)].copy_(values)
            yield rows, values

    def to_long_side(self, near: Tensor) -> Tensor:
        """Vectors in rows (p × k) → their products with W (p × l)."""
        far = torch.empty(len(near), self.length, dtype=torch.float64, device=self.device)
        for rows, values in self._tiles():
            far[:, rows] = near @ values.T
        return far

    def to_short_side(self, far: Tensor) -> Tensor:
        """Vectors in rows (p × l) → their products with the transpose of W (p × k)."""
        near = torch.zeros(len(far), self.size, dtype=torch.float64, device=self.device)
        for rows, values in self._tiles():
            near.addmm_(far[:, rows], values)
        return near

    def gram_product(self, near: Tensor) -> Tensor:
        """Vectors in rows (p × k) → their products with the Gram matrix of the short side."""
        image = torch.zeros_like(near)
        for _, values in self._tiles():
            image.addmm_(near @ values.T, values)
        return image

    def gram(self) -> Tensor:
        """The Gram matrix of the short side, k × k."""
        total = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        for _, values in self._tiles():
            total.addmm_(values.T, values)
        return total

    def whole(self) -> Tensor:
        """All of it as k × l, float64."""
        return self._values.to(torch.float64).T


def leading_triplets(weight: Tensor, rank: int, workspace: Workspace | None = None) -> Solution:
    """The r leading singular triplets of W, as a float64 SVD rounded to float32 would give them.

    Deterministic for a given device and thread count. Signs are arbitrary, as those of any SVD.

    Args:
        weight: W, out × in, float32, float16 or bfloat16, finite, on the device to compute on.
        rank: r, at most min(out, in).
        workspace: memory to use again, where several weights follow one another.

    Returns:
        The triplets and what certifies them. `certificate.method` is `svd` where the faster
        methods could not be certified (no gap behind the vectors, W of lower rank, say).
    """
    memory = workspace or Workspace()
    matrix = _TallMatrix(weight, memory)
    size = matrix.size
    kept = min(size, rank + max(16, rank // 4))
    found = None
    if size > _SMALL_SIDE and rank <= _LARGE_SHARE * size:
        found = _certified(matrix, _lanczos(matrix, rank, kept, memory), rank, "block-lanczos")
    if found is None:
        found = _certified(matrix, _gram(matrix, kept), rank, "gram")
    if found is None:
        found = _full(matrix, kept, rank)
    near, values, far, certificate = found
    left, right = (far.T, near) if matrix.is_tall else (near.T, far)
    triplets = Triplets(left, values, right).truncated(rank).to(torch.float32)
    return Solution(triplets, certificate)


# Below, singular vectors stand in rows: `near` (p × k) on the short side of W, `far` (p × l) on
# the long one.
_Found = tuple[Tensor, Tensor, Tensor, Certificate]


@dataclass(frozen=True)
class _Space:
    """Orthonormal rows (p × k) that span the leading vectors, and the space they come from."""

    vectors: Tensor
    columns: int = 0


def _certified(matrix: _TallMatrix, space: _Space | None, rank: int, method: str) -> _Found | None:
    """The triplets within a space, or None where they cannot be certified."""
    if space is None:
        return None
    # Rayleigh–Ritz: the products of `near` with W are values · far by construction.
    orthonormal, triangle = torch.linalg.qr(matrix.to_long_side(space.vectors).T)
    turn, values, far = torch.linalg.svd(triangle.T)
    near, far = turn.T @ space.vectors, far @ orthonormal.T
    certificate = _certificate(matrix, near, values, far, rank, method, space.columns)
    return (near, values, far, certificate) if certificate.accepted else None


def _full(matrix: _TallMatrix, kept: int, rank: int) -> _Found:
    left, values, right = torch.linalg.svd(matrix.whole(), full_matrices=False)
    near, values, far = left.T[:kept], values[:kept], right[:kept]
    return near, values, far, _certificate(matrix, near, values, far, rank, "svd", 0)


def _gram(matrix: _TallMatrix, kept: int) -> _Space:
    _, vectors = torch.linalg.eigh(matrix.gram())
    return _Space(vectors.flip(1)[:, :kept].T)


def _lanczos(matrix: _TallMatrix, rank: int, kept: int, memory: Workspace) -> _Space | None:
    """The leading `kept` Ritz vectors of the Gram matrix, or None where it does not converge.

    Stops when the first `rank` of them are within `_TOLERANCE` by their residuals, and gives up
    on short sides below `_MIDDLE_SIDE` where half the room leaves an error above `_PROMISING`.
    """
    size = matrix.size
    limit = int(_KRYLOV_SHARE * size) // _BLOCK * _BLOCK
    midway = limit // 2 if size < _MIDDLE_SIDE else limit
    basis = memory.take("basis", limit, size, matrix.device)
    projected = torch.zeros(limit, limit, dtype=torch.float64)
    # Drawn on the CPU, so that it is the same start on every device.
    start = torch.randn(size, _BLOCK, dtype=torch.float64, generator=_generator())
    block = torch.linalg.qr(start.to(matrix.device))[0].T.contiguous()
    schedule = _Schedule(first=3 * kept)
    if schedule.next > midway:
        return None
    columns = 0
    while columns + _BLOCK <= limit:
        basis[columns : columns + _BLOCK] = block
        image = matrix.gram_product(block)
        columns += _BLOCK
        # In exact arithmetic only the last two blocks matter; the whole basis takes up rounding.
        first, rows = max(0, columns - 2 * _BLOCK), slice(columns - _BLOCK, columns)
        for since in (first, 0):
            known = basis[since:columns]
            weights = image @ known.T
            image.addmm_(weights, known, alpha=-1)
            projected[rows, since:columns] += weights.cpu()
        orthonormal, triangle = torch.linalg.qr(image.T)
        block, coupling = orthonormal.T.contiguous(), triangle.cpu()
        exhausted = float(coupling.diagonal().abs().min()) <= _EPS * float(projected[0, 0]) * size
        if columns < schedule.next and not exhausted:
            continue
        lower = projected[:columns, :columns].tril()
        values, vectors = torch.linalg.eigh(lower + lower.tril(-1).T)
        values, vectors = values.flip(0), vectors.flip(1)
        residuals = torch.linalg.vector_norm(coupling @ vectors[rows, :rank], dim=0)
        if columns <= kept:
            if exhausted:
                return None  # W has fewer directions than asked for
            continue
        error = float((residuals / (values[:rank] - values[kept - 1])).max())
        if exhausted or error <= _TOLERANCE:
            if _crowded(values[:kept]):
                return None
            leading = vectors[:, :kept].T.to(matrix.device)
            return _Space(leading @ basis[:columns], columns)
        if columns >= midway and error > _PROMISING:
            return None
        schedule.update(columns, error)
    return None


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def _crowded(values: Tensor) -> bool:
    """Whether as many eigenvalues as a block is wide coincide: there may be more of them.

    A Krylov space holds at most as many vectors of one eigenvalue as its blocks are wide. Of
    eigenvalues closer than what a residual within `_TOLERANCE` resolves, no more may show up.
    """
    first = values[: -_BLOCK + 1]
    resolved = 16 * _TOLERANCE * (first - values[-1]) + _CROWDED * values[0]
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
                step = min(int(0.75 * math.log(error / _TOLERANCE) / rate), columns // 3)
        self._last = (columns, error)
        self.next = columns + max(_BLOCK, step)


def _certificate(
    matrix: _TallMatrix,
    near: Tensor,
    values: Tensor,
    far: Tensor,
    rank: int,
    method: str,
    columns: int,
) -> Certificate:
    residual = torch.linalg.vector_norm(
        matrix.to_short_side(far) - values[:, None] * near, dim=1
    ).cpu()
    sigma = values.cpu()
    whole = len(sigma) == matrix.size
    outside = 0.0 if whole else float(sigma[-1] + residual[-1])
    inner = sigma[:rank]
    distance = (inner.square() - outside**2).clamp(min=0)
    error = torch.where(residual[:rank] > 0, residual[:rank] * inner / distance, 0.0)
    identity = torch.eye(len(sigma), dtype=torch.float64, device=near.device)
    skew = max(float((v @ v.T - identity).abs().max()) for v in (near, far))
    following = float(sigma[rank]) if rank < len(sigma) else 0.0
    steps = inner - torch.cat([inner[1:], torch.tensor([following], dtype=torch.float64)])
    largest = float(sigma[0]) or 1.0
    return Certificate(
        method=method,
        residual=float(residual[:rank].max()) / largest,
        orthogonality=skew,
        vector_error=float(error.nan_to_num(math.inf).max()),
        gap=float(steps.min()) / largest,
        next_value=following,
        columns=columns,
    )
