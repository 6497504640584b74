"""W as the solver multiplies by it: longer side in rows, memory kept.

Products are in float64, but for those with a Gram matrix that is formed in float32.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from psoft_export.device import multiplies_by_avx2

_TILE_ROWS = 256  # of W: in float64 they stay in a processor's caches
_ROUGH_TILE_ROWS = 1024  # in float32, of a product that is bound by arithmetic
# Behind each row, in numbers: rows a power of two apart would all fall into the same few lines of
# a cache, which costs a product a tenth of its time and more.
_PADDING = 8
_DIAGONAL_BLOCK = 256  # columns of the Gram matrix; of the rest half is mirrored
_PANEL_ROWS = 256  # of a float32 product by few vectors: a panel each took a tenth less time
# With AVX2, MKL multiplies few float64 vectors twice as fast where the long side of the result is
# that of its columns; with AVX-512 it is fast the other way.
_WIDE_RESULTS = multiplies_by_avx2()


class Workspace:
    """The large arrays of a solve, kept for the next one; for one thread at a time.

    Fresh memory of that size comes from the operating system page by page: up to a tenth of a
    solve.
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


class TallMatrix:
    """W with its longer side (l) in rows and its shorter (k) in columns, and products with it.

    On a CPU it stays in its own dtype, where it lies if its longer side is in rows, and is made
    float64 a tile at a time: less memory to read, and a tile that serves both products with W
    while it is in the caches.
    """

    def __init__(self, weight: Tensor, memory: Workspace) -> None:
        """Take W, which must not change meanwhile."""
        self.is_tall = weight.shape[0] >= weight.shape[1]
        values = weight if self.is_tall else weight.T
        self.length, self.size = values.shape
        self.device = weight.device
        self._memory = memory
        if weight.device.type == "cpu":
            self._values = values.contiguous()
        else:
            kept = memory.take("weight", self.length, self.size, weight.device)
            self._values = kept.copy_(values)
        self._grams: dict[torch.dtype, Tensor] = {}

    def _tiles(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
        """Rows in a dtype, and which."""
        step, tile, narrow = self.length, None, self._values.dtype != dtype
        if self.device.type == "cpu" and dtype == torch.float64:
            step = _TILE_ROWS
        elif narrow:
            step = _ROUGH_TILE_ROWS
        if narrow:
            tile = self._memory.take("tile", min(step, self.length), self.size, self.device, dtype)
        for start in range(0, self.length, step):
            rows = slice(start, min(start + step, self.length))
            values = self._values[rows]
            if tile is not None:
                values = tile[: len(values)].copy_(values)
            yield rows, values

    def to_long_side(self, near: Tensor) -> Tensor:
        """Vectors in rows (p × k) → their products with W (p × l)."""
        far = torch.empty(len(near), self.length, dtype=torch.float64, device=self.device)
        for rows, values in self._tiles():
            far[:, rows] = _products(near, values)
        return far

    def to_short_side(self, far: Tensor) -> Tensor:
        """Vectors in rows (p × l) → their products with the transpose of W (p × k)."""
        near = torch.zeros(len(far), self.size, dtype=torch.float64, device=self.device)
        for rows, values in self._tiles():
            near.addmm_(far[:, rows], values)
        return near

    def gram_product(self, near: Tensor, images: Tensor | None = None) -> Tensor:
        """Vectors in rows (p × k) → their products with the Gram matrix of the short side.

        By way of that matrix once it is formed in their dtype (`gram`), which takes less time,
        else of W, in float64, and then `images` (p × l) become their products with W. Faster of
        vectors that lie in columns, as the transpose of a contiguous matrix.
        """
        if images is None and near.dtype in self._grams:
            return _products(near, self._grams[near.dtype])
        image = torch.zeros(near.shape, dtype=torch.float64, device=self.device)
        for rows, values in self._tiles():
            along = _products(near, values)
            image.addmm_(along, values)
            if images is not None:
                images[:, rows] = along
        return image

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The Gram matrix of the short side, k × k; formed when a dtype is first asked for."""
        if dtype not in self._grams:
            total = self._memory.take("gram", self.size, self.size, self.device, dtype)
            blocks = list(_lower_blocks(0, self.size))
            for tile, values in self._tiles(dtype):
                added = 1 if tile.start else 0  # to what is there: at first nothing
                for rows, columns in blocks:
                    block = total[rows, columns]
                    block.addmm_(values[:, rows].T, values[:, columns], beta=added)
            for rows, columns in blocks:
                if rows != columns:
                    total[columns, rows] = total[rows, columns].T
            self._grams[dtype] = total
        return self._grams[dtype]

    def whole(self) -> Tensor:
        """All of it as k × l, float64."""
        return self._values.to(torch.float64).T


def _lower_blocks(start: int, end: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks, as large as can be, that cover what is not above a diagonal."""
    if end - start <= _DIAGONAL_BLOCK:
        yield slice(start, end), slice(start, end)
        return
    middle = (start + end) // 2
    yield from _lower_blocks(start, middle)
    yield from _lower_blocks(middle, end)
    yield slice(middle, end), slice(start, middle)


def _products(vectors: Tensor, rows: Tensor) -> Tensor:
    """Products of a few vectors (p × k) with some rows (n × k), p × n.

    The same numbers to rounding every way; which way is faster depends on the kernels.
    """
    if vectors.device.type != "cpu":
        return (rows @ vectors.T).T
    if vectors.dtype == torch.float32:
        return _products_by_panels(vectors, rows)
    return vectors @ rows.T if _WIDE_RESULTS else (rows @ vectors.T).T


def _products_by_panels(vectors: Tensor, rows: Tensor) -> Tensor:
    """What `_products` returns, in one batch of products by `_PANEL_ROWS` rows each."""
    (length, size), (count, _) = rows.shape, vectors.shape
    panels = length // _PANEL_ROWS
    whole = panels * _PANEL_ROWS
    image = rows.new_empty(length, count)
    torch.bmm(
        rows[:whole].view(panels, _PANEL_ROWS, size),
        vectors.T.expand(panels, size, count),
        out=image[:whole].view(panels, _PANEL_ROWS, count),
    )
    torch.mm(rows[whole:], vectors.T, out=image[whole:])
    return image.T
