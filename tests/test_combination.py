"""The methods of combining, as mathematics: what holds for any rotations."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psoft_export.algebra import logarithm as lie
from psoft_export.algebra.combination import METHODS, NoMeanError, Settings
from psoft_export.algebra.factored_rotation import FactoredRotation, combine_rotations
from psoft_export.algebra.logarithm import NotARotationError
from psoft_export.algebra.parameters import CayleyNeumann, RotationParameters
from psoft_export.algebra.rotation import cayley, rotation

GROUP = [name for name, method in METHODS.items() if method.is_orthogonal]
SUMS = [name for name in METHODS if name not in GROUP]
ALONE = [name for name in METHODS if METHODS[name].adapters is None]
# Combine commuting rotations by adding up their angles; the others mean tangents of angles.
ANGULAR = ["lie", "karcher", "slerp", "compose"]

ranks = st.integers(2, 12)
seeds = st.integers(0, 2**31 - 1)
sizes = st.sampled_from([1e-3, 0.05, 0.3, 1.0])
weights = st.floats(-1.5, 1.5).filter(lambda w: abs(w) > 1e-3)


def generator(rank: int, seed: int, size: float) -> Tensor:
    noise = torch.randn(
        rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return size * (noise - noise.T) / math.sqrt(rank)


def strict(rank: int, seed: int, size: float) -> FactoredRotation:
    ones = torch.ones(rank, dtype=torch.float64)
    return FactoredRotation(cayley(generator(rank, seed, size)), ones, ones, is_orthogonal=True)


def relaxed(rank: int, seed: int, size: float) -> FactoredRotation:
    random = torch.Generator().manual_seed(seed)
    a, b = (
        (1 + 0.2 * torch.randn(rank, generator=random, dtype=torch.float64)).clamp_min(0.3)
        for _ in range(2)
    )
    return FactoredRotation(strict(rank, seed, size).core, a, b, is_orthogonal=True)


def distance(first: Tensor, second: Tensor) -> float:
    """The length of the geodesic between two rotations."""
    return float(torch.linalg.matrix_norm(lie.logarithm(first.T @ second)))


def combined(
    name: str,
    rotations: list[FactoredRotation],
    shares: list[float],
    **options: Any,
) -> FactoredRotation:
    random = [torch.Generator().manual_seed(i) for i in range(len(rotations))]
    given = Settings(**options)
    return combine_rotations(METHODS[name], rotations, shares, given, random).rotation


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@given(ranks, seeds, sizes)
def test_logarithm_and_generator_are_inverses(rank: int, seed: int, size: float) -> None:
    skew = generator(rank, seed, size)
    turn = cayley(skew)
    near(lie.generator(turn), skew, 1e-9 * (1 + float(skew.abs().max())))
    log = lie.logarithm(turn)
    near(log, -log.T, 1e-13)
    near(lie.exponential(log), turn, 1e-12)
    assert float(torch.linalg.matrix_norm(log, 2)) <= math.pi + 1e-9
    near(lie.power(turn, 0.5) @ lie.power(turn, 0.5), turn, 1e-12)


@pytest.mark.parametrize("name", GROUP)
@given(rank=ranks, seed=seeds, size=sizes, first=weights, second=weights)
@settings(max_examples=25, deadline=None)
def test_strict_adapters_stay_strictly_orthogonal(
    name: str, rank: int, seed: int, size: float, first: float, second: float
) -> None:
    members = [strict(rank, seed, size), strict(rank, seed + 1, size)]
    try:
        found = combined(name, members, [first, second])
    except NoMeanError:
        assert name in ("karcher", "slerp")
        return
    assert found.is_orthogonal and not found.has_vectors
    stored = found.parameters(free=not found.has_generator, vectors=False)
    turn = rotation(stored)
    error = torch.linalg.matrix_norm(turn.T @ turn - torch.eye(rank, dtype=torch.float64))
    assert float(error) < 1e-6
    near(turn, found.matrix, 1e-5)


@pytest.mark.parametrize("name", METHODS)
@given(rank=ranks, seed=seeds, share=st.floats(0.05, 1))
@settings(max_examples=10, deadline=None)
def test_the_identity_is_combined_with_itself_to_the_identity(
    name: str, rank: int, seed: int, share: float
) -> None:
    same = [FactoredRotation.identity(rank)] * 2
    near(combined(name, same, [share, 1.0]).matrix, same[0].matrix, 1e-12)


@pytest.mark.parametrize("name", ALONE)
@given(rank=ranks, seed=seeds, size=sizes)
@settings(max_examples=10, deadline=None)
def test_an_adapter_alone_stays_what_it_is(name: str, rank: int, seed: int, size: float) -> None:
    for one in (strict(rank, seed, size), relaxed(rank, seed, size)):
        options = {"density": 1.0} if "density" in METHODS[name].settings else {}
        near(combined(name, [one], [1.0], **options).matrix, one.matrix)


@pytest.mark.parametrize("name", GROUP)
@given(rank=ranks, seed=seeds, size=sizes)
@settings(max_examples=10, deadline=None)
def test_equal_rotations_have_themselves_as_mean(
    name: str, rank: int, seed: int, size: float
) -> None:
    one = relaxed(rank, seed, size)
    near(combined(name, [one, one], [0.3, 0.7]).matrix, one.matrix, 1e-8)


@pytest.mark.parametrize("name", GROUP)
@given(rank=ranks, seed=seeds, size=sizes)
@settings(max_examples=10, deadline=None)
def test_weight_zero_leaves_an_adapter_out(name: str, rank: int, seed: int, size: float) -> None:
    first, second = strict(rank, seed, size), strict(rank, seed + 1, size)
    near(combined(name, [first, second], [1.0, 0.0]).matrix, first.matrix, 1e-8)
    near(combined(name, [first, second], [0.0, 1.0]).matrix, second.matrix, 1e-8)


@pytest.mark.parametrize("name", ["lie", "cayley", "karcher", "compose"])
@given(rank=ranks, seed=seeds, size=st.sampled_from([1e-3, 0.05, 0.1]))
@settings(max_examples=10, deadline=None)
def test_a_negative_weight_is_the_inverse(name: str, rank: int, seed: int, size: float) -> None:
    one = strict(rank, seed, size)
    near(combined(name, [one], [-1.0]).matrix, one.matrix.T, 1e-8)


@given(rank=ranks, seed=seeds, size=sizes)
@settings(max_examples=25, deadline=None)
def test_compose_is_the_product_in_the_order_given(rank: int, seed: int, size: float) -> None:
    first, second = strict(rank, seed, size), strict(rank, seed + 1, size)
    near(combined("compose", [first, second], [1.0, 1.0]).matrix, second.matrix @ first.matrix)
    back = combined("compose", [first, first], [1.0, -1.0])
    near(back.matrix, torch.eye(rank, dtype=torch.float64), 1e-8)


@given(rank=ranks, seed=seeds, size=st.sampled_from([1e-3, 0.05, 0.2]), share=st.floats(0.1, 0.9))
@settings(max_examples=25, deadline=None)
def test_all_agree_on_commuting_rotations(rank: int, seed: int, size: float, share: float) -> None:
    """In common planes, angles add up; tangents of angles do so but for their cubes."""
    skew = generator(rank, seed, size)
    ones = torch.ones(rank, dtype=torch.float64)
    members = [
        FactoredRotation(lie.exponential(times * skew), ones, ones, is_orthogonal=True)
        for times in (1.0, 0.4)
    ]
    shares = [share, 1 - share]
    total = lie.exponential((share + 0.4 * (1 - share)) * skew)
    for name in ANGULAR:
        near(combined(name, members, shares).matrix, total, 1e-9)
    angle = float(torch.linalg.matrix_norm(skew, 2))
    for name in ("cayley", "orthomerge"):
        near(combined(name, members, shares).matrix, total, angle**3 / 2 + 1e-12)
    for name in ("linear", "task-arithmetic"):
        near(combined(name, members, shares).matrix, total, angle**2 + 1e-12)


@given(rank=ranks, seed=seeds, size=st.sampled_from([0.05, 0.2]))
@settings(max_examples=20, deadline=None)
def test_the_karcher_mean_is_nearest(rank: int, seed: int, size: float) -> None:
    """No step away from it shortens the sum of squared geodesic distances."""
    members = [strict(rank, seed + i, size) for i in range(3)]
    shares = [0.5, 0.3, 0.2]
    mean = combined("karcher", members, shares).matrix

    def spread(at: Tensor) -> float:
        pairs = zip(members, shares, strict=True)
        return sum(w * distance(at, m.matrix) ** 2 for m, w in pairs)

    for step in range(3):
        moved = mean @ lie.exponential(1e-3 * generator(rank, seed + 10 + step, 1.0))
        assert spread(moved) > spread(mean)
    # It does not depend on the origin: turned members have the turned mean.
    turn = strict(rank, seed + 20, 0.5).matrix
    turned = [FactoredRotation(turn @ m.core, m.vector_a, m.vector_b, True) for m in members]
    near(combined("karcher", turned, shares).matrix, turn @ mean, 1e-8)


@given(rank=ranks, seed=seeds, share=st.floats(0.0, 1.0))
@settings(max_examples=20, deadline=None)
def test_slerp_walks_the_geodesic_evenly(rank: int, seed: int, share: float) -> None:
    first, second = strict(rank, seed, 0.2), strict(rank, seed + 1, 0.2)
    between = combined("slerp", [first, second], [1 - share, share]).matrix
    whole = distance(first.matrix, second.matrix)
    assert distance(first.matrix, between) == pytest.approx(share * whole, abs=1e-7)
    assert distance(between, second.matrix) == pytest.approx((1 - share) * whole, abs=1e-7)


def test_orthomerge_has_the_mean_of_the_norms() -> None:
    members = [strict(8, seed, 0.1) for seed in range(4)]
    norms = [float(torch.linalg.matrix_norm(lie.generator(m.core))) for m in members]
    found = lie.generator(combined("orthomerge", members, [0.25] * 4).core)
    plain = lie.generator(combined("cayley", members, [0.25] * 4).core)
    assert float(torch.linalg.matrix_norm(found)) == pytest.approx(sum(norms) / 4)
    assert float(torch.linalg.matrix_norm(plain)) < 0.7 * sum(norms) / 4
    near(found / torch.linalg.matrix_norm(found), plain / torch.linalg.matrix_norm(plain))


def test_ties_trims_elects_and_sums() -> None:
    def free(*entries: float) -> FactoredRotation:
        core = torch.zeros(2, 2, dtype=torch.float64)
        core.view(-1)[:] = torch.tensor(entries)
        return FactoredRotation.free(torch.eye(2, dtype=torch.float64) + core)

    first, second = free(4.0, -1.0, 0.5, 0.0), free(2.0, 3.0, -2.0, 0.1)
    found = combined("ties", [first, second], [0.5, 0.5], density=1.0).matrix
    # (4 + 2)/2; 3 has the elected sign and the whole weight; −2 against 0.5; 0.1 alone.
    near(found - torch.eye(2), torch.tensor([[3.0, 3.0], [-2.0, 0.1]]).double())
    trimmed = combined("ties", [first, second], [0.5, 0.5], density=0.5, factor=2.0).matrix
    # Of the first 4 and −1 are left, of the second 3 and 2 (−2 is no larger and comes later).
    near(trimmed - torch.eye(2), torch.tensor([[6.0, 6.0], [0.0, 0.0]]).double())
    taken_away = combined("ties", [first, second], [0.5, -0.5], density=1.0).matrix
    near(taken_away - torch.eye(2), torch.tensor([[4.0, -2.0], [1.25, -0.1]]).double())


@pytest.mark.parametrize("name", ["dare-linear", "dare-ties"])
def test_dare_keeps_the_mean_and_its_seed(name: str) -> None:
    one = strict(64, 1, 0.3)
    core = one.matrix - torch.eye(64)
    kept = combined(name, [one], [1.0], density=0.25).matrix - torch.eye(64)
    dropped = (kept == 0) & (core != 0)
    assert float(dropped.double().mean()) == pytest.approx(0.75, abs=0.03)
    near(kept[~dropped], core[~dropped] * 4)
    again = combined(name, [one], [1.0], density=0.25).matrix - torch.eye(64)
    assert torch.equal(kept, again)


def test_vectors_are_combined_by_geometric_means() -> None:
    first, second = relaxed(6, 1, 0.2), relaxed(6, 2, 0.2)
    for name in GROUP:
        found = combined(name, [first, second], [0.3, 0.7])
        near(found.vector_a, first.vector_a**0.3 * second.vector_a**0.7)
        near(found.vector_b, first.vector_b**0.3 * second.vector_b**0.7)
        assert found.is_orthogonal
        stored = found.parameters(free=False, vectors=True)
        near(rotation(stored), found.matrix, 1e-6)


def test_a_series_is_taken_as_what_it_computes() -> None:
    """A truncated Cayley–Neumann series is not quite a rotation, and is not made one."""
    entries = 0.1 * torch.randn(15, generator=torch.Generator().manual_seed(3))
    parameters = RotationParameters(6, entries, series=CayleyNeumann(4))
    one = FactoredRotation.of(parameters)
    assert not one.is_orthogonal
    for name in ("lie", "karcher", "compose"):
        found = combined(name, [one], [1.0])
        near(found.matrix, rotation(parameters), 1e-10)
        assert not found.has_generator
        near(rotation(found.parameters(free=True, vectors=True)), found.matrix, 1e-6)


def test_negative_scalings_join_the_rotation() -> None:
    one = relaxed(6, 4, 0.2)
    a = one.vector_a.clone()
    a[:2] *= -1
    flipped = FactoredRotation(one.core, a, one.vector_b, is_orthogonal=True)
    near(combined("lie", [flipped], [1.0]).matrix, flipped.matrix, 1e-5)
    a[0] *= -1
    reflected = FactoredRotation(one.core, a, one.vector_b, is_orthogonal=True)
    with pytest.raises(NotARotationError, match="1: holds a reflection"):
        combined("lie", [reflected], [1.0])
    a[0] = 0
    singular = FactoredRotation(one.core, a, one.vector_b, is_orthogonal=True)
    with pytest.raises(NotARotationError, match="1: has a zero in a scaling vector"):
        combined("lie", [singular], [1.0])
    near(combined("linear", [singular], [1.0]).matrix, singular.matrix)


def half_turned(rank: int = 6, planes: int = 1) -> FactoredRotation:
    """Turned by π in some planes, and a little elsewhere."""
    frame = torch.linalg.qr(generator(rank, 5, 1.0) + torch.eye(rank)).Q
    turn = torch.eye(rank, dtype=torch.float64)
    for plane in range(planes):
        turn[2 * plane, 2 * plane] = turn[2 * plane + 1, 2 * plane + 1] = -1
    rest = slice(2 * planes, rank)
    turn[rest, rest] = cayley(generator(rank - 2 * planes, 6, 0.2))
    ones = torch.ones(rank, dtype=torch.float64)
    return FactoredRotation(frame @ turn @ frame.T, ones, ones, is_orthogonal=True)


@pytest.mark.parametrize("planes", [1, 2])
def test_a_half_turn_has_a_defined_logarithm(planes: int) -> None:
    one = half_turned(planes=planes)
    assert lie.half_turns(one.core) == planes and not one.has_generator
    near(lie.exponential(lie.logarithm(one.core)), one.core, 1e-5)
    for name in ("lie", "cayley", "karcher", "orthomerge", "compose"):
        random = [torch.Generator()]
        found = combine_rotations(METHODS[name], [one], [1.0], Settings(), random)
        near(found.rotation.matrix, one.matrix, 1e-5)
        assert found.half_turns == (0 if name == "compose" else planes)
    quarter = combined("lie", [one], [0.5]).matrix
    near(quarter @ quarter, one.matrix, 1e-5)
    stored = one.parameters(free=True, vectors=False)
    assert not stored.orthogonal
    near(rotation(stored), one.matrix, 1e-6)


def test_slerp_between_opposite_rotations_says_so() -> None:
    one, far = FactoredRotation.identity(6), half_turned()
    random = [torch.Generator()] * 2
    found = combine_rotations(METHODS["slerp"], [one, far], [0.5, 0.5], Settings(), random)
    assert found.half_turns == 1
    assert distance(one.core, found.rotation.core) == pytest.approx(
        distance(far.core, found.rotation.core), abs=1e-5
    )


def test_what_has_no_mean() -> None:
    one, other = strict(6, 1, 0.2), strict(6, 2, 0.2)
    with pytest.raises(NoMeanError, match="weights sum to 0"):
        combined("slerp", [one, other], [1.0, -1.0])
    spread = [strict(6, seed, 30.0) for seed in range(3)]
    with pytest.raises(NoMeanError, match="Karcher mean is not found"):
        combined("karcher", spread, [4.0, -3.0, 5.0])


@given(rank=st.integers(2, 6), more=st.integers(0, 5), seed=seeds)
@settings(max_examples=25, deadline=None)
def test_another_basis_turns_the_rotation_with_it(rank: int, more: int, seed: int) -> None:
    """R ⊕ I for a higher rank, D R D for other signs: what x ↦ R x is does not change."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.where(torch.rand(rank, generator=random) < 0.5, -1.0, 1.0).double()
    frame = torch.zeros(rank, rank + more, dtype=torch.float64)
    frame[:, :rank] = torch.diag(signs)
    one = relaxed(rank, seed, 0.3)
    found = one.in_basis(frame)
    assert found.is_orthogonal
    near(found.matrix[:rank, :rank], signs[:, None] * one.matrix * signs, 0)
    near(found.matrix[rank:, rank:], torch.eye(more, dtype=torch.float64), 0)
    assert not found.matrix[rank:, :rank].any() and not found.matrix[:rank, rank:].any()
    turned = torch.linalg.qr(torch.randn(rank + more, rank, generator=random).double()).Q.T
    identity = torch.eye(rank + more, dtype=torch.float64)
    for any_one in (one, strict(rank, seed, 0.3)):
        core = any_one.matrix - torch.eye(rank, dtype=torch.float64)
        near(any_one.in_basis(turned).matrix, identity + turned.T @ core @ turned, 1e-12)
    kept = strict(rank, seed, 0.3).in_basis(turned)
    assert kept.is_orthogonal
    near(kept.matrix.T @ kept.matrix, identity, 1e-12)
