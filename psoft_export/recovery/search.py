"""The search for signs: relaxed, hardened, and checked flip by flip.

Signs are ±1, and their number is in the hundreds or thousands, so they are first relaxed to
d = tanh(s) and moved by gradients of the task's loss (`algebra.relaxed_signs`). Loss surfaces of
this kind (products dᵢ dⱼ with couplings of either sign) have many local minima that differ in whole
groups of signs. So the search goes in cycles: at the start of each the d of some layers, at first
of all, are shrunk towards zero and grow again in what the others have become by then. In the second
part of a cycle a penalty pulls every |d| to 1, more so from cycle to cycle: without it the sizes of
d fit the text better than any signs do. (A penalty that grows is how AdaRound, arXiv 2004.10568,
rounds weights.)

What a flip costs is predicted for all signs at once: with aᵢ(x) the slope of the loss of example x
along the flip of sign i, the cost is Σₓ aᵢ(x) + ½ Σₓ aᵢ(x)², whose second term is the empirical
Fisher information in the place of the curvature. Where the prediction is small the flip is tried.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.recovery.examples import Example
from psoft_export.recovery.task_loss import TaskLoss

CYCLE = 60  # steps from one shrinking to the next
SETTLED = math.log(1000)  # nats by which the data speak for a sign
_RATE = 0.1  # of s a step; tanh(1) = 0.76
_SHRUNK = 0.1  # the size of d at the start of a cycle
_HARD = 0.99  # the size of d where signs are taken up again
_PENALTY = 20.0  # nats for each d at zero, in the last cycle
_FIRST_PART = 0.25  # of a cycle, without penalty
_RATE_FALLS = 0.6  # of a cycle, before the rate goes down to zero
_WARM_UP = 10  # steps
_FREE_SHARE = 0.35  # of the cycles, in which all layers move, without penalty
_FEW_LAYERS = 0.3  # share that starts from nothing in the later cycles
_BETAS = (0.9, 0.99)
_TRIED = 32  # flips a round of the polish
_ROUNDS = 6


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
        moved: share of signs that the last whole cycle changed; None in the first.
    """

    step: int
    loss: float
    undecided: float
    moved: float | None


class SignSearch:
    """The search for the signs of one adapter's modules.

    Attributes:
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
        state: SearchState | None = None,
    ) -> None:
        """Prepare; runs nothing but the loss at the start.

        Args:
            loss: the task's loss.
            examples: what is searched on.
            start: signs to start from (±1, modules × r).
            cycles: of `CYCLE` steps each.
            rows: examples in a step.
            seed: of everything random.
            state: where to go on, of a search with the same arguments.
        """
        self._loss = loss
        self._examples = examples
        self._cycles = cycles
        self._rows = min(rows, len(examples))
        self._generator = torch.Generator().manual_seed(seed)
        if state is None:
            signs, random = start.float(), self._generator.get_state()
            lost = loss.losses(examples, signs).mean
            state = SearchState(0, signs * math.atanh(_SHRUNK), signs, lost, 1.0, random)
        self._generator.set_state(state.generator)
        self._counted = float(loss.losses(examples, None).counts.sum())
        self.state = state
        self.steps = state.cycle * CYCLE

    @property
    def is_done(self) -> bool:
        """Whether every cycle is done."""
        return self.state.cycle >= self._cycles

    def replan(self, cycles: int) -> None:
        """Go on to so many cycles in all."""
        self._cycles = cycles

    def run_cycle(self, note: Callable[[Step], None]) -> SearchState:
        """One cycle; returns the state after it, which is also kept.

        Args:
            note: told of every step.
        """
        state = self.state
        if self._is_free(state.cycle):
            shrunk = state.position.tanh() * _SHRUNK if state.cycle else state.position
            position = self._grown(shrunk, 0.0, None, note)
        else:
            # As many layers as can find their signs among those that stay.
            layers = torch.rand(len(state.best), generator=self._generator) < _FEW_LAYERS
            position = self._grown(self._from_nothing(state.best, layers), _PENALTY, layers, note)
        self.state = self._after(state, position)
        return self.state

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
        device, state = self._loss.device, self.state
        position = start.to(device).requires_grad_(True)
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
            sums, counts = self._loss.loss(batch, d)
            lost = sums.sum() / counts.sum()
            done = step / CYCLE
            rise = max(0.0, done - _FIRST_PART) / (1 - _FIRST_PART)
            penalty = pull * rise / self._counted * (1 - d.square()).sum()
            (slope,) = torch.autograd.grad(lost + penalty, position)
            fall = 1.0 if done < _RATE_FALLS else (1 - done) / (1 - _RATE_FALLS)
            rate = _RATE * min(1.0, (step + 1) / _WARM_UP) * fall
            with torch.no_grad():
                position -= rate * moving * moments.direction(slope)
            self.steps += 1
            undecided = float((d.detach().abs() < 0.5).float().mean())
            moved = state.moved if state.cycle else None
            note(Step(self.steps, float(lost.detach()), undecided, moved))
        return position.detach().cpu()

    def _is_free(self, cycle: int) -> bool:
        """Whether all layers move in a cycle."""
        return cycle < _FREE_SHARE * self._cycles

    def _from_nothing(self, signs: Tensor, layers: Tensor) -> Tensor:
        """A position at these signs, but for some layers, which are near zero at random."""
        noise = torch.randn(signs.shape, generator=self._generator) * _SHRUNK
        return torch.where(layers[:, None], noise, signs * math.atanh(_HARD))

    def _after(self, state: SearchState, position: Tensor) -> SearchState:
        signs = torch.where(position < 0, -1.0, 1.0)
        moved = 1 - agreement(signs, torch.where(state.position < 0, -1.0, 1.0))
        best, best_loss = state.best, state.best_loss
        if self._is_free(state.cycle):
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


def flip_costs(
    loss: TaskLoss, examples: Sequence[Example], signs: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """What flipping each sign alone would cost on these examples, predicted.

    Args:
        loss: the task's loss.
        examples: what to predict for.
        signs: ±1, modules × r, on any device.
        rows: examples at a time.

    Returns:
        The cost in nats over all targets (modules × r, float64, CPU), and the slopes along each
        flip (examples × modules × r, float32, CPU).
    """
    slopes = []
    for first in range(0, len(examples), rows):
        part = examples[first : first + rows]
        d = signs.to(loss.device, torch.float32).repeat(len(part), 1, 1).requires_grad_(True)
        sums, _ = loss.loss(part, d)
        (slope,) = torch.autograd.grad(sums.sum(), d)
        slopes.append((-2 * d.detach() * slope).cpu())
    along = torch.cat(slopes)
    exact = along.double()
    return exact.sum(0) + exact.square().sum(0) / 2, along


@dataclass(frozen=True)
class Polished:
    """Signs after the polish.

    Attributes:
        signs: ±1, modules × r, float32, CPU.
        costs: what flipping each costs the training examples, in nats over all their targets
            (float64): measured where it was tried with these signs, else predicted.
        flipped: how many signs the polish changed.
        loss: what the training examples lose, in nats a target.
    """

    signs: Tensor
    costs: Tensor
    flipped: int
    loss: float


def polish(
    loss: TaskLoss,
    examples: Sequence[Example],
    signs: Tensor,
    rows: int,
    note: Callable[[str], None],
    *,
    is_over: Callable[[], bool] = lambda: False,
) -> Polished:
    """Flip single signs, and pairs of a layer, as long as the training examples lose less.

    Those whose predicted cost is lowest are tried first.

    Args:
        loss: the task's loss.
        examples: what was searched on.
        signs: ±1, modules × r.
        rows: examples at a time.
        note: told in a few words of each round.
        is_over: whether time is up; asked between flips.
    """
    signs = signs.clone()
    total = loss.losses(examples, signs).sums.sum().item()
    counted = loss.losses(examples, None).counts.sum().item()
    flipped = 0
    measured: dict[tuple[int, int], float] = {}
    costs = torch.zeros(signs.shape, dtype=torch.float64)
    for number in range(_ROUNDS):
        costs, along = flip_costs(loss, examples, signs, rows)
        moves = _moves(costs, along)
        kept = 0
        for layer, members in moves:
            if is_over():
                break
            signs[layer, members] *= -1
            now = loss.losses(examples, signs).sums.sum().item()
            if now < total:
                total, kept = now, kept + 1
                flipped += len(members)
                measured.clear()
            else:
                signs[layer, members] *= -1
                if len(members) == 1:
                    measured[layer, members[0]] = now - total
        note(f"polishing: round {number + 1}, {kept} of {len(moves)} flips kept")
        if kept <= _TRIED // 16 or is_over():
            break
    if not measured or kept:
        costs, _ = flip_costs(loss, examples, signs, rows)
    for place, cost in measured.items():
        costs[place] = cost
    return Polished(signs, costs, flipped, total / counted)


def _moves(costs: Tensor, along: Tensor) -> list[tuple[int, list[int]]]:
    """Single flips, and pairs within a layer, that may lower the loss; the likeliest first.

    A pair's slope is the sum of both, but for the entry of R that joins them, which stays.
    """
    rank = costs.shape[1]
    single = costs.flatten().argsort()[:_TRIED]
    moves = [(float(costs.flatten()[i]), int(i) // rank, [int(i) % rank]) for i in single]
    for layer in range(len(costs)):
        slopes = along[:, layer].double()
        joint = costs[layer][:, None] + costs[layer][None, :] + slopes.T @ slopes
        joint = joint.triu(1).masked_fill(torch.ones_like(joint).tril().bool(), math.inf)
        for i in joint.flatten().argsort()[:2]:
            first, second = int(i) // rank, int(i) % rank
            # Worth trying where it promises more than either flip alone.
            value = float(joint[first, second])
            if value < min(0.0, float(costs[layer, first]), float(costs[layer, second])):
                moves.append((value, layer, [first, second]))
    moves.sort(key=lambda move: move[0])
    return [(layer, members) for value, layer, members in moves if value < SETTLED][: 2 * _TRIED]
