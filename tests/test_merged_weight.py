"""The sum W + ΔW: rounded once, measured as it is made, and bounded where it runs in float32."""

import math

import pytest
import torch
from torch import Tensor

from psoft_export.algebra import merged_weight
from psoft_export.algebra.merged_weight import (
    AddedProduct,
    WeightMerge,
    low_rank_factors,
    product_error_bound,
    row_parts,
)
from psoft_export.algebra.rounding import all_finite, round_to_nearest
from psoft_export.reference.expected import Expected
from psoft_export.verification import evaluation
from psoft_export.verification.evaluation import Deviation, measure, unit_in_last_place

ROWS, COLUMNS, RANK = 700, 900, 24


@pytest.fixture
def factors() -> tuple[Tensor, Tensor, Tensor]:
    """W, and ΔW as scaling · B (R − I) and A."""
    weight = 0.1 * torch.randn(ROWS, COLUMNS)
    a, b = torch.randn(RANK, COLUMNS), torch.randn(ROWS, RANK)
    rotation = torch.eye(RANK).double() + 0.05 * torch.randn(RANK, RANK).double()
    left, right = low_rank_factors(a, b, rotation, 0.5)
    assert torch.equal(right, a.double())
    by_hand = 0.5 * b.double() @ (rotation - torch.eye(RANK).double())
    torch.testing.assert_close(left, by_hand, rtol=1e-15, atol=1e-15)
    return weight, left, right


def merge(
    weight: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Deviation]:
    """The merged weight, its narrow entries settled, and how far it is from W + left @ right."""
    merged, everything = torch.empty(weight.shape, dtype=dtype), slice(0, len(weight))
    merging = WeightMerge(weight, AddedProduct(left, right), dtype)
    merging.fill(merged, everything)
    of = expected(left, right)
    return merged, measure(weight, merged, of, settle=merging.settling(everything))


def expected(left: Tensor, right: Tensor) -> Expected:
    reach_left = torch.linalg.vector_norm(left, dim=1)
    reach_right = torch.linalg.vector_norm(right, dim=0)
    return Expected(lambda _, rows: left[rows] @ right, reach_left, reach_right, left.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_figures_are_those_of_the_result(
    dtype: torch.dtype, factors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, left, right = factors
    monkeypatch.setattr(merged_weight, "_BLOCK_BYTES", 40_000)  # many blocks, the last one short
    monkeypatch.setattr(evaluation, "_TILE_BYTES", 90_000)
    before = weight.clone()
    merged, deviation = merge(weight, left, right, dtype)
    assert torch.equal(weight, before), "the base weight is not touched"
    delta = left @ right
    exact = weight.double() + delta
    error = merged.double() - exact
    assert merged.shape == exact.shape and merged.dtype == dtype
    assert deviation.finite and deviation.not_nearest == 0
    largest = float((error.abs() / unit_in_last_place(exact, dtype)).max())
    assert 0.49 < largest <= 0.5
    assert deviation.largest_ulp == pytest.approx(largest, abs=1e-12)
    norm, size, whole = float(error.norm()), float(delta.norm()), float(weight.double().norm())
    applied = float(((merged.double() - weight.double()) * delta).sum()) / size**2
    assert deviation.relative_rounding == pytest.approx(norm / size, rel=1e-6)
    assert deviation.relative_error == pytest.approx(norm / float(exact.norm()), rel=1e-6)
    assert deviation.relative_delta == pytest.approx(size / whole, rel=1e-12)
    assert deviation.applied == pytest.approx(applied, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_wrong_neighbours_of_the_float32_product_are_found_and_settled(
    dtype: torch.dtype, factors: tuple[Tensor, Tensor, Tensor]
) -> None:
    weight, left, right = factors
    of, everything = expected(left, right), slice(0, ROWS)
    merging = WeightMerge(weight, AddedProduct(left, right), dtype)
    merged = torch.empty(weight.shape, dtype=dtype)
    merging.fill(merged, everything)
    nearest = round_to_nearest(weight.double() + left @ right, dtype)
    wrong = int((merged != nearest).sum())
    assert 0 < wrong < merged.numel() / 1000, "or there is nothing to settle"
    assert measure(weight, merged, of).not_nearest == wrong
    assert measure(weight, merged, of, settle=merging.settling(everything)).not_nearest == 0
    assert torch.equal(merged, nearest)
    assert WeightMerge(weight, AddedProduct(left, right), torch.float32).settling(slice(0)) is None


def test_many_wrong_entries_are_judged_a_part_at_a_time(
    factors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, left, right = factors
    of = expected(left, right)
    at_once = measure(weight, weight.bfloat16(), of)
    assert at_once.not_nearest > 0.9 * weight.numel() and at_once.largest_ulp > 100
    assert at_once.applied == pytest.approx(0, abs=1e-3)
    monkeypatch.setattr(evaluation, "_MOST_SUSPECTS", 1000)
    monkeypatch.setattr(evaluation, "_TILE_BYTES", 90_000)
    in_parts = measure(weight, weight.bfloat16(), of)
    assert in_parts.not_nearest == at_once.not_nearest
    assert in_parts.largest_ulp == at_once.largest_ulp
    assert in_parts.relative_error == pytest.approx(at_once.relative_error, rel=1e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 50])
def test_parts_are_those_of_the_whole(
    count: int, factors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, left, right = factors
    monkeypatch.setattr(merged_weight, "_BLOCK_BYTES", 200_000)
    whole, deviation = merge(weight, left, right, torch.bfloat16)
    parts = row_parts(weight, count)
    assert 1 <= len(parts) <= count
    merged = torch.empty_like(whole)
    merging = WeightMerge(weight, AddedProduct(left, right), torch.bfloat16)
    joined, *others = [part(merging, weight, merged, rows, expected(left, right)) for rows in parts]
    assert torch.equal(merged, whole)
    for other in others:
        joined.join(other)
    assert joined.not_nearest == deviation.not_nearest == 0
    assert joined.largest_ulp == pytest.approx(deviation.largest_ulp, abs=1e-9)
    assert joined.relative_rounding == pytest.approx(deviation.relative_rounding, rel=1e-12)


def part(
    merging: WeightMerge, weight: Tensor, merged: Tensor, rows: slice, of: Expected
) -> Deviation:
    merging.fill(merged, rows)
    settle = merging.settling(rows)
    return measure(weight[rows], merged[rows], of.of_rows(rows), settle=settle)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [900, 901])
def test_narrow_results_are_the_float64_sum_rounded_once(
    stored: torch.dtype, dtype: torch.dtype, columns: int
) -> None:
    weight = (0.1 * torch.randn(300, columns)).to(stored)
    weight[0] = 0  # and entries where the sum is next to nothing
    left, right = 0.1 * torch.randn(300, 8).double(), 0.1 * torch.randn(8, columns).double()
    left[1] = 0
    left[2], right[:, 5] = 1e-7 * left[2], 1e-9 * right[:, 5]
    # Sums that sit on, and a hair beside, the ties between neighbours of the output dtype.
    grid = weight[10:40].to(dtype).double()
    ulp = unit_in_last_place(grid, dtype)
    left[10:40], left[10:40, 0] = 0, 1
    right[0] = 0.5 * float(ulp[0, 0])
    weight[10:40] = grid.to(stored)
    merged, _ = merge(weight, left, right, dtype)
    assert torch.equal(merged, round_to_nearest(weight.double() + left @ right, dtype))


def test_float32_product_stays_within_its_stated_bound(
    factors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, left, right = factors
    monkeypatch.setattr(merged_weight, "product_dtype", lambda _: torch.float32)
    merged, _ = merge(weight, left, right, torch.float32)
    exact = weight.double() + left @ right
    bound = product_error_bound(RANK, torch.float32) * (left.abs() @ right.abs())
    rounding = 0.5 * unit_in_last_place(exact, torch.float32)
    error = (merged.double() - exact).abs()
    assert bool((error <= bound + rounding).all())
    assert bool((error > rounding).any()), "or the bound would say nothing"


def test_overflow_is_noticed(factors: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, left, right = factors
    _, deviation = merge(weight * 1e6, left, right, torch.float16)
    assert not deviation.finite and math.isinf(deviation.largest_ulp)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_a_single_bad_entry_is_found(dtype: torch.dtype) -> None:
    values = torch.ones(1000).to(dtype)
    assert all_finite(values)
    for place in (0, 501, 999):
        bad = values.clone()
        bad[place] = float("nan")
        assert not all_finite(bad)
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        values[7] = float("-inf")
        assert not all_finite(values)
    assert all_finite(torch.empty(0)) and all_finite(torch.tensor([1, 2]))


def test_the_largest_distance_is_that_of_all_entries() -> None:
    exact = torch.full((1, 600), 1.0 + 0.4995 * 2**-7, dtype=torch.float64)
    exact[0, 7] = 1.0 + 0.6 * 2**-7
    given = torch.ones(1, 600, dtype=torch.bfloat16)
    deviation = Deviation(None)
    deviation.add(exact, given, lambda row, _: torch.full(row.shape, 1 + 2**-7).bfloat16())
    assert deviation.largest_ulp == pytest.approx(0.4995, abs=1e-4)
    assert deviation.not_nearest == 0 and given[0, 7] == 1 + 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_neighbour_of_the_nearest_number_is_found_at_every_magnitude(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    powers = torch.arange(math.log2(limits.smallest_normal) - 3, math.log2(limits.max) - 1)
    marks = torch.linspace(1, 2, 33, dtype=torch.float64)[:-1]
    marks[1:] += 1e-3  # the first column holds numbers of `dtype` itself
    exact = powers.double().exp2()[:, None] * marks
    exact = torch.cat([exact, -exact])
    nearest = round_to_nearest(exact, dtype)
    up, down = (torch.nextafter(nearest, torch.full_like(nearest, s * math.inf)) for s in (1, -1))
    for given, moved in ((nearest, False), (up, True), (down, True), (-nearest, True)):
        deviation = Deviation(None)
        deviation.add(exact, given)
        assert deviation.not_nearest == moved * exact.numel()
        assert (deviation.largest_ulp <= 0.5) != moved


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_a_transposed_weight_is_not_nearest(
    wrong: float, factors: tuple[Tensor, Tensor, Tensor]
) -> None:
    weight, left, right = factors
    merged = round_to_nearest(weight.double() + left @ right, torch.bfloat16)
    turned = merged.T.contiguous().T
    turned[3, 5] = wrong
    deviation = measure(weight.T.contiguous().T, turned, expected(left, right))
    assert deviation.not_nearest == 1 and not deviation.finite


def test_an_infinity_is_never_right_in_a_merged_weight(
    factors: tuple[Tensor, Tensor, Tensor],
) -> None:
    weight, left, right = factors
    left[2] = 1e308
    right[:, 4] = 1e308
    merged = (weight.double() + left @ right).bfloat16()
    assert bool(merged.isinf().any())
    assert not measure(weight, merged, expected(left, right)).finite


@pytest.mark.parametrize(
    ("values", "given", "wrong"),
    [([0.0, 1.0], [1e-20, 1.0], 1), ([-math.inf, 2.0], [-math.inf, 2.0], 0), ([1.0], [1.0], 0)],
)
def test_values_widened_to_float64_are_compared_as_they_are(
    values: list[float], given: list[float], wrong: int
) -> None:
    written = torch.tensor([given], dtype=torch.float64)
    before = written.clone()
    deviation = Deviation(None, may_overflow=True)
    deviation.add(torch.tensor([values]).bfloat16(), written)
    assert deviation.not_nearest == wrong and torch.equal(written, before)
