"""What a recovery's outcome says of each module's signs, and of the whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from psoft_export.recovery.polish import SETTLED
from psoft_export.recovery.run import Outcome

Verdict = Literal["recovered", "partly", "not"]

_LEFT_OPEN = 0.02  # share of the gain that signs in doubt may cost in the mean


@dataclass(frozen=True)
class RecoveredModule:
    """What is known of the signs of one module.

    Attributes:
        module: module path, as the adapter names it.
        rank: r.
        settled: number of signs that two searches found alike, or one SVD gave that holds, and for
            which data and trainings speak 1000 : 1 or more.
        immaterial: number of signs whose flip changes ΔW by less than rounding W to its dtype.
        in_doubt: number of the others.
        at_stake: what those in doubt may cost, in nats a target: of each, what it costs if it is
            wrong times the chance that it is, added up.
        out_of_reach: number of vectors that near-equal singular values let no sign pin down; the
            record holds this machine's.
    """

    module: str
    rank: int
    settled: int
    immaterial: int
    in_doubt: int
    at_stake: float
    out_of_reach: int


def is_settled(evidence: Tensor, alike: Tensor) -> Tensor:
    """Which signs are settled (bool), where they matter.

    Args:
        evidence: how many nats data and trainings speak for each with.
        alike: which two searches found (bool), as in `Outcome`.
    """
    return alike & (evidence >= SETTLED)


def judged(
    module: str,
    costs: Tensor,
    told: Tensor,
    targets: float,
    matters: Tensor,
    alike: Tensor,
    out_of_reach: int,
) -> RecoveredModule:
    """A module's signs in classes.

    Args:
        module: its path.
        costs: what flipping each sign costs the data, in nats over all targets (r).
        told: what it costs by the trainings (r).
        targets: how many these are.
        matters: which signs do (bool, r).
        alike: which two searches found (bool, r), as in `Outcome`.
        out_of_reach: how many vectors no sign pins down.
    """
    evidence = costs + told
    settled = matters & is_settled(evidence, alike)
    doubt = matters & ~settled
    # With evidence c data and trainings speak e^c : 1 for a sign; if it is wrong the data lose.
    chances = torch.sigmoid(-evidence[doubt].double())
    at_stake = float((costs[doubt].double().abs() * chances).sum()) / targets
    immaterial = len(costs) - int(matters.sum()) - out_of_reach
    counts = int(settled.sum()), immaterial, int(doubt.sum())
    return RecoveredModule(module, len(costs), *counts, at_stake, out_of_reach)


def settled_share(modules: Sequence[RecoveredModule]) -> float:
    """The settled signs among those that matter; 0 where none does."""
    settled = sum(module.settled for module in modules)
    return settled / max(1, settled + sum(module.in_doubt for module in modules))


def _nothing_matters(modules: Sequence[RecoveredModule]) -> str:
    out_of_reach = sum(module.out_of_reach for module in modules)
    if out_of_reach == sum(module.rank for module in modules):
        return "no sign can be found: nearly equal singular values leave every vector open"
    reason = "no sign matters: the adapter turns nothing by more than rounding"
    if out_of_reach:
        reason += f", but for {out_of_reach} vectors that no sign pins down"
    return reason


def judge(outcome: Outcome, modules: Sequence[RecoveredModule]) -> tuple[Verdict, str]:
    """The verdict, and why."""
    doubt = sum(module.in_doubt for module in modules)
    if not doubt + sum(module.settled for module in modules):
        return "not", _nothing_matters(modules)
    base, found = outcome.base.mean, outcome.held_out.mean
    if not outcome.is_below_base:
        return "not", (
            f"the held-out loss, {found:.4g}, is not surely below the base's, {base:.4g}: another "
            "base than trained, text of another task, or too little data"
        )
    if outcome.returned < outcome.needed:
        return "partly", (
            f"two searches found only {outcome.returned:.1%} of the signs that matter alike "
            f"({outcome.needed:.0%} is needed); give more data or more steps"
        )
    if outcome.holds:  # one SVD gave them all, so what the data cannot tell is as it gave it, too
        return "recovered", (
            f"the signs of the SVD '{outcome.start_name}' hold: held-out loss {found:.4g} against "
            f"the base's {base:.4g}"
        )
    risk = sum(module.at_stake for module in modules) / (base - found)
    if risk > _LEFT_OPEN:
        return "partly", (
            f"{doubt} signs in doubt may cost {risk:.1%} of the gain ({_LEFT_OPEN:.0%} is the "
            "limit); give more data"
        )
    return "recovered", f"held-out loss {found:.4g} against the base's {base:.4g}"
