"""What training gives from nothing on the data at hand, and what it tells of an adapter's signs.

An adapter's generators began at zero, and training moved them. Training again, for a few steps and
in the basis at hand, moves them to much the same places, whatever the signs of the basis that the
adapter was trained in: with D the signs that are sought, Q and D Q D belong together. That says of
each sign r − 1 times a little, also of those whose flip costs the data hardly anything, and it
needs no search. The signs for which the two agree best are those that make Σ dᵢ dⱼ Qᵢⱼ Q'ᵢⱼ
largest.

How much it says is measured. With the adapter's generator a multiple of the one found here and the
rest noise of variance σᵢⱼ², the pair i, j speaks for dᵢ dⱼ = 1 by 2 β Qᵢⱼ Q'ᵢⱼ / σᵢⱼ² nats, so that
it adds up with what the data say of the loss. Some rows are far noisier than others, so σᵢⱼ² is the
product of what row and column have of it. Signs chosen to agree do so by chance, too. By how much
is seen where the rows and columns of the adapter's generators are shuffled: a layer that agrees no
better than that says nothing, and one that does is discounted by it.

Once most signs are found, the model with them is a teacher: generators are trained from zero on
what it writes, to answer as it does. Its answers are chances, where those of the data are single
tokens, and it writes as much as is wanted, so these trainings are far less noisy, and correct signs
that taught them. They agree with the signs found in any case, so only trainings on the data tell
whether these are of the adapter's task, and without that no teacher is asked. Trainings of both
kinds count together, as the multiples of them whose sum is nearest to the adapter's generators:
those on the data are noisier, but do not repeat what a teacher has wrong.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psoft_export.algebra.relaxed_signs import RelaxedSigns, couplings
from psoft_export.recovery.examples import Example
from psoft_export.recovery.task_loss import TaskLoss, not_finite

TRAINING_STEPS = 40
TRAINING_ROWS = 4  # of the data in a step; few, so that the noise of two trainings differs
_RATE = 0.15  # of the mean size of the adapter's generators, a step
_WARM_UP = 5  # steps
_BETAS = (0.9, 0.99)
_SHUFFLES = 4
_SURE = 2.0  # standard deviations of chance beyond which a layer agrees
_RELATED = 5.0  # the same, of all layers together
_SETTLING = 0.25  # of what a row's entries say of its sign: so much counts alone
_CHOOSING = 0.5  # the same, between signs that searches found
_LEAST_NOISE = 0.01  # of the square of the adapter's generators
_FITS = 2  # of signs and what they make of the trainings, in turns
_ALIKE = 8  # entries of the mean noise that each row's noise is averaged with
_STARTS = 4  # eigenvectors from which signs are sought
_MOST_FLIPS = 2000


class Batches:
    """Rows of examples without end, all of them in each turn, in an order that is drawn."""

    def __init__(self, examples: Sequence[Example], rows: int, generator: torch.Generator) -> None:
        """`rows` in a batch, of which there must be as many examples."""
        self._examples = examples
        self._rows = rows
        self._generator = generator
        self._order: list[int] = []

    def __iter__(self) -> Iterator[list[Example]]:
        return self

    def __next__(self) -> list[Example]:
        if len(self._order) < self._rows:
            drawn = torch.randperm(len(self._examples), generator=self._generator)
            self._order += drawn.tolist()
        batch = self._order[: self._rows]
        del self._order[: self._rows]
        return [self._examples[number] for number in batch]


@dataclass(frozen=True)
class Mean:
    """A mean that more can be added to.

    Attributes:
        value: of all so far (modules × r × r, float32, CPU).
        count: how many.
    """

    value: Tensor
    count: int

    @classmethod
    def of(cls, values: Sequence[Tensor]) -> "Mean":
        """Of these."""
        return cls(torch.stack(list(values)).mean(0), len(values))

    def with_mean(self, other: "Mean | None") -> "Mean":
        """Of the two together."""
        if other is None:
            return self
        count = self.count + other.count
        return Mean((self.count * self.value + other.count * other.value) / count, count)


@dataclass(frozen=True)
class Retrained:
    """Generators that training gave, in the basis at hand.

    Attributes:
        whole: on the data.
        taught: on what models with signs found write and answer. None: not done.
    """

    whole: Mean
    taught: Mean | None = None

    def and_those_of(self, other: "Retrained") -> "Retrained":
        """Of two searches."""
        taught = other.taught if self.taught is None else self.taught.with_mean(other.taught)
        return Retrained(self.whole.with_mean(other.whole), taught)


def retrained(
    loss: TaskLoss,
    batches: Iterator[list[Example]],
    note: Callable[[float], None],
    *,
    teacher: Tensor | None = None,
) -> Tensor:
    """Generators after `TRAINING_STEPS` of Adam (arXiv 1412.6980) from zero (modules × r × r, CPU).

    Args:
        loss: the task's loss.
        batches: examples of each step.
        note: told the loss of each batch, in nats a target.
        teacher: generators of the model whose answers are learnt (modules × r × r); None: the
            examples' own are.

    Raises:
        NonFiniteError: the loss, or its slope, is NaN or infinite.
    """
    stored = loss.rotations.stored
    rate = _RATE * float(stored.abs().mean())
    position, first, second = (torch.zeros_like(stored) for _ in range(3))
    decay, decay_second = _BETAS
    for step, batch in zip(range(1, TRAINING_STEPS + 1), batches, strict=False):
        here = position.detach().requires_grad_(True)
        sums, counts = loss.loss(batch, here, teacher)
        lost = sums.sum()  # of a mean, slopes would be too small for half precision
        (slope,) = torch.autograd.grad(lost, here)
        if not slope.isfinite().all():
            raise not_finite("the loss of a batch, or its slope,")
        slope = loss.rotations.moves(slope)
        first.lerp_(slope, 1 - decay)
        second.lerp_(slope.square(), 1 - decay_second)
        size = (second / (1 - decay_second**step)).sqrt() + torch.finfo(slope.dtype).tiny
        warm = min(1.0, step / _WARM_UP)
        position -= warm * rate / (1 - decay**step) * first / size
        note(float(lost.detach() / counts.sum()))
    return position.cpu()


@dataclass(frozen=True)
class Kinship:
    """How far generators trained here agree with the adapter's at the signs where they do best.

    Attributes:
        signs: those at which they do (±1, modules × r).
        found: correlation of each module's entries there (modules).
        by_chance: what it is of shuffled generators, in the mean (modules).
        spread: standard deviation of that (modules).
    """

    signs: Tensor
    found: Tensor
    by_chance: Tensor
    spread: Tensor

    @property
    def errors(self) -> float:
        """By how many standard deviations of chance all modules together agree better than it."""
        beyond = (self.found - self.by_chance) / self.spread
        return float(beyond.sum()) / math.sqrt(len(beyond))

    @property
    def is_sure(self) -> bool:
        """Whether they do so beyond what chance would do."""
        return self.errors > _RELATED

    def discounts(self) -> Tensor:
        """What is left of each module's agreement without what chance gives; from 0 to 1."""
        surely = self.found > self.by_chance + _SURE * self.spread
        left = (1 - (self.by_chance / self.found.clamp_min(1e-30)).square()).clamp_min(0).sqrt()
        return left * surely


def kinship(rotations: RelaxedSigns, whole: Tensor, generator: torch.Generator) -> Kinship:
    """How far generators trained from nothing agree with those that are stored.

    Args:
        rotations: the adapter's.
        whole: trained here, modules × r × r.
        generator: draws the shuffles.
    """
    stored = rotations.stored.cpu()
    modules, rank, _ = stored.shape

    def at_best(generators: Tensor) -> tuple[Tensor, Tensor]:
        products = generators * whole
        signs = synchronized(rotations.paired(products))
        together = (products * couplings(signs)).sum((1, 2))
        sizes = generators.square().sum((1, 2)) * whole.square().sum((1, 2))
        return signs, together / sizes.sqrt().clamp_min(1e-30)

    shuffled = []
    for _ in range(_SHUFFLES):
        order = torch.rand(modules, rank, generator=generator).argsort(1)
        rows = stored.gather(1, order[:, :, None].expand(-1, -1, rank))
        shuffled.append(at_best(rows.gather(2, order[:, None, :].expand(-1, rank, -1)))[1])
    chance = torch.stack(shuffled)
    # Of few shuffles a module's own spread is not known well; that of all is.
    spread = (chance - chance.mean(0)).square().sum() / (modules * (_SHUFFLES - 1))
    spread = spread.sqrt().clamp_min(1e-6).expand(modules)
    # The mean over the shuffles errs itself.
    spread = spread * math.sqrt(1 + 1 / _SHUFFLES)
    return Kinship(*at_best(stored), chance.mean(0), spread)


@dataclass(frozen=True)
class Known:
    """What trainings say of signs.

    Attributes:
        signs: those that agree with them best (±1, modules × r).
        weights: what they say of each pair of signs (modules × r × r, symmetric, float32): signs d
            lose −½ Σ wᵢⱼ dᵢ dⱼ nats. Zero for a module of which they say nothing.
        related: how far they agree with the adapter.
    """

    signs: Tensor
    weights: Tensor
    related: Kinship

    @classmethod
    def by(
        cls,
        rotations: RelaxedSigns,
        trained: Retrained,
        generator: torch.Generator,
    ) -> "Known":
        """Weigh what trainings gave.

        Args:
            rotations: the adapter's.
            trained: what the trainings gave.
            generator: draws shuffles.
        """
        stored = rotations.stored.cpu()
        related = agreeing = kinship(rotations, trained.whole.value, generator)
        parts = trained.whole.value[:, None]
        if trained.taught is not None:
            parts = torch.stack([trained.whole.value, trained.taught.value], 1)
            agreeing = kinship(rotations, trained.taught.value, generator)
        trust = agreeing.discounts() if related.is_sure else torch.zeros(len(stored))
        least = _LEAST_NOISE * stored.square().mean((1, 2), keepdim=True)
        signs, noise = agreeing.signs, torch.ones_like(stored)
        for _ in range(_FITS):
            there = stored * couplings(signs)
            here = _fitted(there, parts, noise)
            noise = torch.maximum(_variances(there - here), least).clamp_min(1e-30)
            weights = rotations.paired(trust[:, None, None] * here * stored / noise)
            signs = synchronized(weights)
        return cls(signs, weights, related)

    def silent(self) -> "Known":
        """The same, of trainings that say nothing."""
        return replace(self, weights=torch.zeros_like(self.weights))

    def settling(self) -> "Known":
        """The same, as far as it counts where it settles a sign alone.

        Entries of one row err alike, as they come from the same data, so that all of them together
        say less than their sum.
        """
        return replace(self, weights=_SETTLING * self.weights)

    def choosing(self) -> "Known":
        """The same, as far as it counts where one of two is chosen that searches found."""
        return replace(self, weights=_CHOOSING * self.weights)

    def lost(self, module: int, signs: Tensor) -> float:
        """What a module, by its index, loses at signs (±1, r), in nats."""
        return -float(signs @ self.weights[module] @ signs) / 2

    def of_couplings(self, signs: Tensor) -> Tensor:
        """What negating each coupling costs, in nats (modules × r × r, float64).

        The entries ij and ji are of one coupling, and each shows all of it.
        """
        return 2 * (self.weights * couplings(signs)).double()


def _fitted(there: Tensor, parts: Tensor, noise: Tensor) -> Tensor:
    """The sum of multiples of several trainings' generators that is nearest to the adapter's.

    Args:
        there: the adapter's, at signs (modules × r × r).
        parts: of the trainings (modules × parts × r × r).
        noise: variance of each entry (modules × r × r).

    Returns:
        modules × r × r; no multiple is negative.
    """
    weighted = parts / noise[:, None]
    among = torch.einsum("mkij,mlij->mkl", weighted, parts).double()
    size = among.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    among = among / size + 1e-9 * torch.eye(parts.shape[1])
    with_there = torch.einsum("mkij,mij->mk", weighted, there).double() / size[..., 0]
    shares = torch.linalg.solve(among, with_there).clamp_min(0).to(parts)
    return torch.einsum("mk,mkij->mij", shares, parts)


def _variances(noise: Tensor) -> Tensor:
    """Of each entry (modules × r × r): what its row and its column have, as a product.

    Args:
        noise: modules × r × r; zero on the diagonal, where nothing is known.
    """
    squares = noise.square()
    others = noise.shape[-1] - 1
    mean = squares.sum((1, 2), keepdim=True) / max(1, others * (others + 1))
    rows, columns = (
        (squares.sum(axis, keepdim=True) + _ALIKE * mean) / (others + _ALIKE) for axis in (2, 1)
    )
    return rows * columns / mean.clamp_min(1e-30)


def synchronized(weights: Tensor) -> Tensor:
    """Signs d for which Σ wᵢⱼ dᵢ dⱼ is largest, as far as eigenvectors and flips find them.

    Args:
        weights: symmetric, modules × r × r.

    Returns:
        ±1, modules × r, float32.
    """
    rank = weights.shape[-1]
    weights = weights.double().masked_fill(torch.eye(rank, dtype=torch.bool), 0)
    leading = torch.linalg.eigh(weights).eigenvectors[..., -_STARTS:].mT  # modules × starts × r
    signs = torch.where(leading < 0, -1.0, 1.0).to(weights)
    fields = signs @ weights
    least = 1e-9 * weights.abs().amax((1, 2))[:, None, None]  # below it rounding alone flips
    for _ in range(_MOST_FLIPS):
        gain, place = (-signs * fields).max(-1, keepdim=True)  # modules × starts × 1
        flips = gain > least
        if not flips.any():
            break
        turned = torch.where(flips, -2 * signs.gather(-1, place), 0)
        signs = signs.scatter_add(-1, place, turned)
        fields = fields + turned * weights.gather(1, place.expand(-1, -1, rank))
    best = (fields * signs).sum(-1).argmax(1)
    return signs[torch.arange(len(signs)), best].float()
