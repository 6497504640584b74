"""The methods that combine the rotations of several adapters: functions on r × r matrices.

Every adapter has a weight wᵢ, and the base has what is left, 1 − Σ wᵢ: weights that sum to one
make a mean, two weights of 1 a sum, a negative one takes a task away, and an adapter alone with
weight 1 stays what it is. All rotations are in one basis, float64 on the CPU. `docs/combining.md`
says when to use which.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psoft_export.algebra import logarithm as lie
from psoft_export.algebra.rotation import cayley

_TOLERANCE = 1e-12  # of the Karcher mean: length of the last step over √r
_STEPS = 200


@dataclass(frozen=True)
class Settings:
    """What some methods ask for beside weights.

    Attributes:
        factor: common factor of `task-arithmetic`, `ties` and `dare-ties`.
        density: share of the entries that `ties` and the `dare` methods keep, above 0, at most 1.
        seed: of the entries that the `dare` methods drop.
    """

    factor: float = 1.0
    density: float = 0.5
    seed: int = 0


class NoMeanError(ValueError):
    """The rotations have no mean that the method finds; the message says why."""


# R − I of each adapter (r × r), the weights, the settings, and of each adapter a generator of
# random numbers → R − I.
Sum = Callable[[Sequence[Tensor], Sequence[float], Settings, Sequence[torch.Generator]], Tensor]
# The rotation of each adapter (r × r) and the weights → a rotation.
Mean = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
# The same → the rotations whose logarithm must be unique for the mean to be.
Logarithms = Callable[[Sequence[Tensor], Sequence[float]], list[Tensor]]


def _each(rotations: Sequence[Tensor], _: Sequence[float]) -> list[Tensor]:
    return list(rotations)


def _between(rotations: Sequence[Tensor], _: Sequence[float]) -> list[Tensor]:
    return [rotations[0].T @ rotations[1]]


def _powers(rotations: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    return [c for c, weight in zip(rotations, weights, strict=True) if weight != 1]


@dataclass(frozen=True)
class Method:
    """One way to combine.

    Attributes:
        name: what the user calls it.
        idea: in a line.
        formula: of R, with Δᵢ = Rᵢ − I and Qᵢ the generator of Cᵢ.
        source: where it is from.
        use: when to use it.
        sum: combines R − I, entry by entry; or None.
        mean: combines rotations on the group, so that the result is one; or None.
        settings: which fields of `Settings` it asks for.
        adapters: how many it takes; None for any number.
        logarithms: of a method on the group: whose logarithms it depends on.
    """

    name: str
    idea: str
    formula: str
    source: str
    use: str
    sum: Sum | None = None
    mean: Mean | None = None
    settings: tuple[str, ...] = ()
    adapters: int | None = None
    logarithms: Logarithms = _each

    @property
    def is_orthogonal(self) -> bool:
        """Whether strict adapters make a strict adapter."""
        return self.mean is not None


def _linear(
    cores: Sequence[Tensor], weights: Sequence[float], _: Settings, __: Sequence[torch.Generator]
) -> Tensor:
    return _weighted(cores, weights)


def _task_arithmetic(
    cores: Sequence[Tensor],
    weights: Sequence[float],
    settings: Settings,
    _: Sequence[torch.Generator],
) -> Tensor:
    return settings.factor * _weighted(cores, weights)


def _ties(
    cores: Sequence[Tensor],
    weights: Sequence[float],
    settings: Settings,
    _: Sequence[torch.Generator],
) -> Tensor:
    trimmed = [_largest(core, settings.density) for core in cores]
    return settings.factor * _elected(trimmed, weights)


def _dare_linear(
    cores: Sequence[Tensor],
    weights: Sequence[float],
    settings: Settings,
    random: Sequence[torch.Generator],
) -> Tensor:
    return _weighted(_dropped(cores, settings, random), weights)


def _dare_ties(
    cores: Sequence[Tensor],
    weights: Sequence[float],
    settings: Settings,
    random: Sequence[torch.Generator],
) -> Tensor:
    return settings.factor * _elected(_dropped(cores, settings, random), weights)


def _lie(rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return lie.exponential(_weighted([lie.logarithm(c) for c in rotations], weights))


def _cayley(rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return cayley(_weighted([lie.generator(c) for c in rotations], weights))


def _karcher(rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The rotation from which the weighted directions to all, and to the base, cancel out."""
    identity = torch.eye(len(rotations[0]), dtype=rotations[0].dtype)
    members = [*rotations, identity]
    shares = [*weights, 1 - math.fsum(weights)]
    found, limit = _lie(rotations, weights), _TOLERANCE * math.sqrt(len(identity))
    last = math.inf
    for _ in range(_STEPS):
        step = _weighted([lie.logarithm(found.T @ c) for c in members], shares)
        found = found @ lie.exponential(step)
        length = float(torch.linalg.matrix_norm(step))
        if length <= limit:
            return found
        if length > 2 * last:
            break
        last = length
    raise NoMeanError(
        f"the Karcher mean is not found: its step is still {length:.1e} long, as the rotations "
        "are too far apart for these weights; use smaller weights, or the method 'lie'"
    )


def _slerp(rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = math.fsum(weights)
    if not total:
        raise NoMeanError(
            "the weights sum to 0, which is no place between two rotations; use the method 'lie'"
        )
    first, second = rotations
    between = first @ lie.power(first.T @ second, weights[1] / total)
    return lie.power(between, total)


def _orthomerge(rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    generators = [lie.generator(rotation) for rotation in rotations]
    mean = _weighted(generators, weights)
    norms = math.fsum(
        abs(w) * float(torch.linalg.matrix_norm(q))
        for q, w in zip(generators, weights, strict=True)
    )
    norm = float(torch.linalg.matrix_norm(mean))
    return cayley(mean * (norms / norm) if norm else mean)


def _compose(rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    found = torch.eye(len(rotations[0]), dtype=rotations[0].dtype)
    for rotation, weight in zip(rotations, weights, strict=True):
        found = lie.power(rotation, weight) @ found
    return found


_ALL = (
    Method(
        "linear",
        "the sum of the ΔW",
        "I + Σ wᵢ Δᵢ",
        "linear algebra",
        "the exact weighted sum of the changes, as of LoRA adapters; tasks that hardly overlap",
        sum=_linear,
    ),
    Method(
        "task-arithmetic",
        "the sum, scaled by a common factor",
        "I + λ Σ wᵢ Δᵢ",
        "arXiv 2212.04089",
        "several tasks at full weight, with one number λ to tune on held-out data",
        sum=_task_arithmetic,
        settings=("factor",),
    ),
    Method(
        "ties",
        "keep the largest entries, elect a sign for each, sum up those that have it",
        "I + λ (s / s') Σ' wᵢ Δᵢ, s = Σ abs wᵢ; ' only those of the elected sign",
        "arXiv 2306.01708",
        "tasks whose changes contradict each other entry by entry",
        sum=_ties,
        settings=("factor", "density"),
    ),
    Method(
        "dare-linear",
        "drop entries at random, scale the others up, sum",
        "I + Σ wᵢ (Mᵢ ∘ Δᵢ) / density",
        "arXiv 2311.03099",
        "a baseline from the literature; R − I has few entries, so what is dropped is missed",
        sum=_dare_linear,
        settings=("density", "seed"),
    ),
    Method(
        "dare-ties",
        "drop entries at random, scale the others up, elect signs as ties",
        "as ties, of (Mᵢ ∘ Δᵢ) / density",
        "arXiv 2311.03099, 2306.01708",
        "as dare-linear",
        sum=_dare_ties,
        settings=("factor", "density", "seed"),
    ),
    Method(
        "lie",
        "the mean in the Lie algebra so(r)",
        "exp(Σ wᵢ log Cᵢ)",
        "the group's own exponential map",
        "the first to try where the result must stay a rotation",
        mean=_lie,
    ),
    Method(
        "cayley",
        "the mean of the generators Q",
        "Cayley(Σ wᵢ Qᵢ)",
        "PSOFT's own parameters, arXiv 2505.11235",
        "as lie, nearly equal to it for small angles and cheaper",
        mean=_cayley,
    ),
    Method(
        "karcher",
        "the Riemannian mean: least squares of the geodesic distances",
        "C with Σ wᵢ log(Cᵀ Cᵢ) + (1 − Σ wᵢ) log(Cᵀ) = 0",
        "Karcher mean on SO(r), as in mergekit",
        "weights that sum to one; does not depend on where the group's origin is",
        mean=_karcher,
    ),
    Method(
        "slerp",
        "two adapters: along the geodesic from one to the other",
        "(C₁ (C₁ᵀ C₂)^(w₂/s))^s, s = w₁ + w₂",
        "spherical interpolation on SO(r)",
        "two tasks, to walk from one to the other",
        mean=_slerp,
        adapters=2,
        logarithms=_between,
    ),
    Method(
        "orthomerge",
        "the mean of the generators, brought to the mean of their norms",
        "Cayley(c Σ wᵢ Qᵢ), c = Σ abs(wᵢ) ‖Qᵢ‖ / ‖Σ wᵢ Qᵢ‖",
        "arXiv 2602.05943",
        "tasks whose generators are nearly orthogonal to each other, so that a mean is too weak",
        mean=_orthomerge,
    ),
    Method(
        "compose",
        "one rotation after the other, the first given first",
        "Cₙ^wₙ ⋯ C₂^w₂ C₁^w₁",
        "the group's product",
        "a task that builds on another; the order matters",
        mean=_compose,
        logarithms=_powers,
    ),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}


def _weighted(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(terms[0])
    for term, weight in zip(terms, weights, strict=True):
        total += weight * term
    return total


def _largest(core: Tensor, density: float) -> Tensor:
    """The largest entries in magnitude, that share of those that are not zero; the others zero."""
    magnitudes = core.abs().flatten()
    kept = math.ceil(density * int(magnitudes.count_nonzero()))
    if not kept:
        return core
    chosen = torch.zeros_like(magnitudes)
    chosen[magnitudes.argsort(descending=True, stable=True)[:kept]] = 1
    return core * chosen.view_as(core)


def _elected(cores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sum over the entries that have the elected sign, scaled up to the whole weight."""
    terms = torch.stack([w * core for core, w in zip(cores, weights, strict=True)])
    agrees = (terms.sign() == terms.sum(0).sign()) & (terms != 0)
    sizes = torch.tensor([abs(weight) for weight in weights], dtype=terms.dtype)
    present = (sizes[:, None, None] * agrees).sum(0)
    share = torch.where(present > 0, float(sizes.sum()) / present, 0.0)
    return (terms * agrees).sum(0) * share


def _dropped(
    cores: Sequence[Tensor], settings: Settings, random: Sequence[torch.Generator]
) -> list[Tensor]:
    """Each entry kept with the probability `density`, and divided by it."""
    kept = []
    for core, generator in zip(cores, random, strict=True):
        mask = torch.rand(core.shape, generator=generator, dtype=torch.float64) < settings.density
        kept.append(core * mask / settings.density)
    return kept
