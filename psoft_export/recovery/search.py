"""The search for signs: training again gives them, and vectors settle them by the loss.

Each cycle of a search trains generators again (`recovery.retraining`), in the first cycle on the
data, later on what the model with the signs found by then writes and answers, once it loses less
than the base. Then the signs grow by the loss of the data and by what the trainings say of them.
Where rotations are large, growth goes astray in some layers, and what the trainings say by
themselves can lose less; the better is what the cycle found.

All that a rotation takes of its basis's signs are the couplings cᵢⱼ = dᵢ dⱼ. Relaxed to numbers
|dᵢ| ≤ 1 they have many local minima, which differ in whole groups of signs: to turn a group over,
its couplings with the others have to pass through zero. So each dᵢ is a vector vᵢ, |vᵢ| ≤ 1, of
`_DIMENSIONS` numbers, and cᵢⱼ = vᵢ · vⱼ. A group of vectors turns over without leaving the sphere.
(That is how Goemans and Williamson, J. ACM 42, 1995, relax a maximum cut, in the low-rank form of
Burer and Monteiro, Math. Program. 95, 2003.) Signs are read off along the axis on which most of a
layer's vectors lie.

All layers start near zero, where the model is the base, and grow together, as they did in training;
not quite at zero, but a little along the signs that are known. In the second half of the steps a
penalty pulls every vector to the axis; without it the vectors fit the text better than any signs
do. (A penalty that rises is how AdaRound, arXiv 2004.10568, rounds weights.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from psoft_export.algebra.relaxed_signs import vector_couplings
from psoft_export.recovery.examples import Example, sampled
from psoft_export.recovery.retraining import (
    TRAINING_ROWS,
    TRAINING_STEPS,
    Batches,
    Known,
    Mean,
    Retrained,
    kinship,
    retrained,
)
from psoft_export.recovery.significance import is_below
from psoft_export.recovery.task_loss import Losses, TaskLoss, not_finite

_COMPARED = 32  # examples by which signs are compared with others, and with the base
_WRITTEN = 192  # examples that a model writes, to be trained again on them
_DIMENSIONS = 16  # of a vector
_NOISE = 0.1  # length of a vector at the start
_KEPT = 0.07  # of that, along signs that are known
_RATE = 0.4  # of a vector a step
_WARM_UP = 10  # steps
_RATE_FALLS = 0.6  # of the steps, before the rate goes down to zero
_PENALTY = 20.0  # nats for each sign that is not on the axis, at the end
_FREE_PART = 0.5  # of the steps, without penalty
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Cycle:
    """Trainings and growth.

    Attributes:
        search: name of the search that it goes on with.
        trainings: how many, of `TRAINING_STEPS` steps each.
        growth: steps of it.
    """

    search: str
    trainings: int
    growth: int

    @property
    def steps(self) -> int:
        """How many, of all of it."""
        return self.trainings * TRAINING_STEPS + self.growth


@dataclass(frozen=True)
class SearchState:
    """Where the searches are between two cycles; all that going on from there needs.

    Attributes:
        done: number of cycles done.
        found: name of each search → its signs (±1, modules × r, float32, CPU).
        trained: name of each search → what its trainings gave.
        steps: gradient steps done.
        generator: state of the generator that everything random is drawn from.
    """

    generator: Tensor
    done: int = 0
    steps: int = 0
    found: Mapping[str, Tensor] = field(default_factory=dict)
    trained: Mapping[str, Retrained] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """How far a search is.

    Attributes:
        step: steps done, of all searches.
        loss: of the last batch, in nats a target.
        undecided: share of signs whose vector has less than one half along the axis, as all have
            when they begin to grow; None while generators are trained.
    """

    step: int
    loss: float
    undecided: float | None


class SignSearch:
    """Searches for the signs of one adapter's modules, cycle after cycle of a plan.

    Attributes:
        plan: the cycles.
        state: after the last one.
        steps: gradient steps done.
    """

    def __init__(
        self,
        loss: TaskLoss,
        examples: Sequence[Example],
        plan: Sequence[Cycle],
        *,
        rows: int,
        seed: int,
        state: SearchState | None = None,
    ) -> None:
        """Prepare; runs nothing.

        Args:
            loss: the task's loss.
            examples: what is searched on.
            plan: the cycles, in order.
            rows: examples in a step of growth, and of a training by a teacher.
            seed: of everything random.
            state: where to go on, of a search with the same arguments.
        """
        self.plan = plan
        self._loss = loss
        self._examples = examples
        self._compared = sampled(examples, _COMPARED)
        self._rows = min(rows, len(examples))
        self._generator = torch.Generator().manual_seed(seed)
        self.state = state or SearchState(self._generator.get_state())
        self._generator.set_state(self.state.generator)
        self.steps = self.state.steps

    def run_cycle(self, note: Callable[[Step], None], teacher: Tensor | None) -> SearchState:
        """The next cycle; returns the state after it, which is also kept.

        Args:
            note: told of every step.
            teacher: signs that teach its trainings (±1, modules × r); None: the data do.

        Raises:
            NonFiniteError: the loss, or its slope, is NaN or infinite.
        """
        cycle, state = self.plan[self.state.done], self.state
        trained = self._trained_again(
            cycle.trainings,
            state.trained.get(cycle.search),
            teacher,
            note,
        )
        known = Known.by(self._loss.rotations, trained, self._generator)
        found = self._better(self.grown(known, cycle.growth, note), known)
        self.state = SearchState(
            self._generator.get_state(),
            state.done + 1,
            self.steps,
            {**state.found, cycle.search: found},
            {**state.trained, cycle.search: trained},
        )
        return self.state

    def known(self, name: str | None = None) -> Known:
        """What the trainings of one search by its name say, or those of all."""
        trained = self._of_all() if name is None else self.state.trained[name]
        return Known.by(self._loss.rotations, trained, self._generator)

    def known_again(self, signs: Tensor, trainings: int, note: Callable[[Step], None]) -> Known:
        """The same, with further trainings, as signs (±1, modules × r) found by now have them."""
        trained = self._trained_again(trainings, self._of_all(), signs, note)
        return Known.by(self._loss.rotations, trained, self._generator)

    def _of_all(self) -> Retrained:
        """What the trainings of all searches gave."""
        trained, *others = self.state.trained.values()
        for other in others:
            trained = trained.and_those_of(other)
        return trained

    def _better(self, grown: Tensor, known: Known) -> Tensor:
        """Signs that grew, or those that trainings say by themselves, if they lose less."""
        says = known.weights.abs().amax((1, 2)) > 0
        if not says.any():
            return grown
        said = torch.where(says[:, None], known.signs, grown)
        of_said, of_grown = (self._loss.losses(self._compared, signs) for signs in (said, grown))
        return said if of_said.mean < of_grown.mean else grown

    @cached_property
    def _of_base(self) -> Losses:
        return self._loss.losses(self._compared, None)

    def _trained_again(
        self,
        trainings: int,
        before: Retrained | None,
        signs: Tensor | None,
        note: Callable[[Step], None],
    ) -> Retrained:
        """What so many trainings give, with those before them.

        They are on the data, until they show that these are the adapter's task, and the model with
        signs found by then loses less than the base; then on what that writes and answers.
        """
        teacher, examples, rows = None, self._examples, TRAINING_ROWS
        if before is not None and signs is not None and self._can_teach(signs, before):
            teacher = self._loss.generators(signs)
            examples, rows = self._written(teacher), self._rows
        batches, told = self._batches(examples, rows), self._noting(note)
        given = Mean.of(
            [retrained(self._loss, batches, told, teacher=teacher) for _ in range(trainings)]
        )
        if before is None:
            return Retrained(given)
        if teacher is None:
            return replace(before, whole=given.with_mean(before.whole))
        return replace(before, taught=given.with_mean(before.taught))

    def _can_teach(self, signs: Tensor, trained: Retrained) -> bool:
        """Whether a model with signs may teach: data of its task, on which the base loses more.

        Data are of its task if trainings on them agree with the adapter beyond what chance does.
        """
        related = kinship(self._loss.rotations, trained.whole.value, self._generator)
        return related.is_sure and is_below(self._loss.losses(self._compared, signs), self._of_base)

    def _written(self, teacher: Tensor) -> list[Example]:
        """What the model writes with generators, each text from the beginning of an example."""
        beginnings: list[Example] = []
        for batch in self._batches(self._examples, 1):
            beginnings += batch
            if len(beginnings) == _WRITTEN:
                break
        return self._loss.written(beginnings, teacher, self._generator)

    def _batches(self, examples: Sequence[Example], rows: int) -> Batches:
        return Batches(examples, min(rows, len(examples)), self._generator)

    def _noting(self, note: Callable[[Step], None]) -> Callable[[float], None]:
        """What counts the steps of trainings, and tells of them."""

        def count(lost: float) -> None:
            self.steps += 1
            note(Step(self.steps, lost, None))

        return count

    def grown(self, known: Known, steps: int, note: Callable[[Step], None]) -> Tensor:
        """Signs (±1, modules × r, CPU) that grew from near zero.

        Args:
            known: where to, as far as that is known.
            steps: how many.
            note: told of every step.

        Raises:
            NonFiniteError: the loss, or its slope, is NaN or infinite.
        """
        device, rotations = self._loss.device, self._loss.rotations
        position = self._small(known).to(device).requires_grad_(True)
        weights = known.weights.to(device)
        moments = _LayerMoments(position)
        share = self._rows / len(self._examples)
        for step, batch in zip(
            range(steps), self._batches(self._examples, self._rows), strict=False
        ):
            vectors = _bounded(position)
            coupled = vector_couplings(vectors)
            sums, counts = self._loss.loss(batch, rotations.coupled(coupled))
            lost = sums.sum()  # of a mean, slopes would be too small for half precision
            along = _along_axis(vectors)
            done = step / steps
            held = -(weights * coupled).sum() / 2  # what holds or pulls vectors, beside the loss
            if done > _FREE_PART:
                pull = _PENALTY * (done - _FREE_PART) / (1 - _FREE_PART)
                held = held + pull * (1 - along.square()).sum()
            (slope,) = torch.autograd.grad(lost + share * held, position)
            if not slope.isfinite().all():
                raise not_finite("the loss of a batch, or its slope,")
            fall = min(1.0, (1 - done) / (1 - _RATE_FALLS))
            rate = _RATE * min(1.0, (step + 1) / _WARM_UP) * fall
            with torch.no_grad():
                position -= rate * moments.direction(slope)
            self.steps += 1
            undecided = float((along.detach().abs() < 0.5).float().mean())
            note(Step(self.steps, float(lost.detach() / counts.sum()), undecided))
        along = _along_axis(_bounded(position.detach()))
        return torch.where(along < 0, -1.0, 1.0).cpu()

    def _small(self, known: Known) -> Tensor:
        """Short vectors (modules × r × dimensions): random, and along signs that are known."""
        modules, rank = self._loss.rotations.shape
        dimensions = min(_DIMENSIONS, rank)
        drawn = torch.randn(modules, rank, dimensions, generator=self._generator)
        vectors = _NOISE / math.sqrt(dimensions) * drawn
        says = known.weights.abs().amax((1, 2)) > 0
        vectors[..., 0] += _KEPT * known.signs * says[:, None]
        return vectors


def _bounded(position: Tensor) -> Tensor:
    """Vectors of the same directions, with tanh of their lengths."""
    lengths = torch.linalg.vector_norm(position, dim=-1, keepdim=True).clamp_min(1e-9)
    bounded: Tensor = position * (lengths.tanh() / lengths)
    return bounded


def _along_axis(vectors: Tensor) -> Tensor:
    """The part of each vector along the axis of its layer (modules × r)."""
    scatter = (vectors.mT @ vectors).detach()
    axis = torch.linalg.eigh(scatter).eigenvectors[..., -1:]
    along: Tensor = (vectors @ axis)[..., 0]
    return along


class _LayerMoments:
    """Adam's direction (arXiv 1412.6980), with one second moment a layer.

    Signs that matter more then move faster, and the others follow them; a second moment for each
    sign would let noise move those that matter little as fast.
    """

    def __init__(self, position: Tensor) -> None:
        self._first = torch.zeros_like(position)
        self._second = position.new_zeros(len(position), 1, 1)
        self._steps = 0

    def direction(self, slope: Tensor) -> Tensor:
        self._steps += 1
        decay, decay_second = _BETAS
        self._first.lerp_(slope, 1 - decay)
        squares = slope.square().sum(2, keepdim=True).mean(1, keepdim=True)
        self._second.lerp_(squares, 1 - decay_second)
        first = self._first / (1 - decay**self._steps)
        second = self._second / (1 - decay_second**self._steps)
        direction: Tensor = first / (second.sqrt() + torch.finfo(slope.dtype).tiny)
        return direction
