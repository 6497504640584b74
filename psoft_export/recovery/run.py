"""One recovery: readings, searches that must agree, polish, and the losses that a verdict needs."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.errors import OutputError
from psoft_export.recovery.examples import Example
from psoft_export.recovery.polish import ROUNDS, Polished, crossed, polish
from psoft_export.recovery.search import Cycle, SearchState, SignSearch, Step, same_signs
from psoft_export.recovery.state import StateFile
from psoft_export.recovery.task_loss import Losses, TaskLoss

STEPS = 1080
SHORT_STEPS = 270  # of a reading and of what is found beside it
LONG_STEPS = 360  # of a cycle of each of the two long searches
_MOST_STEPS = 24_000  # within a time limit
RANDOM = "random"  # the name of a start that no SVD gave
ROWS = 16  # examples at a time where nothing is learnt
_READING, _SHORT, _FIRST, _SECOND = "reading", "short", "first", "second"
_STEPS_BETWEEN_NOTES = 20
_RETURNED = 0.97  # of the signs that matter must be found alike by two searches
_HOLDS = 0.75  # the same, of a reading that loses less than what is found beside it
_STILL = 0.01  # share of the signs of both long searches that move, below which they have ended
_SURE = 3.0  # standard errors by which the held-out loss must be below the base's
_LEAST_GAIN = 1e-3  # of the base's loss: less is nothing that signs could be told by
_SEARCH_SHARE = 0.5  # of a time limit, for the searches; the rest for crossing and polish


@dataclass(frozen=True)
class Outcome:
    """What a recovery came to.

    Attributes:
        polished: the signs.
        base: held-out losses of the base.
        start: the same, at the start.
        held_out: the same, of the result.
        readings: loss at each reading.
        start_name: the reading started from; `RANDOM` where signs were drawn.
        returned: share of the signs that matter that two searches found alike.
        needed: share that is enough.
        steps: gradient steps done.
    """

    polished: Polished
    base: Losses
    start: Losses
    held_out: Losses
    readings: Mapping[str, float]
    start_name: str
    returned: float
    needed: float
    steps: int

    @property
    def is_below_base(self) -> bool:
        """Whether the held-out loss is below the base's, beyond what chance would do."""
        return _is_below(self.held_out, self.base)


class RecoveryRun:
    """A recovery on data in two parts."""

    def __init__(
        self,
        loss: TaskLoss,
        train: Sequence[Example],
        held_out: Sequence[Example],
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
            rows: examples in a step.
            seed: of everything random.
            tell: told in a few words of what is done.
        """
        self._loss = loss
        self._train = train
        self._held_out = held_out
        self._rows = rows
        self._seed = seed
        self._tell = tell
        self._ends = math.inf
        self._step_seconds = 0.0

    def carry_out(
        self,
        readings: Mapping[str, Tensor],
        matters: Tensor,
        *,
        steps: int | None,
        time_limit: float | None,
        file: StateFile | None,
    ) -> Outcome:
        """Score the readings, search, and polish.

        Args:
            readings: name of each SVD → its signs (±1, modules × r).
            matters: which signs do (bool, modules × r); if none, nothing is searched.
            steps: gradient steps at most.
            time_limit: seconds in place of them.
            file: where the searches are kept.
        """
        self._ends = time.monotonic() + time_limit if time_limit is not None else math.inf
        losses, name, signs = self._start(readings)
        base, start = (self._loss.losses(self._held_out, s) for s in (None, signs))
        self._tell(f"held-out loss: base {base.mean:.4g}, at the start {start.mean:.4g}")
        kept = file.read() if file is not None else None
        if kept is not None:
            self._tell(f"going on after {kept.done} cycles of an interrupted search")
        search = SignSearch(
            self._loss,
            self._train,
            _planned(steps or (STEPS if time_limit is None else _MOST_STEPS), bool(readings)),
            starts={_READING: signs},
            rows=self._rows,
            seed=self._seed,
            state=kept,
        )

        def outcome(polished: Polished, returned: float, needed: float = _RETURNED) -> Outcome:
            held_out = self._loss.losses(self._held_out, polished.signs)
            return Outcome(
                polished, base, start, held_out, losses, name, returned, needed, search.steps
            )

        if not matters.any():
            return outcome(self._polished(signs, rounds=0), returned=1.0)
        short = sum(cycle.search in (_SHORT, _READING) for cycle in search.plan)
        found = None
        if readings and search.state.done <= short:
            self._run(search, 1, file)
            if _is_below(start, base):
                held = self._held(signs, search.state.found[_SHORT], matters)
                if held is not None:
                    return outcome(*held, needed=_HOLDS)
            self._run(search, short, file)
            found = outcome(*self._compared(search.state, _READING, _SHORT, matters))
            if found.is_below_base and found.returned >= found.needed:
                return found
        self._run(search, len(search.plan), file, time_limit)
        if _SECOND in search.state.found:
            found = outcome(*self._compared(search.state, _FIRST, _SECOND, matters))
        assert found is not None
        return found

    def _start(self, readings: Mapping[str, Tensor]) -> tuple[dict[str, float], str, Tensor]:
        """The loss at each reading, and name and signs of the start."""
        losses = {}
        scored = self._train[:: max(1, len(self._train) // (2 * ROWS))]  # labels may lie in order
        for name, signs in readings.items():
            losses[name] = self._loss.losses(scored, signs).mean
            self._tell(f"loss at the signs of the SVD '{name}': {losses[name]:.4g}")
        if not losses:
            generator = torch.Generator().manual_seed(self._seed)
            drawn = torch.randint(2, self._loss.rotations.shape, generator=generator)
            return losses, RANDOM, drawn * 2.0 - 1
        best = min(losses, key=lambda name: losses[name])
        return losses, best, readings[best]

    def _run(
        self,
        search: SignSearch,
        until: int,
        file: StateFile | None,
        time_limit: float | None = None,
    ) -> None:
        """Run cycles up to a place in the plan, while signs move and time for two more is left."""
        ends = self._ends - (1 - _SEARCH_SHARE) * (time_limit or 0)
        while search.state.done < until:
            cycle = search.plan[search.state.done]
            if cycle.search == _FIRST and search.state.found:  # a pair of cycles that can be left
                moved = [search.state.moved.get(name, 1.0) for name in (_FIRST, _SECOND)]
                pair_seconds = 2 * cycle.steps * self._step_seconds
                if max(moved) < _STILL or time.monotonic() + pair_seconds > ends:
                    break
            began = time.monotonic()
            state = search.run_cycle(self._note)
            self._step_seconds = (time.monotonic() - began) / cycle.steps
            self._tell(
                f"recovering: {state.moved[cycle.search]:.1%} of the signs moved in cycle "
                f"{state.done} of {len(search.plan)}"
            )
            if file is not None:
                try:
                    file.write(state)
                except OutputError as problem:  # as of the cache of bases: never stops a run
                    self._tell(f"warning: the search cannot be kept: {problem}")
                    file = None

    def _held(self, signs: Tensor, found: Tensor, matters: Tensor) -> tuple[Polished, float] | None:
        """A reading as it is, and how much of it was found, if it may be training's own.

        It then loses less than signs that the data led to, though no data led to it; and those are
        the same but for what the data do not say.
        """
        if self._loss.losses(self._train, found).mean < self._loss.losses(self._train, signs).mean:
            return None
        returned = float(same_signs(signs, found)[matters].double().mean())
        self._tell(f"{returned:.1%} of the start was found from nothing")
        return (self._polished(signs, rounds=0), returned) if returned >= _HOLDS else None

    def _compared(
        self, state: SearchState, one: str, other: str, matters: Tensor
    ) -> tuple[Polished, float]:
        """The best of all signs found, polished, and the share of it that two searches found."""
        signs = state.found[one]
        for name in sorted(state.found, key=lambda name: name != other):
            if name != one:
                self._tell(f"crossing the signs of two searches ('{one}' and '{name}')")
                signs, _ = crossed(self._loss, self._train, signs, state.found[name])
        polished = self._polished(signs, ROUNDS)
        alike = [same_signs(polished.signs, state.found[name]) for name in (one, other)]
        returned = float((alike[0] & alike[1])[matters].double().mean())
        self._tell(f"found by both searches: {returned:.1%}")
        return polished, returned

    def _polished(self, signs: Tensor, rounds: int) -> Polished:
        return polish(
            self._loss,
            self._train,
            signs,
            self._rows,
            self._tell,
            rounds=rounds,
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
    """Cycles that take so many steps at most.

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
    return plan + pair * (steps // LONG_STEPS)


def _is_below(losses: Losses, base: Losses) -> bool:
    """Whether a loss is below the base's, beyond what chance would do."""
    gains = (base.sums - losses.sums) / base.counts.mean()
    error = float(gains.std(correction=1)) / math.sqrt(len(gains))
    return float(gains.mean()) > max(_sure(len(gains)) * error, _LEAST_GAIN * base.mean)


def _sure(count: int) -> float:
    """Student's t where a normal variable has `_SURE`: the first terms of its expansion.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    z, freedom = _SURE, count - 1
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
