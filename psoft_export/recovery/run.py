"""One recovery: readings, searches that must agree, polish, and the losses that a verdict needs."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.errors import OutputError
from psoft_export.recovery.agreement import agreement, agreement_by_chance, same_signs
from psoft_export.recovery.examples import Example
from psoft_export.recovery.polish import Polished, crossed, polish, unpolished
from psoft_export.recovery.search import Cycle, SearchState, SignSearch, Step
from psoft_export.recovery.significance import is_below
from psoft_export.recovery.state import StateFile
from psoft_export.recovery.task_loss import Losses, TaskLoss

STEPS = 1080
SHORT_STEPS = 270  # of a reading and of what is found beside it
LONG_STEPS = 360  # of a cycle of each of the two long searches
ROWS = 16  # examples at a time where nothing is learnt
_MOST_STEPS = 24_000  # within a time limit
_READING, _SHORT, _FIRST, _SECOND = "reading", "short", "first", "second"
_STEPS_BETWEEN_NOTES = 20
_RETURNED = 0.97  # of the signs that matter must be found alike by two searches
_HOLDS = 0.5  # of a reading, beyond what chance would give, must be found from nothing
_STILL = 0.01  # share of the signs of both long searches that move, below which they have ended
_SEARCH_SHARE = 0.5  # of a time limit, for the searches; the rest for crossing and polish


@dataclass(frozen=True)
class Outcome:
    """What a recovery came to.

    Attributes:
        polished: the signs.
        base: held-out losses of the base.
        start: the same, at the best of the readings; None without any.
        held_out: the same, of the result.
        readings: loss at each reading.
        start_name: the best of the readings; empty without any.
        returned: share of the signs that matter that two searches found alike.
        needed: share that is enough.
        holds: whether these are the signs of the best of the readings as they are.
        steps: gradient steps done.
    """

    polished: Polished
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
            train: what is searched on.
            held_out: what is only measured.
            matters: which signs do (bool, modules × r); if none, nothing is searched.
            rows: examples in a step.
            seed: of everything random.
            tell: told in a few words of what is done.
        """
        self._loss = loss
        self._train = train
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
            _planned(steps or (STEPS if time_limit is None else _MOST_STEPS), bool(readings)),
            starts={_READING: readings[name]} if name else {},
            matters=self._matters,
            rows=self._rows,
            seed=self._seed,
            state=kept,
        )

        def outcome(found: _Found) -> Outcome:
            held_out = self._loss.losses(self._held_out, found.polished.signs)
            return Outcome(
                found.polished,
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
            return outcome(_Found(unpolished(self._loss, self._train, signs), 1.0))
        best = None
        if start is not None and _FIRST not in search.state.found:
            holds = self._held(search, readings[name]) if is_below(start, base) else None
            best = outcome(holds or self._from_reading(search))
            if best.is_below_base and best.returned >= best.needed:
                return best
        found = self._from_nothing(search)
        if found is not None:
            best = outcome(found)
        assert best is not None  # without a reading the searches from nothing always run
        return best

    def _scores(self, readings: Mapping[str, Tensor]) -> dict[str, float]:
        """The loss at each reading, of a part of the data."""
        losses = {}
        scored = self._train[:: max(1, len(self._train) // (2 * ROWS))]  # labels may lie in order
        for name, signs in readings.items():
            losses[name] = self._loss.losses(scored, signs).mean
            self._tell(f"loss at the signs of the SVD '{name}': {losses[name]:.4g}")
        return losses

    def _held(self, search: SignSearch, signs: Tensor) -> _Found | None:
        """A reading as it is, if it may be training's own; searches beside it for a little.

        It then loses less than signs that the data led to, though no data led to it; those are the
        same but for what the data do not say; and there is no sign that the data speak against.
        """
        self._run(search, (_SHORT,))
        found = search.state.found[_SHORT]
        if self._loss.losses(self._train, found).mean < self._loss.losses(self._train, signs).mean:
            return None
        by_chance = agreement_by_chance(self._matters)
        needed = by_chance + _HOLDS * (1 - by_chance)
        returned = agreement(signs, found, self._matters)
        self._tell(f"{returned:.1%} of the start was found from nothing; {needed:.0%} is needed")
        if returned < needed:
            return None
        polished = self._polished(signs)
        return _Found(polished, returned, needed, holds=True) if not polished.flipped else None

    def _from_reading(self, search: SignSearch) -> _Found:
        """What short searches from a reading and from nothing come to."""
        self._run(search, (_SHORT, _READING))
        return self._compared(search.state, _READING, _SHORT)

    def _from_nothing(self, search: SignSearch) -> _Found | None:
        """What two long searches come to; None where a reading's left no steps or time for them."""
        self._run(search, (_FIRST, _SECOND))
        if _SECOND not in search.state.found:
            return None
        return self._compared(search.state, _FIRST, _SECOND)

    def _run(self, search: SignSearch, names: Sequence[str]) -> None:
        """Run cycles in the order of the plan, up to the first of another search."""
        while search.state.done < len(search.plan):
            cycle = search.plan[search.state.done]
            if cycle.search not in names or self._is_enough(search, cycle):
                return
            began, before = time.monotonic(), search.steps
            state = search.run_cycle(self._note)
            if search.steps > before:
                self._step_seconds = (time.monotonic() - began) / (search.steps - before)
            self._tell(
                f"recovering: {state.moved[cycle.search]:.1%} of the signs moved in cycle "
                f"{state.done}"
            )
            self._keep(state)

    def _is_enough(self, search: SignSearch, cycle: Cycle) -> bool:
        """Whether a cycle can be left, as signs stand still or there is no time for it."""
        found, moved = search.state.found, search.state.moved
        if cycle.search == _SECOND or not found:
            return False  # the other one of a pair; or nothing is there yet
        if cycle.search == _READING and cycle.search not in found:
            return False
        still = [moved.get(name, 1.0) < _STILL for name in (_FIRST, _SECOND)]
        steps = cycle.steps * (2 if cycle.search == _FIRST else 1)
        is_late = time.monotonic() + steps * self._step_seconds > self._search_ends
        return is_late or (cycle.search == _FIRST and all(still))

    def _keep(self, state: SearchState) -> None:
        if self._file is None:
            return
        try:
            self._file.write(state)
        except OutputError as problem:  # as of the cache of bases: never stops a run
            self._tell(f"warning: the search cannot be kept: {problem}")
            self._file = None

    def _compared(self, state: SearchState, one: str, other: str) -> _Found:
        """The best of all signs found, polished, and the share of it that two searches found."""
        signs = state.found[one]
        for name in sorted(state.found, key=lambda name: name != other):
            if name != one:
                self._tell(f"crossing the signs of two searches ('{one}' and '{name}')")
                signs, _ = crossed(self._loss, self._train, signs, state.found[name])
        polished = self._polished(signs)
        alike = torch.ones_like(self._matters)
        for name in (one, other):
            alike &= same_signs(polished.signs, state.found[name], self._matters)
        returned = float(alike[self._matters].double().mean())
        self._tell(f"found by both searches: {returned:.1%}")
        return _Found(polished, returned)

    def _polished(self, signs: Tensor) -> Polished:
        return polish(
            self._loss,
            self._train,
            signs,
            self._rows,
            self._tell,
            is_over=lambda: time.monotonic() > self._ends,
        )

    def _note(self, step: Step) -> None:
        if step.step % _STEPS_BETWEEN_NOTES:
            return
        self._tell(
            f"recovering: step {step.step}, loss {step.loss:.4g}, {step.undecided:.0%} of the "
            "signs undecided"
        )


def _planned(steps: int, has_readings: bool) -> list[Cycle]:
    """Cycles that take so many steps at most, or the fewest that there are.

    Beside a reading a short search from nothing runs first; then two long ones from nothing, in
    turns.
    """
    plan = []
    if has_readings:
        third = SHORT_STEPS // 3
        plan.append(Cycle(_SHORT, third, hardens=False))
        plan += [Cycle(_READING, third, hardens=True)] * 2
        steps -= SHORT_STEPS
    pair = [Cycle(name, LONG_STEPS // 2, hardens=True) for name in (_FIRST, _SECOND)]
    return plan + pair * max(steps // LONG_STEPS, 0 if has_readings else 1)
