"""The search for signs: every sign becomes a vector, and the vectors fall onto one axis.

All that a rotation takes of its basis's signs are the couplings cᵢⱼ = dᵢ dⱼ. Relaxed to numbers
|dᵢ| ≤ 1 they have many local minima, which differ in whole groups of signs: to turn a group over,
its couplings with the others have to pass through zero. So each dᵢ is a vector vᵢ, |vᵢ| ≤ 1, of
`_DIMENSIONS` numbers, and cᵢⱼ = vᵢ · vⱼ. A group of vectors turns over without leaving the sphere.
(That is how Goemans and Williamson, J. ACM 42, 1995, relax a maximum cut, in the low-rank form of
Burer and Monteiro, Math. Program. 95, 2003.) Signs are read off along the axis on which most of a
layer's vectors lie.

All layers start near zero, where the model is the base, and grow together, as they did in training.
In the second half of a cycle of steps a penalty pulls every vector to the axis; without it the
vectors fit the text better than any signs do. (A penalty that rises is how AdaRound, arXiv
2004.10568, rounds weights.)

Layers that say little grow among others that are not right yet, and stay wrong. Their slopes tell:
training left a rotation where neither more nor less of it gains anything, so where shrinking all of
a layer's couplings gains, the layer has wrong signs. The next cycle grows those layers again, from
nothing, beside the others as they were found; what then loses less is kept, layer by layer. Here
the entropy of the signs holds the vectors short, at a temperature that falls: what says much grows
first, and the rest beside it (Peterson and Anderson, Complex Systems 1, 1987: annealing of means).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.algebra.relaxed_signs import couplings, vector_couplings
from psoft_export.recovery.agreement import agreement
from psoft_export.recovery.examples import Example
from psoft_export.recovery.polish import FlipSlopes, crossed
from psoft_export.recovery.task_loss import TaskLoss, not_finite

_DIMENSIONS = 16  # of a vector
_NOISE = 0.1  # length of a vector at the start of a cycle
_KEPT = 0.07  # of that, along signs that are known
_RATE = 0.4  # of a vector a step
_RATE_AGAIN = 0.8  # the same, of layers that grow again
_HOT, _COLD = 10.0, 1.0  # temperature of these, in nats: at first, and when it has fallen
_COOLS = 0.7  # of a cycle, in which it falls
_DOUBTFUL = -3.0  # standard errors of what shrinking a layer costs, below which it grows again
_WARM_UP = 10  # steps
_RATE_FALLS = 0.6  # of a cycle, before the rate goes down to zero
_PENALTY = 20.0  # nats for each sign that is not on the axis, at the end of a cycle
_FREE_PART = 0.5  # of a cycle, without penalty
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Cycle:
    """Steps that start near zero; of a search that found signs already, for its doubtful layers.

    Attributes:
        search: name of the search that it goes on with.
        steps: how many.
        hardens: whether its second half pulls the vectors to an axis.
    """

    search: str
    steps: int
    hardens: bool


@dataclass(frozen=True)
class SearchState:
    """Where the searches are between two cycles; all that going on from there needs.

    Attributes:
        done: number of cycles done.
        found: name of each search → its signs (±1, modules × r, float32, CPU).
        moved: name of each search → share of its signs that matter which its last cycle changed.
        steps: gradient steps done; a cycle without doubtful layers takes none.
        generator: state of the generator that everything random is drawn from.
    """

    done: int
    found: Mapping[str, Tensor]
    moved: Mapping[str, float]
    steps: int
    generator: Tensor


@dataclass(frozen=True)
class Step:
    """How far a search is.

    Attributes:
        step: steps done, of all searches.
        loss: of the last batch, in nats a target.
        undecided: share of signs whose vector has less than one half along the axis, as all have
            at the start of a cycle.
    """

    step: int
    loss: float
    undecided: float


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
        starts: Mapping[str, Tensor],
        matters: Tensor,
        rows: int,
        seed: int,
        state: SearchState | None = None,
    ) -> None:
        """Prepare; runs nothing.

        Args:
            loss: the task's loss.
            examples: what is searched on.
            plan: the cycles, in order.
            starts: signs that searches start from (±1, modules × r); others start from nothing.
            matters: which signs do (bool, modules × r).
            rows: examples in a step.
            seed: of everything random.
            state: where to go on, of a search with the same arguments.
        """
        self.plan = plan
        self._loss = loss
        self._examples = examples
        self._starts = starts
        self._matters = matters
        self._rows = min(rows, len(examples))
        self._generator = torch.Generator().manual_seed(seed)
        if state is None:
            state = SearchState(0, {}, {}, 0, self._generator.get_state())
        self._generator.set_state(state.generator)
        self.state = state
        self.steps = state.steps

    def run_cycle(self, note: Callable[[Step], None]) -> SearchState:
        """The next cycle; returns the state after it, which is also kept.

        Args:
            note: told of every step.

        Raises:
            NonFiniteError: the loss, or its slope, is NaN or infinite.
        """
        cycle = self.plan[self.state.done]
        before = self.state.found.get(cycle.search)
        if before is not None:
            signs = self._grown_again(before, cycle, note)
        else:
            before = self._starts.get(cycle.search)
            signs = self._grown(_Start(self._small(before), _RATE), cycle, note)
        moved = 1.0 if before is None else 1 - agreement(signs, before, self._matters)
        self.state = SearchState(
            self.state.done + 1,
            {**self.state.found, cycle.search: signs},
            {**self.state.moved, cycle.search: moved},
            self.steps,
            self._generator.get_state(),
        )
        return self.state

    def _grown_again(self, signs: Tensor, cycle: Cycle, note: Callable[[Step], None]) -> Tensor:
        """Signs whose doubtful layers were grown anew; of each the better."""
        costs = FlipSlopes.at(self._loss, self._examples, signs, self._rows).of_shrinking()
        doubtful = (costs < _DOUBTFUL).nonzero()[:, 0]
        if not len(doubtful):
            return signs
        start = _Start(self._small(None)[doubtful], _RATE_AGAIN, doubtful, signs, is_hot=True)
        return crossed(self._loss, self._examples, signs, self._grown(start, cycle, note))[0]

    def _small(self, known: Tensor | None) -> Tensor:
        """Short vectors (modules × r × dimensions): random, and along known signs."""
        modules, rank = self._loss.rotations.shape
        dimensions = min(_DIMENSIONS, rank)
        drawn = torch.randn(modules, rank, dimensions, generator=self._generator)
        vectors = _NOISE / math.sqrt(dimensions) * drawn
        if known is not None:
            vectors[..., 0] += _KEPT * known
        return vectors

    def _grown(self, start: "_Start", cycle: Cycle, note: Callable[[Step], None]) -> Tensor:
        """The signs after a cycle of steps."""
        position = start.vectors.to(self._loss.device, copy=True).requires_grad_(True)
        moments = _LayerMoments(position)
        order: list[int] = []
        for step in range(cycle.steps):
            if len(order) < self._rows:
                drawn = torch.randperm(len(self._examples), generator=self._generator)
                order += drawn.tolist()
            batch = [self._examples[order.pop(0)] for _ in range(self._rows)]
            vectors = _bounded(position)
            sums, counts = self._loss.loss(batch, start.beside_others(vector_couplings(vectors)))
            lost = sums.sum()  # of a mean, slopes would be too small for half precision
            along = _along_axis(vectors)
            done = step / cycle.steps
            held = lost.new_zeros(())  # what holds or pulls vectors, beside the loss
            if cycle.hardens and done > _FREE_PART:
                pull = _PENALTY * (done - _FREE_PART) / (1 - _FREE_PART)
                held = pull * (1 - along.square()).sum()
            if start.is_hot:
                temperature = _HOT * (_COLD / _HOT) ** min(1.0, done / _COOLS)
                held = held - temperature * _entropy(vectors)
            share = len(batch) / len(self._examples)
            (slope,) = torch.autograd.grad(lost + share * held, position)
            if not slope.isfinite().all():
                raise not_finite("the loss of a batch, or its slope,")
            fall = min(1.0, (1 - done) / (1 - _RATE_FALLS))
            rate = start.rate * min(1.0, (step + 1) / _WARM_UP) * fall
            with torch.no_grad():
                position -= rate * moments.direction(slope)
            self.steps += 1
            undecided = float((along.detach().abs() < 0.5).float().mean())
            note(Step(self.steps, float(lost.detach() / counts.sum()), undecided))
        along = _along_axis(_bounded(position.detach()))
        return start.among_others(torch.where(along < 0, -1.0, 1.0).cpu())


@dataclass(frozen=True)
class _Start:
    """Where a cycle starts.

    Attributes:
        vectors: short, layers × r × dimensions.
        rate: of a vector a step.
        layers: indices of the layers that the vectors are of; None: all.
        others: the signs of all layers (±1, modules × r), where those stay that have no vectors.
        is_hot: whether entropy holds the vectors.
    """

    vectors: Tensor
    rate: float
    layers: Tensor | None = None
    others: Tensor | None = None
    is_hot: bool = False

    def beside_others(self, coupled: Tensor) -> Tensor:
        """The couplings of all layers, of those that the vectors give."""
        if self.layers is None or self.others is None:
            return coupled
        still = couplings(self.others.to(coupled))
        return still.index_copy(0, self.layers.to(coupled.device), coupled)

    def among_others(self, signs: Tensor) -> Tensor:
        """The signs of all layers, of those that the vectors gave."""
        if self.layers is None or self.others is None:
            return signs
        return self.others.index_copy(0, self.layers, signs)


def _entropy(vectors: Tensor) -> Tensor:
    """Of signs whose mean values are as long as the vectors, added up, in nats."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1).clamp_max(1 - 1e-6)
    either = torch.stack([1 + lengths, 1 - lengths]) / 2
    return -(either * either.log()).sum()


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
