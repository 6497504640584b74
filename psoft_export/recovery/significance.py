"""Whether a loss is below another one, beyond what chance would do."""

import math

from psoft_export.recovery.task_loss import Losses

_SURE = 3.0  # standard errors by which a loss must be below, of very many examples
_LEAST_GAIN = 1e-3  # of the base's loss: less is nothing that signs could be told by
# Where Student's t is larger with a chance of 1 in 741, as a normal variable is than 3, by degrees
# of freedom; from ten on two terms of its expansion are within 1 %.
_FEW = (235.801, 19.207, 9.219, 6.620, 5.507, 4.904, 4.530, 4.277, 4.094)


def is_below(losses: Losses, base: Losses) -> bool:
    """Whether the losses of some examples are below the base's, beyond what chance would do.

    The mean gain must be `least_sure` standard errors, and 0.1 % of the base's loss.

    Args:
        losses: of two examples or more.
        base: of the same.
    """
    gains = (base.sums - losses.sums) / base.counts.mean()
    error = float(gains.std(correction=1)) / math.sqrt(len(gains))
    return float(gains.mean()) > max(least_sure(len(gains)) * error, _LEAST_GAIN * base.mean)


def least_sure(count: int) -> float:
    """Student's t of a mean of so many values that chance exceeds as seldom as 3 normal errors.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5, has the expansion.
    """
    z, freedom = _SURE, count - 1
    if freedom <= len(_FEW):
        return _FEW[freedom - 1]
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
