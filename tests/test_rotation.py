"""Properties of the r × r algebra, against float64 linear algebra written another way."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.psoft.layer import OrthLayer
from torch import Tensor

from psoft_export.algebra import rotation as algebra
from psoft_export.algebra.parameters import CayleyNeumann, RotationParameters

ranks = st.integers(1, 24)
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1e-6, 0.1, 1.0, 30.0])


def entries(rank: int, seed: int, size: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(algebra.generator_size(rank), generator=generator)


def parameters(
    rank: int, seed: int, size: float, series: CayleyNeumann | None = None, vectors: bool = False
) -> RotationParameters:
    generator = torch.Generator().manual_seed(seed + 1)
    vector_a, vector_b = (1 + 0.2 * torch.randn(2, rank, generator=generator)).unbind()
    return RotationParameters(
        rank,
        entries(rank, seed, size),
        vector_a if vectors else None,
        vector_b if vectors else None,
        True,
        series,
    )


@given(ranks, seeds, sizes)
def test_generator_is_skew_symmetric_and_holds_every_entry(
    rank: int, seed: int, size: float
) -> None:
    values = entries(rank, seed, size)
    matrix = algebra.skew_symmetric(values, rank)
    assert torch.equal(matrix, -matrix.T)
    row_by_row = [matrix[i, j] for i in range(rank) for j in range(i + 1, rank)]
    assert [float(x) for x in row_by_row] == [float(x) for x in values]


@given(ranks, seeds, sizes)
def test_cayley_is_a_rotation(rank: int, seed: int, size: float) -> None:
    matrix = algebra.rotation(parameters(rank, seed, size))
    assert algebra.orthogonality_error(matrix) < 1e-11 * max(1.0, size)
    assert float(torch.linalg.det(matrix)) == pytest.approx(1.0, abs=1e-9)


@given(ranks, seeds, sizes)
def test_cayley_agrees_with_its_eigendecomposition(rank: int, seed: int, size: float) -> None:
    generator = algebra.skew_symmetric(entries(rank, seed, size), rank)
    values, vectors = torch.linalg.eigh(1j * generator)  # Q = −i V diag(values) Vᴴ
    turned = (1 - 1j * values) / (1 + 1j * values)
    expected = (vectors * turned) @ vectors.mH
    assert float(expected.imag.abs().max()) < 1e-11
    torch.testing.assert_close(algebra.cayley(generator), expected.real, rtol=0, atol=1e-10)


@given(ranks, seeds, sizes)
def test_the_opposite_generator_gives_the_inverse(rank: int, seed: int, size: float) -> None:
    generator = algebra.skew_symmetric(entries(rank, seed, size), rank)
    product = algebra.cayley(generator) @ algebra.cayley(-generator)
    torch.testing.assert_close(
        product, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10 * max(1.0, size)
    )


def test_zero_parameters_are_the_identity() -> None:
    for series in (None, CayleyNeumann(5), CayleyNeumann(5, 0.9)):
        still = RotationParameters(7, torch.zeros(21), torch.ones(7), torch.ones(7), True, series)
        assert torch.equal(algebra.rotation(still), torch.eye(7, dtype=torch.float64))
        assert float(algebra.rotation_angles(still).abs().max()) == 0


def test_two_by_two_cayley_by_hand() -> None:
    # q above the diagonal turns by −2·atan(q); exact arithmetic for q = 1/2.
    q = Fraction(1, 2)
    cosine, sine = (1 - q * q) / (1 + q * q), 2 * q / (1 + q * q)
    expected = torch.tensor([[cosine, sine], [-sine, cosine]], dtype=torch.float64)
    found = algebra.rotation(RotationParameters(2, torch.tensor([0.5])))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    angles = algebra.rotation_angles(RotationParameters(2, torch.tensor([0.5])))
    assert angles.tolist() == pytest.approx([2 * math.atan(0.5)] * 2)


@given(ranks, seeds, st.sampled_from([1e-3, 0.1, 1.0]), st.integers(0, 9), st.booleans())
def test_series_is_the_one_that_peft_sums(
    rank: int, seed: int, size: float, terms: int, bounded: bool
) -> None:
    series = CayleyNeumann(terms, 0.5 if bounded else None)
    ours = parameters(rank, seed, size, series, vectors=True)
    layer = OrthLayer(
        rank,
        use_cayley_neumann=True,
        num_cayley_neumann_terms=terms,
        cayley_neumann_eps=series.max_norm,
    ).double()
    with torch.no_grad():
        layer.weight.copy_(ours.weight)
        layer.vector_a.copy_(ours.vector_a)
        layer.vector_b.copy_(ours.vector_b)
        expected = layer.get_matrix()
    torch.testing.assert_close(algebra.rotation(ours), expected, rtol=1e-12, atol=1e-12)


@given(st.integers(2, 16), seeds)
def test_series_approaches_cayley_as_terms_grow(rank: int, seed: int) -> None:
    values = entries(rank, seed, 1.0)
    values *= 0.2 / max(float(algebra.skew_symmetric(values, rank).norm()), 1e-30)
    exact = algebra.rotation(RotationParameters(rank, values))
    errors = [
        float((algebra.rotation(parameters_with(rank, values, t)) - exact).norm())
        for t in (3, 5, 7, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


def parameters_with(rank: int, values: Tensor, terms: int) -> RotationParameters:
    return RotationParameters(rank, values, series=CayleyNeumann(terms))


@given(ranks, seeds, sizes)
def test_vectors_scale_the_output_and_the_input_side(rank: int, seed: int, size: float) -> None:
    relaxed = parameters(rank, seed, size, vectors=True)
    matrix = algebra.rotation(relaxed)
    core = algebra.core_rotation(relaxed)
    assert relaxed.vector_a is not None and relaxed.vector_b is not None
    for i in range(rank):
        for j in range(rank):
            expected = float(relaxed.vector_b[i]) * float(core[i, j]) * float(relaxed.vector_a[j])
            assert float(matrix[i, j]) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40)
@given(st.integers(1, 16), seeds, sizes, st.sampled_from([None, CayleyNeumann(5)]))
def test_angles_are_those_of_the_matrix(
    rank: int, seed: int, size: float, series: CayleyNeumann | None
) -> None:
    stored = parameters(rank, seed, min(size, 0.3) if series else size, series)
    angles = algebra.rotation_angles(stored)
    eigenvalues = torch.linalg.eigvals(algebra.core_rotation(stored))
    expected = eigenvalues.angle().abs().sort(descending=True).values
    torch.testing.assert_close(angles, expected, rtol=0, atol=1e-6)
    assert bool((angles >= 0).all()) and bool((angles <= math.pi).all())


def test_a_free_matrix_is_used_as_stored_and_turns_by_its_polar_factor() -> None:
    turn = algebra.cayley(algebra.skew_symmetric(entries(6, 5, 0.4), 6))
    stretch = torch.diag(torch.linspace(0.5, 2, 6, dtype=torch.float64))
    free = RotationParameters(6, turn @ stretch, orthogonal=False)
    assert torch.equal(algebra.rotation(free), turn @ stretch)
    expected = torch.linalg.eigvals(turn).angle().abs().sort(descending=True).values
    torch.testing.assert_close(algebra.rotation_angles(free), expected, rtol=0, atol=1e-12)
