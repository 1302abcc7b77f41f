"""How much stays: the `keep` knob and exact division of a budget over parts of an item."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

from mmcompress.errors import SpecError

# 0.29 * 100 is 28.999999999999996 in binary floating point; the fraction the user wrote is meant.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Budget:
    """Tokens to keep per item: a float in (0, 1] is a fraction, an int >= 1 a count (so `1` is one token, `1.0` all).

    Args:
        keep: the fraction or the count.
        average: whether that is the mean over all LLM layers, not what the last one has left.

    Raises:
        SpecError: the value is of another type, not finite, or out of range.
    """

    keep: int | float
    average: bool = False

    def __post_init__(self) -> None:
        value, name = self.keep, "keep_avg" if self.average else "keep"
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise SpecError(f"{name} must be a fraction in (0, 1] or a token count >= 1, got {value!r}.")
        if isinstance(value, numbers.Integral):
            if value < 1:
                raise SpecError(f"{name}={value} is no token count: use an integer >= 1, or a fraction in (0, 1].")
            object.__setattr__(self, "keep", int(value))
            return
        if not (math.isfinite(value) and 0.0 < value <= 1.0):
            raise SpecError(
                f"{name}={value} is out of range: a float is a fraction in (0, 1]; write an integer for a token count."
            )
        object.__setattr__(self, "keep", float(value))

    @classmethod
    def from_pruning_rate(cls, rate: float) -> Budget:
        """The budget that removes the fraction `rate` in [0, 1) of the tokens (vLLM's name for the knob)."""
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0.0 <= rate < 1.0:
            raise SpecError(f"pruning_rate must be a fraction in [0, 1), got {rate!r}.")
        return cls(round(1.0 - float(rate), 12))

    def tokens(self, available: int) -> int:
        """Tokens kept of an item that has `available`: a pure function, at least one, never more than there are."""
        if isinstance(self.keep, int):
            return min(self.keep, available)
        return min(available, max(1, math.floor(self.keep * available + _ROUNDING)))

    @property
    def option(self) -> dict[str, int | float]:
        """The budget as it is written."""
        return {"keep_avg" if self.average else "keep": self.keep}

    def __str__(self) -> str:
        return repr(self.keep)


def largest_remainder(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide `total` tokens over parts in proportion to their `sizes`, exactly; ties go to the earlier part.

    Raises:
        ValueError: `total` exceeds the sum of `sizes`.
    """
    whole = sum(sizes)
    if total > whole:
        raise ValueError(f"cannot share {total} tokens over parts of {whole} in all")
    if whole == 0:
        return [0] * len(sizes)
    shares = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(total * sizes[i] % whole), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def require_ratios(name: str, ratios: Sequence[float], removals: int) -> None:
    """Refuse shares that are not one for each of `removals` but the last, or do not descend within (0, 1]."""
    if len(ratios) != removals - 1:
        raise SpecError(
            f"{name}: ratios={list(ratios)} must be {removals - 1}, one for every removal but the last, whose share is "
            "keep."
        )
    if list(ratios) != sorted(set(ratios), reverse=True) or not all(0 < ratio <= 1 for ratio in ratios):
        raise SpecError(f"{name}: ratios={list(ratios)} must descend within (0, 1], as in [0.5, 0.25].")


def left_by(ratios: Sequence[float], tokens: int, keep: int) -> list[int]:
    """Every share of `tokens` rounded down, at least `keep`, and `keep` at the end."""
    return [*(max(keep, Budget(float(ratio)).tokens(tokens)) for ratio in ratios), keep]
