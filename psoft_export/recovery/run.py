"""One recovery: readings, searches that must agree, polish, and the losses that a verdict needs."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.errors import OutputError
from psoft_export.recovery.agreement import agreement, agreement_by_chance, same_signs
from psoft_export.recovery.examples import Example, sampled
from psoft_export.recovery.polish import Polished, crossed, polish, unpolished
from psoft_export.recovery.retraining import Known
from psoft_export.recovery.search import Cycle, SearchState, SignSearch, Step
from psoft_export.recovery.significance import is_below
from psoft_export.recovery.state import StateFile
from psoft_export.recovery.task_loss import Losses, TaskLoss

STEPS = 1720
ROWS = 16  # examples at a time where nothing is learnt
_FIRST, _SECOND = "first", "second"  # searches
_EARLY = [Cycle(name, trainings=2, growth=30) for name in (_FIRST, _SECOND)]
_LATER = [Cycle(name, trainings=1, growth=30) for name in (_FIRST, _SECOND)]
_CLOSING = Cycle("", trainings=1, growth=30)  # of the signs of both
LEAST_STEPS = sum(cycle.steps for cycle in _EARLY) + _CLOSING.steps
STEPS_OF_LATER = sum(cycle.steps for cycle in _LATER)
_MOST_STEPS = 24_000  # within a time limit
_STEPS_BETWEEN_NOTES = 20
_RETURNED = 0.97  # of the signs that matter must be found alike by two searches
_HOLDS = 0.5  # of what signs agree in beyond chance, if one has never seen the data
_SAME = 0.99  # of the signs that matter two searches agree in, and then need no more cycles
_SCORED = 4 * ROWS  # examples by which the best of the readings is chosen
_WEIGHED = 256  # examples by which layers are crossed and signs flipped
_ROUNDS = 6  # of the polish at most
_SEARCH_SHARE = 0.5  # of a time limit, for the searches; the rest for crossing and polish


@dataclass(frozen=True)
class Outcome:
    """What a recovery came to.

    Attributes:
        polished: the signs.
        alike: which of them two searches found (bool, modules × r); all, if `holds`.
        base: held-out losses of the base.
        start: the same, at the best of the readings; None without any.
        held_out: the same, of the result.
        readings: loss at each reading.
        start_name: the best of the readings; empty without any.
        returned: share of the signs that matter that two searches found alike; if `holds`, that
            one search found of the start; 0 where nothing was searched.
        needed: share that is enough.
        holds: whether these are the signs of the best of the readings as they are.
        steps: gradient steps done.
    """

    polished: Polished
    alike: Tensor
    base: Losses
    start: Losses | None
    held_out: Losses
    readings: Mapping[str, float]
    start_name: str
    returned: float
    needed: float
    holds: bool
    steps: int

    @property
    def is_below_base(self) -> bool:
        """Whether the held-out loss is below the base's, beyond what chance would do."""
        return is_below(self.held_out, self.base)


@dataclass(frozen=True)
class _Found:
    """Signs, and how far two searches agree in them (as in `Outcome`)."""

    polished: Polished
    alike: Tensor
    returned: float
    needed: float = _RETURNED
    holds: bool = False


class RecoveryRun:
    """A recovery on data in two parts."""

    def __init__(
        self,
        loss: TaskLoss,
        train: Sequence[Example],
        held_out: Sequence[Example],
        matters: Tensor,
        *,
        rows: int,
        seed: int,
        tell: Callable[[str], None],
    ) -> None:
        """Prepare.

        Args:
            loss: the task's loss.
            train: what is searched on. Of many, crossing and polish take a sample, and what is
                said of the evidence for signs is that of the sample.
            held_out: what is only measured.
            matters: which signs do (bool, modules × r); if none, nothing is searched.
            rows: examples in a step.
            seed: of everything random.
            tell: told in a few words of what is done.
        """
        self._loss = loss
        self._train = train
        self._weighed = sampled(train, _WEIGHED)
        self._held_out = held_out
        self._matters = matters
        self._rows = rows
        self._seed = seed
        self._tell = tell
        self._ends = self._search_ends = math.inf
        self._step_seconds = 0.0
        self._file: StateFile | None = None

    def carry_out(
        self,
        readings: Mapping[str, Tensor],
        *,
        steps: int | None,
        time_limit: float | None,
        file: StateFile | None,
    ) -> Outcome:
        """Score the readings, search, and polish.

        Args:
            readings: name of each SVD → its signs (±1, modules × r).
            steps: gradient steps at most.
            time_limit: seconds in place of them.
            file: where the searches are kept.
        """
        if time_limit is not None:
            self._ends = time.monotonic() + time_limit
            self._search_ends = time.monotonic() + _SEARCH_SHARE * time_limit
        self._file = file
        scores = self._scores(readings)
        name = min(scores, key=lambda reading: scores[reading], default="")
        base = self._loss.losses(self._held_out, None)
        start = self._loss.losses(self._held_out, readings[name]) if name else None
        self._tell(
            f"held-out loss: base {base.mean:.4g}"
            + (f", with the signs of '{name}' {start.mean:.4g}" if start is not None else "")
        )
        kept = file.read() if file is not None else None
        if kept is not None:
            self._tell(f"going on after {kept.done} cycles of a search that was begun before")
        search = SignSearch(
            self._loss,
            self._train,
            _planned(steps or (STEPS if time_limit is None else _MOST_STEPS)),
            rows=self._rows,
            seed=self._seed,
            state=kept,
        )

        def outcome(found: _Found) -> Outcome:
            held_out = self._loss.losses(self._held_out, found.polished.signs)
            return Outcome(
                found.polished,
                found.alike,
                base,
                start,
                held_out,
                scores,
                name,
                found.returned,
                found.needed,
                found.holds,
                search.steps,
            )

        if not self._matters.any():
            signs = readings[name] if name else torch.ones(self._loss.rotations.shape)
            polished = unpolished(self._loss, self._weighed, signs)
            return outcome(_Found(polished, torch.ones_like(self._matters), 0.0))
        # Crossing takes a layer only if it gains by itself, so that chance may have put it there.
        others = [readings[name]] if start is not None and start.mean < base.mean else []
        # Of a search that went further before, the start did not hold.
        if start is not None and is_below(start, base) and search.state.done <= 1:
            self._run(search, until=1)
            holds = self._held(search, readings[name])
            if holds is not None:
                return outcome(holds)
        self._run(search, until=len(search.plan), others=others)
        return outcome(self._closed(search, others))

    def _scores(self, readings: Mapping[str, Tensor]) -> dict[str, float]:
        """The loss at each reading, of a part of the data."""
        losses = {}
        scored = sampled(self._train, _SCORED)
        for name, signs in readings.items():
            losses[name] = self._loss.losses(scored, signs).mean
            self._tell(f"loss at the signs of the SVD '{name}': {losses[name]:.4g}")
        return losses

    def _held(self, search: SignSearch, signs: Tensor) -> _Found | None:
        """A reading as it is, if it may be training's own; a search was beside it for a little.

        It then loses less than signs that the data led to, though no data led to it; those are the
        same but for what the data do not say; and there is no sign that the data speak against.
        """
        found = search.state.found[_FIRST]
        of_found, of_start = (self._loss.losses(self._weighed, s) for s in (found, signs))
        if of_found.mean < of_start.mean:
            return None
        by_chance = agreement_by_chance(self._matters)
        needed = by_chance + _HOLDS * (1 - by_chance)
        returned = agreement(signs, found, self._matters)
        self._tell(f"{returned:.1%} of the start was found from nothing; {needed:.0%} is needed")
        if returned < needed:
            return None
        # Trainings have led to no sign of an SVD either, and err where the data hardly tell.
        polished = self._polished(signs, search.known().silent(), rounds=1)
        if polished.flipped:
            return None
        return _Found(polished, torch.ones_like(self._matters), returned, needed, holds=True)

    def _run(self, search: SignSearch, until: int, others: Sequence[Tensor] = ()) -> None:
        """Run cycles, up to a number of them done, or until that is enough.

        Args:
            search: to go on with.
            until: so many are done.
            others: signs that may be better in some layers than those that a search found.
        """
        while search.state.done < until and not self._is_enough(search):
            name, before = search.plan[search.state.done].search, search.state
            began = time.monotonic()
            state = search.run_cycle(self._note, self._teacher(search, name, others))
            self._step_seconds = (time.monotonic() - began) / (state.steps - before.steps)
            told = f"recovering: cycle {state.done} of at most {len(search.plan)} is done"
            if name in before.found:
                moved = 1 - agreement(state.found[name], before.found[name], self._matters)
                told += f", {moved:.1%} of the signs moved"
            self._tell(told)
            self._keep(state)

    def _teacher(self, search: SignSearch, name: str, others: Sequence[Tensor]) -> Tensor | None:
        """What a search, by its name, has found, with each layer that others surely better.

        None before its first cycle.
        """
        found = search.state.found.get(name)
        if found is None or not others:
            return found
        self._tell("crossing what a search found with the start")
        return self._crossed([found, *others], search.known(name))

    def _is_enough(self, search: SignSearch) -> bool:
        """Whether no more cycles are needed, or there is no time for one."""
        state = search.state
        if state.done < 2:
            return False
        agreeing = agreement(state.found[_FIRST], state.found[_SECOND], self._matters)
        ends = time.monotonic() + _LATER[0].steps * self._step_seconds
        return agreeing >= _SAME or ends > self._search_ends

    def _keep(self, state: SearchState) -> None:
        if self._file is None:
            return
        try:
            self._file.write(state)
        except OutputError as problem:  # as of the cache of bases: never stops a run
            self._tell(f"warning: the search cannot be kept: {problem}")
            self._file = None

    def _closed(self, search: SignSearch, others: Sequence[Tensor]) -> _Found:
        """The best of all signs found, polished, and the share of it that two searches found.

        Args:
            search: after its cycles.
            others: signs that may be better in some layers.
        """
        first, second = (search.state.found[name] for name in (_FIRST, _SECOND))
        self._tell("crossing the signs of two searches")
        known = search.known()
        signs = self._crossed([first, second, known.signs, *others], known)
        known = search.known_again(signs, _CLOSING.trainings, self._note)
        self._tell(
            "trained again, generators agree with the adapter's "
            f"{known.related.errors:.0f} standard errors better than by chance"
        )
        grown = search.grown(known, _CLOSING.growth, self._note)
        signs = self._crossed([signs, known.signs, grown], known)
        # Where two searches agree in too little nothing is recovered, however much is polished.
        agreeing = agreement(first, second, self._matters)
        rounds = _ROUNDS if agreeing >= _RETURNED else 1
        polished = self._polished(signs, known.settling(), rounds=rounds)
        alike = torch.ones_like(self._matters)
        for found in (first, second):
            alike &= same_signs(polished.signs, found, self._matters)
        returned = float(alike[self._matters].double().mean())
        self._tell(f"found by both searches: {returned:.1%}")
        return _Found(polished, alike, returned)

    def _crossed(self, found: Sequence[Tensor], known: Known) -> Tensor:
        """The best of several sets of signs, layer by layer."""
        signs, *others = found
        chosen_by = known.choosing()
        for other in others:
            signs = crossed(self._loss, self._weighed, signs, other, chosen_by)
        return signs

    def _polished(self, signs: Tensor, known: Known, rounds: int) -> Polished:
        return polish(
            self._loss,
            self._weighed,
            signs,
            known,
            self._rows,
            self._tell,
            rounds=rounds,
            is_over=lambda: time.monotonic() > self._ends,
        )

    def _note(self, step: Step) -> None:
        if step.step % _STEPS_BETWEEN_NOTES:
            return
        how = "training again"
        if step.undecided is not None:
            how = f"{step.undecided:.0%} of the signs undecided"
        self._tell(f"recovering: step {step.step}, loss {step.loss:.4g}, {how}")


def _planned(steps: int) -> list[Cycle]:
    """Cycles of two searches in turns, that take so many steps at most, or the fewest there are."""
    return _EARLY + _LATER * max(0, (steps - LEAST_STEPS) // STEPS_OF_LATER)
