"""Sharing a budget out over layers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def in_proportion(total: int, weights: Sequence[float], least: int, most: int) -> list[int]:
    """Divide `total` in proportion to `weights`, exactly, so that every part is between `least` and `most`.

    Parts that would be out of bounds are put on the bound, and the others share what that leaves or takes.

    Raises:
        ValueError: within these bounds they cannot amount to `total`.
    """
    if not least * len(weights) <= total <= most * len(weights):
        raise ValueError(f"cannot share {total} over {len(weights)} parts of {least} to {most}")
    shares: dict[int, float] = {}
    free = dict(enumerate(weights))
    while free:
        rest, whole = total - sum(shares.values()), sum(free.values())
        ideal = {part: rest * weight / whole if whole else rest / len(free) for part, weight in free.items()}
        bounded = {part: min(max(share, least), most) for part, share in ideal.items()}
        excess = sum(bounded.values()) - sum(ideal.values())
        settled = [part for part in free if (bounded[part] - ideal[part]) * excess > 0] or list(free)
        for part in settled:
            shares[part] = bounded[part]
            del free[part]
    counts = [math.floor(shares[part]) for part in range(len(weights))]
    by_remainder = sorted(range(len(weights)), key=lambda part: (counts[part] - shares[part], part))
    for part in by_remainder[: total - sum(counts)]:
        counts[part] += 1
    return counts
