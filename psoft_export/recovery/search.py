"""The search for signs: every sign becomes a vector, and the vectors fall onto one axis.

All that a rotation takes of its basis's signs are the couplings cᵢⱼ = dᵢ dⱼ. Relaxed to numbers
|dᵢ| ≤ 1 they have many local minima, which differ in whole groups of signs: to turn a group over,
its couplings with the others have to pass through zero. So each dᵢ is a vector vᵢ, |vᵢ| ≤ 1, of
`_DIMENSIONS` numbers, and cᵢⱼ = vᵢ · vⱼ. A group of vectors turns over without leaving the sphere.
(That is how Goemans and Williamson, J. ACM 42, 1995, relax a maximum cut, in the low-rank form of
Burer and Monteiro, Math. Program. 95, 2003.) Signs are read off along the axis on which most of a
layer's vectors lie.

All layers start near zero, where the model is the base, and grow together, as they did in training:
layers that grow beside others that are turned already find less. In the second half of a cycle of
steps a penalty pulls every vector to the axis; without it the vectors fit the text better than any
signs do. (A penalty that rises is how AdaRound, arXiv 2004.10568, rounds weights.) The next cycle
starts from the signs found, made small again, with noise beside them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.algebra.relaxed_signs import vector_couplings
from psoft_export.recovery.examples import Example
from psoft_export.recovery.task_loss import TaskLoss, not_finite

_DIMENSIONS = 16  # of a vector
_NOISE = 0.1  # length of a vector at the start of a cycle
_KEPT = 0.07  # of that, along signs that are known
_RATE = 0.1  # of a vector a step
_WARM_UP = 10  # steps
_RATE_FALLS = 0.6  # of a cycle, before the rate goes down to zero
_PENALTY = 20.0  # nats for each sign that is not on the axis, at the end of a cycle
_FREE_PART = 0.5  # of a cycle, without penalty
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Cycle:
    """Steps that start near zero.

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
        generator: state of the generator that everything random is drawn from.
    """

    done: int
    found: Mapping[str, Tensor]
    moved: Mapping[str, float]
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
            state = SearchState(0, {}, {}, self._generator.get_state())
        self._generator.set_state(state.generator)
        self.state = state
        self.steps = sum(cycle.steps for cycle in plan[: state.done])

    def run_cycle(self, note: Callable[[Step], None]) -> SearchState:
        """The next cycle; returns the state after it, which is also kept.

        Args:
            note: told of every step.

        Raises:
            NonFiniteError: the loss, or its slope, is NaN or infinite.
        """
        cycle = self.plan[self.state.done]
        known = self.state.found.get(cycle.search, self._starts.get(cycle.search))
        signs = self._grown(self._small(known), cycle, note)
        moved = 1.0 if known is None else 1 - agreement(signs, known, self._matters)
        self.state = SearchState(
            self.state.done + 1,
            {**self.state.found, cycle.search: signs},
            {**self.state.moved, cycle.search: moved},
            self._generator.get_state(),
        )
        return self.state

    def _small(self, known: Tensor | None) -> Tensor:
        """Short vectors (modules × r × dimensions): random, and along known signs."""
        modules, rank = self._loss.rotations.shape
        dimensions = min(_DIMENSIONS, rank)
        drawn = torch.randn(modules, rank, dimensions, generator=self._generator)
        vectors = _NOISE / math.sqrt(dimensions) * drawn
        if known is not None:
            vectors[..., 0] += _KEPT * known
        return vectors

    def _grown(self, start: Tensor, cycle: Cycle, note: Callable[[Step], None]) -> Tensor:
        """The signs after a cycle of steps."""
        position = start.to(self._loss.device, copy=True).requires_grad_(True)
        moments = _LayerMoments(position)
        order: list[int] = []
        for step in range(cycle.steps):
            if len(order) < self._rows:
                drawn = torch.randperm(len(self._examples), generator=self._generator)
                order += drawn.tolist()
            batch = [self._examples[order.pop(0)] for _ in range(self._rows)]
            vectors = _bounded(position)
            sums, counts = self._loss.loss(batch, vector_couplings(vectors))
            lost = sums.sum()  # of a mean, slopes would be too small for half precision
            along = _along_axis(vectors)
            done = step / cycle.steps
            penalty = lost.new_zeros(())
            if cycle.hardens and done > _FREE_PART:
                pull = _PENALTY * (done - _FREE_PART) / (1 - _FREE_PART)
                share = len(batch) / len(self._examples)
                penalty = pull * share * (1 - along.square()).sum()
            (slope,) = torch.autograd.grad(lost + penalty, position)
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


def agreement(signs: Tensor, others: Tensor, matters: Tensor) -> float:
    """Share of the signs that matter that are the same; arguments as of `same_signs`."""
    return float(same_signs(signs, others, matters)[matters].double().mean())


def same_signs(signs: Tensor, others: Tensor, matters: Tensor) -> Tensor:
    """Which signs agree (bool), each layer up to its sign as a whole, which says nothing.

    Args:
        signs: modules × r, ±1.
        others: the same.
        matters: which signs tell a layer's sign as a whole (bool, modules × r).
    """
    products = signs * others
    turned = (products * matters).sum(1, keepdim=True) < 0
    return products * torch.where(turned, -1.0, 1.0) > 0


def agreement_by_chance(matters: Tensor) -> float:
    """What `agreement` of signs drawn at random is in the mean; the argument as above."""
    counts = [int(count) for count in matters.sum(1) if count]
    # Of n fair coins n/2 + n C(n − 1, ⌊n/2⌋) / 2ⁿ show, in the mean, the side that more of them do.
    alike = (n / 2 + n * (math.comb(n - 1, n // 2) / 2**n) for n in counts)
    return float(sum(alike) / sum(counts))
