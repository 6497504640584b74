"""The sum W + ΔW: rounded once, measured as it is made, and bounded where it runs in float32."""

import pytest
import torch
from torch import Tensor

from psoft_export.algebra import merged_weight
from psoft_export.algebra.merged_weight import (
    MergeFigures,
    low_rank_factors,
    merged_blocks,
    product_error_bound,
    row_parts,
    with_product,
)
from psoft_export.algebra.rounding import all_finite, round_to_nearest
from psoft_export.verification.evaluation import unit_in_last_place

ROWS, COLUMNS, RANK = 700, 900, 24


@pytest.fixture
def factors() -> tuple[Tensor, Tensor, Tensor]:
    """W, and ΔW as scaling · B (R − I) and A."""
    weight = 0.1 * torch.randn(ROWS, COLUMNS)
    a, b = torch.randn(RANK, COLUMNS), torch.randn(ROWS, RANK)
    rotation = torch.eye(RANK).double() + 0.05 * torch.randn(RANK, RANK).double()
    left, right = low_rank_factors(a, b, rotation, 0.5)
    assert torch.equal(right, a.double())
    expected = 0.5 * b.double() @ (rotation - torch.eye(RANK).double())
    torch.testing.assert_close(left, expected, rtol=1e-15, atol=1e-15)
    return weight, left, right


def merge(
    weight: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype
) -> tuple[Tensor, MergeFigures]:
    figures = MergeFigures()
    everything = slice(0, len(weight))
    blocks = merged_blocks(weight, everything, with_product(left, right), dtype, figures)
    return torch.cat(list(blocks)), figures


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_figures_are_those_of_the_result(
    dtype: torch.dtype, factors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, left, right = factors
    monkeypatch.setattr(merged_weight, "_BLOCK_BYTES", 40_000)  # many blocks, the last one short
    before = weight.clone()
    merged, figures = merge(weight, left, right, dtype)
    assert torch.equal(weight, before), "the base weight is not touched"
    exact = weight.double() + left @ right
    error = merged.double() - exact
    assert merged.shape == exact.shape and merged.dtype == dtype
    assert figures.finite
    assert figures.weight_norm == pytest.approx(float(weight.double().norm()), rel=1e-6)
    largest = float((error.abs() / unit_in_last_place(exact, dtype)).max())
    assert 0.49 < largest <= 0.5
    assert figures.rounding_norm == pytest.approx(float(error.norm()), rel=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 50])
def test_parts_are_those_of_the_whole(
    count: int, factors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, left, right = factors
    monkeypatch.setattr(merged_weight, "_BLOCK_BYTES", 200_000)
    whole, figures = merge(weight, left, right, torch.bfloat16)
    parts = row_parts(weight, count)
    assert 1 <= len(parts) <= count
    of_parts = [MergeFigures() for _ in parts]
    merged = [
        block
        for rows, of_part in zip(parts, of_parts, strict=True)
        for block in merged_blocks(weight, rows, with_product(left, right), torch.bfloat16, of_part)
    ]
    assert torch.equal(torch.cat(merged), whole)
    joined = MergeFigures.of(of_parts)
    assert joined.weight_norm == pytest.approx(figures.weight_norm, rel=1e-12)
    assert joined.rounding_norm == pytest.approx(figures.rounding_norm, rel=1e-12)


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
    expected = round_to_nearest(weight.double() + left @ right, dtype)
    assert torch.equal(merged, expected)


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
    _, figures = merge(weight * 1e6, left, right, torch.float16)
    assert not figures.finite


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
