"""The sum W + ΔW: rounded once, measured as it is made, and bounded where it runs in float32."""

import math

import pytest
import torch
from torch import Tensor

from psoft_export.algebra import merged_weight
from psoft_export.algebra.few import entries_reaching
from psoft_export.algebra.merged_weight import (
    added_product,
    low_rank_factors,
    product_error_bound,
)
from psoft_export.algebra.rounding import all_finite, round_to_nearest
from psoft_export.reference.expected import DeltaProduct, DeltaRows, Expected
from psoft_export.verification import evaluation, tiles
from psoft_export.verification.evaluation import Deviation, measure
from psoft_export.verification.tiles import PROBED, row_parts, unit_in_last_place

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
    """The merged weight, and how far it is from W + left @ right."""
    merged = torch.empty(weight.shape, dtype=dtype)
    made = added_product(left, right)
    return merged, measure(weight, merged, expected(left, right), merge=made)


def expected(left: Tensor, right: Tensor, *, whole: bool = False) -> Expected:
    """ΔW as a product, or as rows of the whole."""
    reach_left = torch.linalg.vector_norm(left, dim=1)
    reach_right = torch.linalg.vector_norm(right, dim=0)
    delta = DeltaRows(lambda _, rows: left[rows] @ right) if whole else DeltaProduct(left, right)
    return Expected(delta, reach_left, reach_right, left.shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_figures_are_those_of_the_result(
    dtype: torch.dtype,
    whole: bool,
    at_once: bool,
    factors: tuple[Tensor, Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, left, right = factors
    monkeypatch.setattr(tiles, "_TILE_BYTES", 90_000)  # many tiles, the last one short
    before = weight.clone()
    of, made = expected(left, right, whole=whole), added_product(left, right)
    delta = left @ right
    exact = weight.double() + delta
    if at_once:
        merged = torch.empty(weight.shape, dtype=dtype)
        deviation = measure(weight, merged, of, merge=made)
        assert torch.equal(merged, round_to_nearest(exact, dtype))
    else:
        merged = round_to_nearest(exact, dtype)
        deviation = measure(weight, merged, of)
    assert torch.equal(weight, before), "the base weight is not touched"
    error = merged.double() - exact
    assert deviation.finite and deviation.not_nearest == 0
    largest = float((error.abs() / unit_in_last_place(exact, dtype)).max())
    assert 0.49 < largest <= 0.5
    assert deviation.largest_ulp == pytest.approx(largest, abs=1e-7)
    norm, size, base = float(error.norm()), float(delta.norm()), float(weight.double().norm())
    assert deviation.relative_rounding == pytest.approx(norm / size, rel=1e-5)
    assert deviation.relative_error == pytest.approx(norm / float(exact.norm()), rel=1e-5)
    assert deviation.relative_delta == pytest.approx(size / base, rel=1e-12)
    assert deviation.applied == pytest.approx(1, abs=4 * norm / size / PROBED**0.5)


@pytest.mark.parametrize("times", [0, 0.5, 2])
def test_how_often_the_change_is_in_a_weight_is_told(
    times: float, factors: tuple[Tensor, Tensor, Tensor]
) -> None:
    weight, left, right = factors
    deviation = measure(weight, (weight + times * (left @ right)).bfloat16(), expected(left, right))
    assert deviation.applied == pytest.approx(times, abs=1e-3) and deviation.not_nearest


class Wrong:
    """A merge that goes wrong in some of the rows of W."""

    def __init__(self, left: Tensor, right: Tensor, at: Tensor, by: float) -> None:
        self._merge, self._at, self._by = added_product(left, right), at, by

    def __call__(self, exact: Tensor, rows: slice) -> Tensor:
        made = self._merge(exact, rows)
        for row, column in self._at.tolist():
            if rows.start <= row < rows.stop:
                made[row - rows.start, column] *= 1 + self._by
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [[[0, 0]], [[350, 4]], [[699, 899], [0, 7]]])
def test_a_merge_that_goes_wrong_in_one_entry_is_found(
    dtype: torch.dtype,
    at: list[list[int]],
    factors: tuple[Tensor, Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, left, right = factors
    monkeypatch.setattr(tiles, "_TILE_BYTES", 90_000)
    merged = torch.empty(weight.shape, dtype=dtype)
    wrong = Wrong(left, right, torch.tensor(at), 2 * torch.finfo(dtype).eps)
    deviation = measure(weight, merged, expected(left, right), merge=wrong)
    assert deviation.not_nearest == len(at) and 1 < deviation.largest_ulp < 5
    assert deviation.finite and deviation.applied == pytest.approx(1, abs=1e-3)


def test_a_wrong_entry_is_found_beside_rows_that_are_much_larger(
    factors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rounding may do to the large rows would hide it, were they judged together."""
    weight, left, right = factors
    monkeypatch.setattr(tiles, "_TILE_BYTES", 90_000)
    weight[:350] *= 1e8
    merged = torch.empty(weight.shape, dtype=torch.float32)
    wrong = Wrong(left, right, torch.tensor([[690, 7]]), 2 * torch.finfo(torch.float32).eps)
    assert measure(weight, merged, expected(left, right), merge=wrong).not_nearest == 1


def test_a_merge_of_another_change_is_found(factors: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, left, right = factors
    merged = torch.empty(weight.shape, dtype=torch.bfloat16)
    twice = added_product(2 * left, right)
    deviation = measure(weight, merged, expected(left, right), merge=twice)
    assert torch.equal(merged, round_to_nearest(weight.double() + 2 * left @ right, torch.bfloat16))
    assert deviation.not_nearest > 0.9 * merged.numel()
    assert deviation.applied == pytest.approx(2, abs=1e-3)


def test_what_rounding_does_to_the_probes_is_no_reason_to_evaluate_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large and small changes, of large and small weights: none takes ΔW as a whole."""

    def refused(*_: object) -> float:
        raise AssertionError("the whole of ΔW is evaluated")

    monkeypatch.setattr(DeltaProduct, "add_to", refused)
    for rows, columns, rank in ((1, 3, 1), (40, 2000, 8), (3000, 60, 50)):
        left, right = torch.randn(rows, rank).double(), torch.randn(rank, columns).double()
        for size in (0.0, 1e-30, 1e-6, 1.0, 1e6):
            for scale in (0.0, 1e-20, 1.0, 1e3):
                weight = scale * torch.randn(rows, columns)
                merged, deviation = merge(weight, size * left, right, torch.float32)
                assert deviation.not_nearest == 0
                assert torch.equal(merged, (weight.double() + size * left @ right).float())


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[slice]:
    """The rows of which the whole of ΔW was evaluated."""
    seen: list[slice] = []
    add_to = DeltaProduct.add_to

    def noted(delta: DeltaProduct, weight: Tensor, rows: slice) -> float:
        seen.append(rows)
        return add_to(delta, weight, rows)

    monkeypatch.setattr(DeltaProduct, "add_to", noted)
    monkeypatch.setattr(tiles, "_TILE_BYTES", 90_000)
    return seen


@pytest.mark.parametrize(
    ("dtype", "scale", "size", "is_usual"),
    [
        (torch.bfloat16, 1.0, 1.0, True),
        (torch.bfloat16, 1.0, 0.0, False),
        (torch.bfloat16, 1e-20, 1e-20, False),
        (torch.bfloat16, 1e30, 1.0, False),
        (torch.float16, 1e3, 1.0, True),
        (torch.float16, 1.0, 0.0, False),
    ],
)
def test_sums_of_squares_that_float32_cannot_hold_are_taken_otherwise(
    dtype: torch.dtype, scale: float, size: float, is_usual: bool, evaluated: list[slice]
) -> None:
    left, right = size * torch.randn(300, 4).double(), torch.randn(4, 60).double()
    weight = (scale * torch.randn(300, 60)).to(dtype)
    merged, deviation = merge(weight, left, right, dtype)
    exact = weight.double() + left @ right
    assert torch.equal(merged, round_to_nearest(exact, dtype))
    assert deviation.not_nearest == 0 and deviation.finite
    error = float((merged.double() - exact).norm() / exact.norm())
    assert deviation.relative_error == pytest.approx(error, rel=1e-5)
    assert (not evaluated) == is_usual


@pytest.mark.parametrize("most", [50, 10_000])
def test_a_merge_with_many_ties_is_judged_a_part_at_a_time(
    most: int, evaluated: list[slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of float16 have three bits more than bfloat16's, so an eighth of them are ties."""
    monkeypatch.setattr(evaluation, "_MOST_SUSPECTS", most)
    left, right = 0.1 * torch.randn(300, 4).double(), torch.randn(4, 60).double()
    left[::2] = 0
    weight = torch.randn(300, 60).half()
    merged, deviation = merge(weight, left, right, torch.bfloat16)
    assert torch.equal(merged, round_to_nearest(weight.double() + left @ right, merged.dtype))
    assert deviation.not_nearest == 0 and deviation.largest_ulp == 0.5
    assert bool(evaluated) == (most == 50)


def test_a_merge_that_takes_other_memory_is_right(factors: tuple[Tensor, Tensor, Tensor]) -> None:
    weight, left, right = factors
    made, merged = added_product(left, right), torch.empty(weight.shape, dtype=torch.bfloat16)
    deviation = measure(
        weight, merged, expected(left, right), merge=lambda exact, rows: made(exact.clone(), rows)
    )
    assert torch.equal(merged, round_to_nearest(weight.double() + left @ right, merged.dtype))
    assert deviation.not_nearest == 0


def test_many_wrong_entries_are_judged_a_part_at_a_time(
    factors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, left, right = factors
    of = expected(left, right)
    at_once = measure(weight, weight.bfloat16(), of)
    assert at_once.not_nearest > 0.9 * weight.numel() and at_once.largest_ulp > 100
    assert at_once.applied == pytest.approx(0, abs=1e-3)
    monkeypatch.setattr(evaluation, "_MOST_SUSPECTS", 1000)
    monkeypatch.setattr(tiles, "_TILE_BYTES", 90_000)
    in_parts = measure(weight, weight.bfloat16(), of)
    assert in_parts.not_nearest == at_once.not_nearest
    assert in_parts.largest_ulp == at_once.largest_ulp
    assert in_parts.relative_error == pytest.approx(at_once.relative_error, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 50])
def test_parts_are_those_of_the_whole(
    count: int, factors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, left, right = factors
    monkeypatch.setattr(tiles, "_TILE_BYTES", 200_000)
    whole, deviation = merge(weight, left, right, torch.bfloat16)
    parts = row_parts(weight, count)
    assert 1 <= len(parts) <= count
    merged = torch.empty_like(whole)
    of, made = expected(left, right), added_product(left, right)
    joined, *others = [
        measure(weight[rows], merged[rows], of.of_rows(rows), merge=made) for rows in parts
    ]
    assert torch.equal(merged, whole)
    for other in others:
        joined.join(other)
    assert joined.not_nearest == deviation.not_nearest == 0
    assert joined.largest_ulp == pytest.approx(deviation.largest_ulp, abs=1e-9)
    assert joined.relative_rounding == pytest.approx(deviation.relative_rounding, rel=1e-6)
    assert joined.relative_delta == pytest.approx(deviation.relative_delta, rel=1e-12)
    assert joined.applied == pytest.approx(deviation.applied, abs=1e-3)


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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_few_entries_that_reach_a_bound(device: str) -> None:
    values = torch.tensor([[0.5, -3.0, math.nan], [math.inf, 0.49, 7.0]], device=device)
    assert entries_reaching(values, 0.5).tolist() == [0, 3, 5]
    sizes = torch.tensor([-(2**31), 4, 5, 2**31 - 1], dtype=torch.int32, device=device)
    assert entries_reaching(sizes, 5).tolist() == [2, 3]
    marks = torch.empty(4, dtype=torch.bool, device=device)
    assert entries_reaching(sizes.view(torch.uint32), 5, marks).tolist() == [0, 2, 3]


def test_weights_of_few_rows_or_none() -> None:
    for rows, columns in ((0, 5), (1, 3000), (2, 1)):
        weight, left = torch.randn(rows, columns), torch.randn(rows, 1).double()
        right = torch.randn(1, columns).double()
        merged, deviation = merge(weight, left, right, torch.bfloat16)
        assert torch.equal(merged, round_to_nearest(weight.double() + left @ right, merged.dtype))
        assert deviation.finite and deviation.not_nearest == 0


def test_the_squares_of_a_product_that_cancels_are_not_negative() -> None:
    for _ in range(30):
        u, x = torch.linalg.qr(torch.randn(8, 2, dtype=torch.float64))[0].T
        delta = DeltaProduct(x[None], torch.outer(u, torch.randn(50, dtype=torch.float64)))
        assert 0 <= delta.squares(slice(0, 1)) < 1e-12


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
    if dtype == torch.float16:
        assert all_finite(torch.full((1000,), 6e4, dtype=dtype)), "the sum is beyond its numbers"
    assert all_finite(torch.empty(0)) and all_finite(torch.tensor([1, 2]))


def test_the_largest_distance_is_that_of_all_entries() -> None:
    exact = torch.full((1, 600), 1.0 + 0.4995 * 2**-7, dtype=torch.float64)
    exact[0, 7] = 1.0 + 0.6 * 2**-7
    given = torch.ones(1, 600, dtype=torch.bfloat16)
    given[0, 7] = 1 + 2**-7
    deviation = Deviation(None)
    deviation.add(exact, given)
    assert deviation.largest_ulp == pytest.approx(0.4995, abs=1e-4) and deviation.not_nearest == 0


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
