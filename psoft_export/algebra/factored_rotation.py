"""A rotation R by its factors, in whatever basis: what combining and re-expressing work on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.algebra import logarithm as lie
from psoft_export.algebra.combination import Method, Settings
from psoft_export.algebra.logarithm import NotARotationError
from psoft_export.algebra.parameters import RotationParameters
from psoft_export.algebra.rotation import core_rotation

_ALIGNED = 1e-6  # a change of basis nearer to signs than this, by entry, is one of signs


@dataclass(frozen=True)
class FactoredRotation:
    """R = diag(vector_b) · K · diag(vector_a), all float64 on the CPU.

    Attributes:
        core: K (r × r): a rotation, or any other matrix.
        vector_a: r numbers, ones where the adapter has none.
        vector_b: r numbers, ones where the adapter has none.
        is_orthogonal: K is a rotation by construction.
    """

    core: Tensor
    vector_a: Tensor
    vector_b: Tensor
    is_orthogonal: bool

    @classmethod
    def of(cls, parameters: RotationParameters) -> "FactoredRotation":
        """That of an adapter's parameters."""
        ones = torch.ones(parameters.rank, dtype=torch.float64)
        a, b = parameters.vector_a, parameters.vector_b
        return cls(
            core_rotation(parameters),
            ones if a is None else a.to("cpu", torch.float64),
            ones if b is None else b.to("cpu", torch.float64),
            parameters.orthogonal and parameters.series is None,
        )

    @classmethod
    def free(cls, matrix: Tensor) -> "FactoredRotation":
        """A matrix (r × r, float64) of which nothing is known."""
        ones = torch.ones(len(matrix), dtype=torch.float64)
        return cls(matrix, ones, ones, is_orthogonal=False)

    @classmethod
    def identity(cls, rank: int) -> "FactoredRotation":
        """R = I."""
        ones = torch.ones(rank, dtype=torch.float64)
        return cls(torch.diag(ones), ones, ones, is_orthogonal=True)

    @property
    def matrix(self) -> Tensor:
        """R, r × r."""
        return self.vector_b[:, None] * self.core * self.vector_a[None, :]

    @property
    def has_vectors(self) -> bool:
        """Whether a scaling vector changes anything."""
        return bool((self.vector_a != 1).any() or (self.vector_b != 1).any())

    @property
    def has_generator(self) -> bool:
        """Whether K is the Cayley transform of a skew matrix."""
        return self.is_orthogonal and not lie.half_turns(self.core)

    def parameters(self, *, free: bool, vectors: bool) -> RotationParameters:
        """What an adapter stores, float32.

        Args:
            free: store R itself rather than Q; needed where there is no `has_generator`.
            vectors: store scaling vectors, unless `free`.
        """
        rank = len(self.core)
        if free:
            return RotationParameters(rank, self.matrix.float(), orthogonal=False)
        rows, columns = torch.triu_indices(rank, rank, 1)
        entries = lie.generator(self.core)[rows, columns].float()
        if not vectors:
            return RotationParameters(rank, entries)
        return RotationParameters(rank, entries, self.vector_a.float(), self.vector_b.float())

    def in_basis(self, turned: Tensor) -> "FactoredRotation":
        """The same change in another basis, of the same or a higher rank.

        Args:
            turned: M (r × r'), orthonormal rows: the vectors of this basis in those of the other;
                R becomes I + Mᵀ (R − I) M.
        """
        signed = self._signed(turned)
        if signed is not None:
            return signed
        identity = torch.eye(turned.shape[1], dtype=torch.float64)
        if self.has_vectors:  # which do not stay diagonal
            moved = self.matrix - torch.eye(len(self.core), dtype=torch.float64)
            return FactoredRotation.free(identity + turned.T @ moved @ turned)
        moved = self.core - torch.eye(len(self.core), dtype=torch.float64)
        ones = torch.ones(len(identity), dtype=torch.float64)
        core = identity + turned.T @ moved @ turned
        return FactoredRotation(core, ones, ones, self.is_orthogonal)

    def _signed(self, turned: Tensor) -> "FactoredRotation | None":
        """As `in_basis`, where M is (D 0) for signs D: exact, and vectors stay what they are."""
        rank, larger = turned.shape
        nearest = nearest_signs(turned)
        if float((turned - nearest).abs().max()) > _ALIGNED:
            return None
        signs = nearest.diagonal()
        whole = FactoredRotation.identity(larger)
        core, a, b = whole.core.clone(), whole.vector_a.clone(), whole.vector_b.clone()
        core[:rank, :rank] = signs[:, None] * self.core * signs[None, :]
        a[:rank], b[:rank] = self.vector_a, self.vector_b
        return FactoredRotation(core, a, b, self.is_orthogonal)


def nearest_signs(turned: Tensor) -> Tensor:
    """(D 0) for the signs D of the diagonal of M (r × r')."""
    found = torch.zeros_like(turned)
    signs = torch.where(turned.diagonal() < 0, -1.0, 1.0)
    found.diagonal().copy_(signs)
    return found


@dataclass(frozen=True)
class Combined:
    """What combining gave.

    Attributes:
        rotation: the combination.
        half_turns: in how many planes an angle was π, so that its direction had to be chosen.
    """

    rotation: FactoredRotation
    half_turns: int


def combine_rotations(
    method: Method,
    rotations: Sequence[FactoredRotation],
    weights: Sequence[float],
    settings: Settings,
    random: Sequence[torch.Generator],
) -> Combined:
    """The combination of rotations of one module, in one basis.

    On the group R is taken apart: the signs of its vectors join K, K = C P with a rotation C and
    a symmetric P. The method combines the C; of P, the vectors' magnitudes and so of all that is
    no rotation the weighted geometric mean is taken. A strict adapter has none of it, and the
    combination of strict adapters is strict.

    Args:
        method: how.
        rotations: of each adapter, the identity where it does not change the module.
        weights: one each.
        settings: of the method.
        random: of each adapter, for what the method draws.

    Raises:
        NotARotationError: an R is singular or has a reflection in it; the message says which
            by its number, from 1.
        NoMeanError: the method finds no mean.
    """
    identity = torch.eye(len(rotations[0].core), dtype=torch.float64)
    if method.sum is not None:
        cores = [rotation.matrix - identity for rotation in rotations]
        total = method.sum(cores, weights, settings, random)
        return Combined(FactoredRotation.free(identity + total), 0)
    assert method.mean is not None
    parts = [_taken_apart(rotation, number) for number, rotation in enumerate(rotations, 1)]
    turned = [rotation for rotation, _ in parts]
    mean = method.mean(turned, weights)
    core, stretches = mean, [stretch for _, stretch in parts]
    if any(stretch is not None for stretch in stretches):
        total = torch.zeros_like(identity)
        for weight, stretch in zip(weights, stretches, strict=True):
            if stretch is not None:
                total += weight * lie.symmetric_logarithm(stretch)
        core = mean @ lie.symmetric_exponential(total)
    combined = FactoredRotation(
        core,
        _geometric_mean([rotation.vector_a for rotation in rotations], weights),
        _geometric_mean([rotation.vector_b for rotation in rotations], weights),
        is_orthogonal=core is mean,
    )
    return Combined(combined, sum(map(lie.half_turns, method.logarithms(turned, weights))))


def _taken_apart(rotation: FactoredRotation, number: int) -> tuple[Tensor, Tensor | None]:
    """The rotation in K, signs of the vectors included, and what stretches, or None."""
    if not (rotation.vector_a.all() and rotation.vector_b.all()):
        raise NotARotationError(f"{number}: has a zero in a scaling vector")
    core = rotation.vector_b.sign()[:, None] * rotation.core * rotation.vector_a.sign()[None, :]
    try:
        turned, stretch = lie.polar(core)
    except NotARotationError as cause:
        raise NotARotationError(f"{number}: {cause}") from cause
    return (core, None) if rotation.is_orthogonal else (turned, stretch)


def _geometric_mean(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for vector, weight in zip(vectors, weights, strict=True):
        total += weight * vector.abs().log()
    return total.exp()
