"""Rounding to the output dtype happens once, to the nearest number, ties to even."""

from bisect import bisect_left
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psoft_export.algebra.rounding import round_to_nearest
from psoft_export.verification.tiles import unit_in_last_place

HALVES = [torch.float16, torch.bfloat16]


def all_numbers(dtype: torch.dtype) -> list[float]:
    """Every finite number of a 16-bit dtype, ascending, −0 left out."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return sorted(set(values[torch.isfinite(values)].tolist()))


NUMBERS = {dtype: all_numbers(dtype) for dtype in HALVES}


def nearest(value: float, dtype: torch.dtype) -> set[float]:
    """The number or, on a tie, the even one of the two, found by search in exact arithmetic."""
    numbers = NUMBERS[dtype]
    place = bisect_left(numbers, value)
    around = numbers[max(place - 1, 0) : place + 1]
    distance = {n: abs(Fraction(n) - Fraction(value)) for n in around}
    best = [n for n in around if distance[n] == min(distance.values())]
    if len(best) == 1:
        return set(best)
    return {n for n in best if is_even(n, dtype)}


def is_even(number: float, dtype: torch.dtype) -> bool:
    return int(torch.tensor(number, dtype=dtype).view(torch.int16)) % 2 == 0


@pytest.mark.parametrize("dtype", HALVES)
@given(st.data())
def test_result_is_the_nearest_number(dtype: torch.dtype, data: st.DataObject) -> None:
    limit = NUMBERS[dtype][-1]
    value = data.draw(st.floats(-limit, limit))
    assert float(round_to_nearest(torch.tensor(value, dtype=torch.float64), dtype)) in nearest(
        value, dtype
    )


@pytest.mark.parametrize("dtype", HALVES)
@given(st.data())
def test_values_next_to_a_tie_are_not_rounded_twice(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    numbers = NUMBERS[dtype]
    place = data.draw(st.integers(0, len(numbers) - 2))
    middle = (Fraction(numbers[place]) + Fraction(numbers[place + 1])) / 2
    offset = data.draw(st.sampled_from([-1, 0, 1])) * abs(middle) * Fraction(1, 2**45)
    value = float(middle + offset)
    assert float(round_to_nearest(torch.tensor(value, dtype=torch.float64), dtype)) in nearest(
        value, dtype
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_plain_conversion_would_round_twice(dtype: torch.dtype) -> None:
    # Just above the tie between 1 and the next number: up, although float32 cannot see "above".
    step = float(unit_in_last_place(torch.tensor(1.0, dtype=torch.float64), dtype))
    value = torch.tensor(1 + step / 2 + 2**-40, dtype=torch.float64)
    assert float(value.to(dtype)) == 1.0
    assert float(round_to_nearest(value, dtype)) == 1 + step


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_unit_in_last_place_is_the_gap_to_the_next_number(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    values = torch.tensor([1.0, 1.5, 3.0, 0.1, 100.0, tiny, tiny / 4], dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    following = (values.view(bits) + 1).view(dtype)
    gap = following.double() - values.double()
    assert torch.equal(unit_in_last_place(values.double(), dtype), gap)


@pytest.mark.parametrize("dtype", HALVES)
def test_overflow_becomes_infinity_and_zero_keeps_its_sign(dtype: torch.dtype) -> None:
    values = torch.tensor([1e300, -1e300, 0.0, -0.0], dtype=torch.float64)
    result = round_to_nearest(values, dtype)
    assert result[:2].tolist() == [float("inf"), float("-inf")]
    assert torch.signbit(result).tolist() == [False, True, False, True]
