"""How sure an accuracy is. Questions about one image stand or fall together, so errors are clustered by image.

With scores x_i, their mean m over n questions and G images, the variance of m is

    G / (G - 1) / n^2 * sum over images of (sum over the image's questions of (x_i - m))^2

which is the plain s^2 / n when every image has one question. Intervals are m +- 1.96 standard errors. What is no mean,
such as F1 or the ratio of two runs, is resampled: all runs on the same images, drawn with replacement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NORMAL_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error; `error` is NaN when there are fewer than two clusters."""

    value: float
    error: float

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval."""
        return NORMAL_95 * self.error


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of `values`, of which those with equal `clusters` may be dependent.

    Raises:
        ValueError: there are no values, or not one cluster for each.
    """
    if not values:
        raise ValueError("no values")
    mean = sum(values) / len(values)
    residuals: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        residuals[cluster] += value - mean
    count = len(residuals)
    if count < 2:
        return Estimate(mean, math.nan)
    squares = sum(residual**2 for residual in residuals.values())
    return Estimate(mean, math.sqrt(count / (count - 1) * squares) / len(values))


def paired_difference(first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of `first` minus mean of `second` on the same questions; what both find hard cancels out.

    Raises:
        ValueError: there are no values, or the lengths differ.
    """
    return clustered_mean([a - b for a, b in zip(first, second, strict=True)], clusters)


def bootstrap_weights(clusters: Sequence[Hashable], samples: int, seed: int, chunk: int = 100) -> Iterator[np.ndarray]:
    """How often each question is in each resample of the clusters, in chunks `[at most chunk, questions]`."""
    numbers: dict[Hashable, int] = {}
    of_question = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    generator = np.random.default_rng(seed)
    for first in range(0, samples, chunk):
        drawn = generator.multinomial(
            len(numbers), np.full(len(numbers), 1 / len(numbers)), size=min(chunk, samples - first)
        )
        yield drawn[:, of_question].astype(float)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled `values`; NaN without any."""
    known = values[~np.isnan(values)]
    if known.size == 0:
        return math.nan, math.nan
    low, high = np.percentile(known, (2.5, 97.5))
    return float(low), float(high)
