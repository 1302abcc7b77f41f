"""The `keep` knob and the exact division of a budget."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcompress.budget import Budget, largest_remainder
from mmcompress.errors import SpecError

SIZES = st.lists(st.integers(0, 3000), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("keep", "available", "kept"),
    [
        (1, 576, 1),
        (1.0, 576, 576),
        (64, 576, 64),
        (600, 576, 576),
        (0.29, 100, 29),  # 0.29 * 100 < 29 in binary
        (0.07, 100, 7),
        (0.5, 7, 3),
        (0.999, 10, 9),
        (1e-6, 576, 1),
        (0.25, 2880, 720),
        (0.2, 0, 0),
        (5, 0, 0),
    ],
)
def test_tokens(keep: float, available: int, kept: int) -> None:
    assert Budget(keep).tokens(available) == kept


@given(st.decimals("0.0001", "1", places=4), st.integers(1, 100_000))
def test_a_fraction_floors_what_was_written_in_decimal(keep: Decimal, available: int) -> None:
    assert Budget(float(keep)).tokens(available) == max(1, math.floor(Fraction(keep) * available))


@given(st.integers(1, 9999), st.integers(0, 100_000))
def test_a_count_is_that_count(keep: int, available: int) -> None:
    assert Budget(keep).tokens(available) == min(keep, available)


@given(st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_a_larger_fraction_never_keeps_less(one: float, other: float, available: int) -> None:
    low, high = sorted((one, other))
    assert 1 <= Budget(low).tokens(available) <= Budget(high).tokens(available) <= available


@pytest.mark.parametrize(
    "keep",
    [0, -1, -64, 0.0, -0.5, 1.0001, 2.0, math.nan, math.inf, -math.inf, True, False, "0.5", None, [0.5], 1 + 0j],
)
def test_bad_values_are_named_with_what_is_allowed(keep: Any) -> None:
    with pytest.raises(SpecError, match="fraction") as failure:
        Budget(keep)
    assert str(keep) in str(failure.value)


@pytest.mark.parametrize("keep", [np.float32(0.5), np.int64(12), Fraction(1, 4)])
def test_foreign_numbers_become_plain_ones(keep: Any) -> None:
    plain = Budget(keep).keep
    assert type(plain) in (int, float)
    assert plain == keep


def test_one_token_and_all_tokens_are_different_budgets() -> None:
    assert type(Budget(1).keep) is int and type(Budget(1.0).keep) is float
    assert (str(Budget(1)), str(Budget(1.0))) == ("1", "1.0")


@pytest.mark.parametrize(("rate", "keep"), [(0.0, 1.0), (0.75, 0.25), (0.9, 0.1), (0.71, 0.29), (0, 1.0)])
def test_pruning_rate_is_what_is_removed(rate: float, keep: float) -> None:
    assert Budget.from_pruning_rate(rate) == Budget(keep)
    assert type(Budget.from_pruning_rate(rate).keep) is float


@pytest.mark.parametrize("rate", [1, 1.0, -0.1, math.nan, math.inf, True, False, "0.5", None])
def test_bad_pruning_rates(rate: Any) -> None:
    with pytest.raises(SpecError, match=r"pruning_rate must be a fraction in \[0, 1\)"):
        Budget.from_pruning_rate(rate)


@given(SIZES, st.data())
def test_largest_remainder_is_exact_and_fair(sizes: list[int], data: st.DataObject) -> None:
    total = data.draw(st.integers(0, sum(sizes)))
    shares = largest_remainder(total, sizes)
    assert sum(shares) == total
    for share, size in zip(shares, sizes, strict=True):
        quota = Fraction(total * size, max(sum(sizes), 1))
        assert math.floor(quota) <= share <= min(math.ceil(quota), size)


@given(SIZES, st.data())
def test_largest_remainders_get_what_is_left(sizes: list[int], data: st.DataObject) -> None:
    total, whole = data.draw(st.integers(0, sum(sizes))), max(sum(sizes), 1)
    shares = largest_remainder(total, sizes)
    remainders = [Fraction(total * size, whole) % 1 for size in sizes]
    raised = [share > total * size // whole for share, size in zip(shares, sizes, strict=True)]
    ranked = sorted(range(len(sizes)), key=lambda part: (-remainders[part], part))
    assert [raised[part] for part in ranked] == sorted(raised, reverse=True)


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [
        (1, [4, 4], [1, 0]),  # a tie goes to the earlier part
        (3, [4, 4], [2, 1]),
        (5, [10, 20, 30], [1, 2, 2]),
        (0, [3, 5], [0, 0]),
        (0, [], []),
        (0, [0, 0], [0, 0]),
        (8, [3, 5], [3, 5]),
    ],
)
def test_largest_remainder_examples(total: int, sizes: list[int], shares: list[int]) -> None:
    assert largest_remainder(total, sizes) == shares


def test_more_than_there_is_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="9 tokens over parts of 8"):
        largest_remainder(9, [3, 5])
