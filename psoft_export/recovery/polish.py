"""From signs that a search found to signs that no flip betters by much.

A flip is kept where the data, and what training on them says (`recovery.retraining`), speak for it
as the data do for a settled sign. Where they say less, what the search found is the better guess:
it comes from the whole way that the layers grew along, on which signs matter that hardly do at its
end.

What a flip costs is predicted for all signs, and for groups of a layer's, from one pass: with a(x)
the slope of the loss of example x along a flip, the cost is Σₓ a(x) + ½ Σₓ a(x)², whose second term
is the empirical Fisher information in the place of the curvature. Where the prediction is small the
flip is tried.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.algebra.relaxed_signs import couplings
from psoft_export.recovery.agreement import same_signs
from psoft_export.recovery.examples import Example, sampled
from psoft_export.recovery.retraining import Known
from psoft_export.recovery.task_loss import TaskLoss

SETTLED = math.log(1000)  # nats by which data and trainings speak for a sign
_TRIED = 48  # flips a round of the polish
_SCREENED = 3  # of so many examples one tells whether a change is worth running the others
_FEW_KEPT = 2  # flips of a round, after which the next is not worth it
_SLOPES_BYTES = 2**29  # for the slopes along flips
_FEWEST_SLOPES = 16  # examples


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
            examples: what to predict for; of many, a sample is run.
            signs: ±1, modules × r.
            rows: examples at a time.
        """
        modules, rank = signs.shape
        most = max(_FEWEST_SLOPES, _SLOPES_BYTES // (4 * modules * rank * rank))
        chosen = sampled(examples, most)
        here = couplings(signs.to(loss.device, torch.float32))
        rows = 1 if loss.mixes_examples else rows
        entries = torch.empty(len(chosen), modules, rank, rank)
        for first in range(0, len(chosen), rows):
            part = chosen[first : first + rows]
            coupled = here.repeat(len(part), 1, 1, 1).requires_grad_(True)
            generators = loss.rotations.coupled(coupled)
            sums, _ = loss.loss(part, generators if rows > 1 else generators[0])
            (slope,) = torch.autograd.grad(sums.sum(), coupled)
            along = -2 * here * slope
            both = along + along.transpose(-1, -2)
            both.masked_fill_(torch.eye(rank, device=both.device).bool(), 0)
            entries[first : first + len(part)] = both
        return cls(entries, len(examples) / len(chosen))

    def costs(self) -> Tensor:
        """What flipping each sign alone would cost, in nats over all targets (modules × r).

        Where these are not all examples: so much of it as is beyond two standard errors of the
        sample.
        """
        alone = self.entries.sum(-1).double()
        costs = self._predicted(alone, 0)
        if self.scale > 1:
            spread = (alone + alone.square() / 2).std(0)
            errors = spread * self.scale * math.sqrt(len(alone) * (1 - 1 / self.scale))
            costs = costs.sign() * (costs.abs() - 2 * errors).clamp_min(0)
        return costs

    def groups(self, layer: int, signs: Tensor, known: Known) -> list[tuple[float, list[int]]]:
        """Groups of one layer's signs that may be worth flipping together, with their costs.

        Grown from each sign by the one that costs least, up to half of the layer; of each of these
        growths the group of the lowest cost.

        Args:
            layer: which.
            signs: where the slopes are (±1, modules × r).
            known: what else costs something.
        """
        examples = len(self.entries)
        told = known.of_couplings(signs)[layer]
        entries = torch.cat([self.entries[:, layer], told[None]]).permute(1, 2, 0).double()
        rank = len(entries)

        def predicted(slopes: Tensor) -> Tensor:
            data = self._predicted(slopes[..., :examples], -1)
            return data + slopes[..., examples]

        totals = entries.sum(1)  # r × examples: the slope of each sign alone
        inside = torch.eye(rank, dtype=torch.bool)  # growths × r
        linked = entries.clone()  # growths × r × examples: Σ of the couplings with the group
        slopes = totals.clone()  # growths × examples
        costs = predicted(slopes)
        best_costs, best = costs.clone(), inside.clone()
        every = torch.arange(rank)
        for _ in range(rank // 2 - 1):
            grown = slopes[:, None] + totals[None] - 2 * linked
            candidates = predicted(grown).masked_fill(inside, math.inf)
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
class Trial:
    """What became of other signs for a layer.

    Attributes:
        cost: in nats over all targets of the data.
        is_whole: whether that is measured on all examples; of what costs much a part tells enough.
        is_kept: whether the layer has these signs now.
    """

    cost: float
    is_whole: bool
    is_kept: bool


class Trials:
    """Signs, and changes of them that are measured before they are kept.

    Attributes:
        signs: ±1, modules × r, float32, CPU.
    """

    def __init__(
        self, loss: TaskLoss, examples: Sequence[Example], signs: Tensor, known: Known
    ) -> None:
        """Measure the signs themselves; arguments as of `polish`."""
        self.signs = signs.clone()
        self._loss = loss
        self._known = known
        self._some = examples[::_SCREENED]
        self._others = [e for i, e in enumerate(examples) if i % _SCREENED]
        here = loss.losses(examples, signs)
        self._sums, self.targets = here.sums, float(here.counts.sum())

    @property
    def lost(self) -> float:
        """What the examples lose, in nats a target."""
        return float(self._sums.sum()) / self.targets

    @property
    def lost_with_known(self) -> float:
        """The same over all targets, with what the signs lose by what is known of them."""
        told = sum(self._known.lost(layer, signs) for layer, signs in enumerate(self.signs))
        return float(self._sums.sum()) + told

    def change(self, layer: int, signs: Tensor) -> Trial:
        """Give a layer other signs, if that gains `SETTLED` nats.

        Args:
            layer: which.
            signs: ±1 (r).
        """
        kept = self.signs[layer].clone()
        told = self._known.lost(layer, signs) - self._known.lost(layer, kept)
        self.signs[layer] = signs
        sums = self._sums.clone()
        sums[::_SCREENED] = self._loss.losses(self._some, self.signs).sums
        cost = _SCREENED * float((sums - self._sums).sum())
        is_whole = cost + told < SETTLED or not self._others
        if is_whole and self._others:
            rest = torch.arange(len(sums)) % _SCREENED > 0
            sums[rest] = self._loss.losses(self._others, self.signs).sums
            cost = float((sums - self._sums).sum())
        is_kept = is_whole and cost + told < -SETTLED
        if is_kept:
            self._sums = sums
        else:
            self.signs[layer] = kept
        return Trial(cost, is_whole, is_kept)


def crossed(
    loss: TaskLoss, examples: Sequence[Example], signs: Tensor, others: Tensor, known: Known
) -> Tensor:
    """The better of two sets of signs, with every layer of the other that betters it by `SETTLED`.

    Two searches that ended in different minima differ in whole groups of a layer's signs, and of
    each layer either may have the right ones.

    Args:
        loss: the task's loss.
        examples: what was searched on.
        signs: ±1, modules × r.
        others: ±1, modules × r.
        known: what trainings say of signs.
    """
    better, worse = (Trials(loss, examples, s, known) for s in (signs, others))
    if worse.lost_with_known < better.lost_with_known:
        better, worse = worse, better
    every = torch.ones_like(signs, dtype=torch.bool)
    differing = (~same_signs(better.signs, worse.signs, every)).sum(1)
    for layer in differing.argsort(descending=True, stable=True).tolist():
        if differing[layer]:
            better.change(layer, worse.signs[layer])
    return better.signs


@dataclass(frozen=True)
class Polished:
    """Signs after the polish.

    Attributes:
        signs: ±1, modules × r, float32, CPU.
        costs: what flipping each costs the training examples, in nats over all their targets
            (float64): measured where it was tried with these signs, else predicted. Where a gain
            was predicted and a part of the examples told against it, 0.
        told: what flipping each costs by the trainings (float64).
        flipped: how many flips of signs the polish kept.
        loss: what the training examples lose, in nats a target.
        targets: how many they have.
    """

    signs: Tensor
    costs: Tensor
    told: Tensor
    flipped: int
    loss: float
    targets: float


def polish(
    loss: TaskLoss,
    examples: Sequence[Example],
    signs: Tensor,
    known: Known,
    rows: int,
    note: Callable[[str], None],
    *,
    rounds: int,
    is_over: Callable[[], bool] = lambda: False,
) -> Polished:
    """Flip signs, alone and in groups of a layer, where that gains `SETTLED` nats.

    Data and trainings count together.

    In each round what is predicted to cost least is tried, `_TRIED` flips at most, and each is
    measured before it is kept. A round that keeps `_FEW_KEPT` or fewer is the last.

    Args:
        loss: the task's loss.
        examples: what was searched on.
        signs: ±1, modules × r.
        known: what trainings say of signs.
        rows: examples at a time.
        note: told in a few words of each round.
        rounds: how many at most.
        is_over: whether time is up; asked between flips.
    """
    trials = Trials(loss, examples, signs, known)
    flipped, is_stale = 0, True  # whether costs are of other signs
    measured: dict[tuple[int, int], float] = {}
    costs = torch.zeros(signs.shape, dtype=torch.float64)
    for number in range(rounds):
        slopes = FlipSlopes.at(loss, examples, trials.signs, rows)
        costs, kept = slopes.costs(), 0
        moves = _moves(slopes, trials.signs, known)
        del slopes  # which are large, before the next are made
        for layer, members in moves:
            if is_over():
                break
            turned = trials.signs[layer].clone()
            turned[members] *= -1
            trial = trials.change(layer, turned)
            if trial.is_kept:
                kept += 1
                flipped += len(members)
                measured.clear()
            elif len(members) == 1:
                place = layer, members[0]
                predicted = max(float(costs[place]), 0.0)
                measured[place] = trial.cost if trial.is_whole else predicted
        note(
            f"polishing: round {number + 1}, {kept} of {len(moves)} flips kept, loss "
            f"{trials.lost:.4g}"
        )
        is_stale = kept > 0
        if kept <= _FEW_KEPT or is_over():
            break
    if is_stale:
        costs = FlipSlopes.at(loss, examples, trials.signs, rows).costs()
    for place, cost in measured.items():
        costs[place] = cost
    told = known.of_couplings(trials.signs).sum(-1)
    return Polished(trials.signs, costs, told, flipped, trials.lost, trials.targets)


def unpolished(loss: TaskLoss, examples: Sequence[Example], signs: Tensor) -> Polished:
    """Signs of which none matters, as they are; arguments as of `polish`."""
    lost = loss.losses(examples, signs)
    costs = torch.zeros(signs.shape, dtype=torch.float64)
    return Polished(signs, costs, costs, 0, lost.mean, float(lost.counts.sum()))


def _moves(slopes: FlipSlopes, signs: Tensor, known: Known) -> list[tuple[int, list[int]]]:
    """Flips that may lower the loss, as layer and signs; the likeliest first."""
    moves: list[tuple[float, int, list[int]]] = []
    for layer in range(slopes.entries.shape[1]):
        tried: list[list[int]] = []
        for cost, members in slopes.groups(layer, signs, known):
            # Groups of one layer that share signs are one idea; its likeliest is always tried,
            # for a large turn is not what a slope and a curvature say of it.
            if tried and cost >= SETTLED:
                break
            if not any(set(members) & set(other) for other in tried):
                tried.append(members)
                moves.append((cost, layer, members))
    moves.sort(key=lambda move: move[0])
    return [(layer, members) for _, layer, members in moves[:_TRIED]]
