"""The search for signs: relaxed, hardened, and checked flip by flip.

Signs are ±1, and their number is in the hundreds or thousands, so they are first relaxed to
d = tanh(s) and moved by gradients of the task's loss (`algebra.relaxed_signs`). Loss surfaces of
this kind (products dᵢ dⱼ with couplings of either sign) have many local minima that differ in whole
groups of signs. So the search goes in cycles, at whose start d is near zero, and what several find
is crossed, layer by layer. In the first half all layers move, from random signs or from what they
were, shrunk. In the second some layers start from nothing beside the best signs so far, and a
penalty pulls every |d| to 1; without it the sizes of d fit the text better than any signs do. (A
penalty that rises is how AdaRound, arXiv 2004.10568, rounds weights.)

What a flip costs is predicted for all signs, and for groups of a layer's, from one pass: with a(x)
the slope of the loss of example x along a flip, the cost is Σₓ a(x) + ½ Σₓ a(x)², whose second term
is the empirical Fisher information in the place of the curvature. Where the prediction is small the
flip is tried.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from psoft_export.algebra.relaxed_signs import couplings
from psoft_export.recovery.examples import Example
from psoft_export.recovery.task_loss import TaskLoss

CYCLE = 60  # steps from one shrinking to the next
SETTLED = math.log(1000)  # nats by which the data speak for a sign
_RATE = 0.1  # of s a step; tanh(1) = 0.76
_SHRUNK = 0.1  # the size of d at the start of a cycle
_HARD = 0.99  # the size of d where signs are taken up again
_PENALTY = 20.0  # nats for each d at zero, at the end of a later cycle
_FIRST_PART = 0.25  # of a cycle, without penalty
_RATE_FALLS = 0.6  # of a cycle, before the rate goes down to zero
_WARM_UP = 10  # steps
_FREE_SHARE = 0.5  # of the cycles, in which all layers move, without penalty
_CYCLES_OF_START = 2  # of each random start
_FEW_LAYERS = 0.3  # share that starts from nothing in the later cycles
_BETAS = (0.9, 0.99)
_TRIED = 48  # flips a round of the polish
_SCREENED = 3  # of so many examples one tells whether a flip is worth running the others
ROUNDS = 6  # of the polish at most
_FEW_KEPT = 2  # flips of a round, after which the next is not worth it
_SLOPES_BYTES = 2**29  # for the slopes along flips
_FEWEST_SLOPES = 16  # examples


@dataclass(frozen=True)
class SearchState:
    """Where a search is between two cycles; all that going on from there needs.

    Attributes:
        cycle: number of cycles done.
        position: s, modules × r, float32, CPU.
        best: the best signs so far (±1, modules × r, float32, CPU).
        best_loss: what the training examples lose at them, in nats a target.
        moved: share of signs that the last cycle changed.
        generator: state of the generator that everything random is drawn from.
    """

    cycle: int
    position: Tensor
    best: Tensor
    best_loss: float
    moved: float
    generator: Tensor


@dataclass(frozen=True)
class Step:
    """How far a search is.

    Attributes:
        step: steps done.
        loss: of the last batch, in nats a target.
        undecided: share of d within [−½, ½].
    """

    step: int
    loss: float
    undecided: float


class SignSearch:
    """The search for the signs of one adapter's modules.

    Attributes:
        cycles: how many are planned.
        state: after the last cycle.
        steps: gradient steps done.
    """

    def __init__(
        self,
        loss: TaskLoss,
        examples: Sequence[Example],
        start: Tensor,
        *,
        cycles: int,
        rows: int,
        seed: int,
        starts_anew: bool = False,
        state: SearchState | None = None,
    ) -> None:
        """Prepare; runs nothing but the loss at the start.

        Args:
            loss: the task's loss.
            examples: what is searched on.
            start: what to start from (modules × r): ±1, or numbers of that size whose signs and
                sizes are taken.
            cycles: of `CYCLE` steps each.
            rows: examples in a step.
            seed: of everything random.
            starts_anew: whether the first half of the search is several searches from random
                signs, of each layer of which the best is taken.
            state: where to go on, of a search with the same arguments.
        """
        self._loss = loss
        self._examples = examples
        self.cycles = cycles
        self._starts_anew = starts_anew
        self._rows = min(rows, len(examples))
        self._generator = torch.Generator().manual_seed(seed)
        signs = torch.where(start < 0, -1.0, 1.0)
        here = loss.losses(examples, signs)
        self._targets = float(here.counts.sum())
        if state is None:
            random = self._generator.get_state()
            state = SearchState(0, start.float() * _SHRUNK, signs, here.mean, 1.0, random)
        self._generator.set_state(state.generator)
        self.state = state
        self.steps = state.cycle * CYCLE

    @property
    def is_done(self) -> bool:
        """Whether every cycle is done."""
        return self.state.cycle >= self.cycles

    def run_cycle(self, note: Callable[[Step], None]) -> SearchState:
        """One cycle; returns the state after it, which is also kept.

        Args:
            note: told of every step.
        """
        state = self.state
        if self._is_free(state.cycle):
            position = self._grown(self._free_start(state), 0.0, None, note)
        else:
            # As many layers as can find their signs among those that stay.
            drawn = torch.rand(len(state.best), generator=self._generator)
            layers = drawn <= max(_FEW_LAYERS, float(drawn.min()))  # one at least
            position = self._grown(self._from_nothing(state.best, layers), _PENALTY, layers, note)
        self.state = self._after(state, position)
        return self.state

    def offer(self, signs: Tensor, lost: float) -> None:
        """Take signs found otherwise for the best, where they are.

        Args:
            signs: ±1, modules × r.
            lost: what the training examples lose at them, in nats a target.
        """
        if lost < self.state.best_loss:
            self.state = replace(self.state, best=signs, best_loss=lost)

    def found_again(self, signs: Tensor, layers: Tensor, note: Callable[[Step], None]) -> Tensor:
        """What some layers' signs become from nothing, in one cycle beside the others' signs.

        Args:
            signs: of all layers (±1, modules × r).
            layers: which are to be found again (bool, modules).
            note: told of every step.

        Returns:
            Signs of all layers.
        """
        position = self._grown(self._from_nothing(signs, layers), _PENALTY, layers, note)
        return torch.where(position < 0, -1.0, 1.0)

    def crossed(self, signs: Tensor, lost: float, others: Tensor) -> tuple[Tensor, float]:
        """The better of two sets of signs, with every layer of the other that betters it.

        Two searches that ended in different minima differ in whole groups of a layer's signs, and
        of each layer either may have the right ones. No flip of a single sign gets from one to
        the other.

        Args:
            signs: ±1, modules × r.
            lost: what the training examples lose at them, in nats a target.
            others: ±1, modules × r.

        Returns:
            Signs, and what the training examples lose at them.
        """
        lost_there = self._loss.losses(self._examples, others).mean
        if lost_there < lost:
            signs, lost, others = others, lost_there, signs
        signs = signs.clone()
        differing = (~same_signs(signs, others)).sum(1)
        for layer in differing.argsort(descending=True).tolist():
            if not differing[layer]:
                break
            kept = signs[layer].clone()
            signs[layer] = others[layer]
            now = self._loss.losses(self._examples, signs).mean
            if now < lost:
                lost = now
            else:
                signs[layer] = kept
        return signs, lost

    def _grown(
        self,
        start: Tensor,
        pull: float,
        layers: Tensor | None,
        note: Callable[[Step], None],
    ) -> Tensor:
        """The position after one cycle of steps, in which only some layers may move."""
        device = self._loss.device
        position = start.to(device, copy=True).requires_grad_(True)
        moving = torch.ones(len(start), 1) if layers is None else layers[:, None].float()
        moving = moving.to(device)
        moments = _LayerMoments(position)
        order: list[int] = []
        for step in range(CYCLE):
            if len(order) < self._rows:
                drawn = torch.randperm(len(self._examples), generator=self._generator)
                order += drawn.tolist()
            batch = [self._examples[order.pop(0)] for _ in range(self._rows)]
            d = position.tanh()
            sums, counts = self._loss.loss(batch, couplings(d))
            lost = sums.sum() / counts.sum()
            done = step / CYCLE
            rise = max(0.0, done - _FIRST_PART) / (1 - _FIRST_PART)
            penalty = pull * rise / self._targets * (1 - d.square()).sum()
            (slope,) = torch.autograd.grad(lost + penalty, position)
            fall = 1.0 if done < _RATE_FALLS else (1 - done) / (1 - _RATE_FALLS)
            rate = _RATE * min(1.0, (step + 1) / _WARM_UP) * fall
            with torch.no_grad():
                position -= rate * moving * moments.direction(slope)
            self.steps += 1
            undecided = float((d.detach().abs() < 0.5).float().mean())
            note(Step(self.steps, float(lost.detach()), undecided))
        return position.detach().cpu()

    def _is_free(self, cycle: int) -> bool:
        """Whether all layers move in a cycle."""
        return cycle < _FREE_SHARE * self.cycles

    def _free_start(self, state: SearchState) -> Tensor:
        """Where all layers start from: what they were, shrunk; or every so often from nothing."""
        if state.cycle == 0:
            return state.position
        if state.cycle % _CYCLES_OF_START or not self._starts_anew:
            return state.position.tanh() * _SHRUNK
        return torch.randn(state.position.shape, generator=self._generator) * _SHRUNK

    def _from_nothing(self, signs: Tensor, layers: Tensor) -> Tensor:
        """A position at these signs, but for some layers, which are near zero at random."""
        noise = torch.randn(signs.shape, generator=self._generator) * _SHRUNK
        return torch.where(layers[:, None], noise, signs * math.atanh(_HARD))

    def _after(self, state: SearchState, position: Tensor) -> SearchState:
        signs = torch.where(position < 0, -1.0, 1.0)
        moved = 1 - agreement(signs, torch.where(state.position < 0, -1.0, 1.0))
        best, best_loss = state.best, state.best_loss
        if self._is_free(state.cycle) and (state.cycle + 1) % _CYCLES_OF_START:
            lost = self._loss.losses(self._examples, signs).mean
            if lost < best_loss:
                best, best_loss = signs, lost
        else:
            best, best_loss = self.crossed(best, best_loss, signs)
        if not self._is_free(state.cycle + 1):
            position = best * math.atanh(_HARD)
        random = self._generator.get_state()
        return SearchState(state.cycle + 1, position, best, best_loss, moved, random)


class _LayerMoments:
    """Adam's direction (arXiv 1412.6980), with one second moment a layer.

    Signs that matter more then move faster, and the others follow them; a second moment for each
    sign would let noise move those that matter little as fast.
    """

    def __init__(self, position: Tensor) -> None:
        self._first = torch.zeros_like(position)
        self._second = torch.zeros_like(position[:, :1])
        self._steps = 0

    def direction(self, slope: Tensor) -> Tensor:
        self._steps += 1
        decay, decay_second = _BETAS
        self._first.lerp_(slope, 1 - decay)
        self._second.lerp_(slope.square().mean(1, keepdim=True), 1 - decay_second)
        first = self._first / (1 - decay**self._steps)
        second = self._second / (1 - decay_second**self._steps)
        direction: Tensor = first / (second.sqrt() + torch.finfo(slope.dtype).tiny)
        return direction


def agreement(signs: Tensor, others: Tensor) -> float:
    """Share of signs that are the same, up to the sign of a whole layer, which says nothing.

    Args:
        signs: modules × r, ±1.
        others: the same.
    """
    return float(same_signs(signs, others).double().mean())


def same_signs(signs: Tensor, others: Tensor) -> Tensor:
    """Which signs agree, each layer up to its sign as a whole (bool); arguments as above."""
    products = signs * others
    return products * torch.where(products.sum(1, keepdim=True) < 0, -1.0, 1.0) > 0


@dataclass(frozen=True)
class FlipSlopes:
    """How the loss changes along flips, for every example.

    A flip of the group C of one layer's signs negates the couplings between C and the rest. So
    what is kept is the slope along the negation of each coupling, and a group's is their sum over
    i in C and j outside.

    Attributes:
        entries: of couplings ij and ji together (examples × modules × r × r, float32, CPU), in
            nats; the diagonal is zero.
        scale: what sums over these examples are multiplied by to stand for all.
    """

    entries: Tensor
    scale: float

    @classmethod
    def at(
        cls, loss: TaskLoss, examples: Sequence[Example], signs: Tensor, rows: int
    ) -> "FlipSlopes":
        """At some signs.

        Args:
            loss: the task's loss.
            examples: what to predict for; of many, an even choice is run.
            signs: ±1, modules × r.
            rows: examples at a time.
        """
        modules, rank = signs.shape
        most = max(_FEWEST_SLOPES, _SLOPES_BYTES // (4 * modules * rank * rank))
        stride = -(-len(examples) // most)
        chosen = examples[::stride]
        here = couplings(signs.to(loss.device, torch.float32))
        rows = 1 if loss.mixes_examples else rows
        entries = []
        for first in range(0, len(chosen), rows):
            part = chosen[first : first + rows]
            coupled = here.repeat(len(part), 1, 1, 1).requires_grad_(True)
            sums, _ = loss.loss(part, coupled if rows > 1 else coupled[0])
            (slope,) = torch.autograd.grad(sums.sum(), coupled)
            along = -2 * here * slope
            both = along + along.transpose(-1, -2)
            entries.append(both.masked_fill(torch.eye(rank, device=both.device).bool(), 0).cpu())
        return cls(torch.cat(entries), len(examples) / len(chosen))

    def costs(self) -> Tensor:
        """What flipping each sign alone would cost, in nats over all targets (modules × r)."""
        return self._predicted(self.entries.sum(-1).double(), 0)

    def groups(self, layer: int) -> list[tuple[float, list[int]]]:
        """Groups of one layer's signs that may be worth flipping together, with their costs.

        Grown from each sign by the one that costs least, up to half of the layer; of each of these
        growths the group of the lowest cost.
        """
        entries = self.entries[:, layer].permute(1, 2, 0).double()  # r × r × examples
        rank = len(entries)
        totals = entries.sum(1)  # r × examples: the slope of each sign alone
        inside = torch.eye(rank, dtype=torch.bool)  # growths × r
        linked = entries.clone()  # growths × r × examples: Σ of the couplings with the group
        slopes = totals.clone()  # growths × examples
        costs = self._predicted(slopes, 1)
        best_costs, best = costs.clone(), inside.clone()
        every = torch.arange(rank)
        for _ in range(rank // 2 - 1):
            grown = slopes[:, None] + totals[None] - 2 * linked
            candidates = self._predicted(grown, 2).masked_fill(inside, math.inf)
            costs, added = candidates.min(dim=1)
            inside = inside.clone()
            inside[every, added] = True
            slopes = grown[every, added]
            linked = linked + entries[added]
            better = costs < best_costs
            best_costs = torch.where(better, costs, best_costs)
            best = torch.where(better[:, None], inside, best)
        found = {tuple(best[i].nonzero()[:, 0].tolist()): float(best_costs[i]) for i in range(rank)}
        return sorted((cost, list(members)) for members, cost in found.items())

    def _predicted(self, slopes: Tensor, examples: int) -> Tensor:
        """The cost of flips of these slopes, the examples being an extent of the tensor."""
        return self.scale * (slopes.sum(examples) + slopes.square().sum(examples) / 2)


@dataclass(frozen=True)
class Polished:
    """Signs after the polish.

    Attributes:
        signs: ±1, modules × r, float32, CPU.
        costs: what flipping each costs the training examples, in nats over all their targets
            (float64): measured where it was tried with these signs, on all or on a part of the
            examples, else predicted.
        flipped: how many signs the polish changed.
        loss: what the training examples lose, in nats a target.
        targets: how many they have.
    """

    signs: Tensor
    costs: Tensor
    flipped: int
    loss: float
    targets: float


def polish(
    loss: TaskLoss,
    examples: Sequence[Example],
    signs: Tensor,
    rows: int,
    note: Callable[[str], None],
    *,
    rounds: int = ROUNDS,
    is_over: Callable[[], bool] = lambda: False,
) -> Polished:
    """Flip signs, alone and in groups of a layer, as long as the training examples lose less.

    What is predicted to cost least is tried first; each flip is measured before it is kept.

    Args:
        loss: the task's loss.
        examples: what was searched on.
        signs: ±1, modules × r.
        rows: examples at a time.
        note: told in a few words of each round.
        rounds: at most; with 0 nothing is flipped, and the costs are predicted.
        is_over: whether time is up; asked between flips.
    """
    signs = signs.clone()
    found = loss.losses(examples, signs)
    sums, targets = found.sums, float(found.counts.sum())
    some, others = examples[::_SCREENED], [e for i, e in enumerate(examples) if i % _SCREENED]
    flipped, is_stale = 0, True  # whether costs are of other signs
    measured: dict[tuple[int, int], float] = {}
    costs = torch.zeros(signs.shape, dtype=torch.float64)
    for number in range(rounds):
        slopes = FlipSlopes.at(loss, examples, signs, rows)
        costs, kept = slopes.costs(), 0
        moves = _moves(slopes)
        for layer, members in moves:
            if is_over():
                break
            signs[layer, members] *= -1
            now = sums.clone()
            now[::_SCREENED] = loss.losses(some, signs).sums
            cost = _SCREENED * float((now - sums).sum())
            if cost < SETTLED and others:
                now[torch.arange(len(now)) % _SCREENED > 0] = loss.losses(others, signs).sums
                cost = float((now - sums).sum())
            if cost < 0:
                sums, kept = now, kept + 1
                flipped += len(members)
                measured.clear()
            else:
                signs[layer, members] *= -1
                if len(members) == 1:
                    measured[layer, members[0]] = cost
        note(
            f"polishing: round {number + 1}, {kept} of {len(moves)} flips kept, loss "
            f"{float(sums.sum()) / targets:.4g}"
        )
        is_stale = kept > 0
        if kept <= _FEW_KEPT or is_over():
            break
    if is_stale:
        costs = FlipSlopes.at(loss, examples, signs, rows).costs()
    for place, cost in measured.items():
        costs[place] = cost
    return Polished(signs, costs, flipped, float(sums.sum()) / targets, targets)


def _moves(slopes: FlipSlopes) -> list[tuple[int, list[int]]]:
    """Flips that may lower the loss, as layer and signs; the likeliest first."""
    moves: list[tuple[float, int, list[int]]] = []
    for layer in range(slopes.entries.shape[1]):
        tried: list[list[int]] = []
        for cost, members in slopes.groups(layer):
            # Groups of one layer that share signs are one idea; its likeliest is always tried,
            # for a large turn is not what a slope and a curvature say of it.
            if tried and cost >= SETTLED:
                break
            if not any(set(members) & set(other) for other in tried):
                tried.append(members)
                moves.append((cost, layer, members))
    moves.sort(key=lambda move: move[0])
    return [(layer, members) for _, layer, members in moves[:_TRIED]]
