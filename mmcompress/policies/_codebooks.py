"""What KVQuant learns of a model: thresholds of keys, and centroids by weighted k-means (Section 3)."""

from __future__ import annotations

from math import ceil, floor

import torch
from torch import Tensor

from mmcompress.policies._calibration import BITS, LayerCalibration

ROUNDS, STARTS = 50, 8


def calibrated(
    keys: Tensor, key_weights: Tensor, values: Tensor, value_weights: Tensor, bits: int, outliers: float, seed: int = 0
) -> LayerCalibration:
    """Thresholds and centroids of one layer.

    Args:
        keys: `[tokens, channels]` before rotation, channels of all KV heads, head after head.
        key_weights: how much an error in each matters, the squared gradient of the loss.
        values: likewise.
        value_weights: likewise.
        bits: of a code.
        outliers: the fraction of a channel's keys or a token's values that are outliers, half of them low.
        seed: of the centroids that are tried first.
    """
    lower, upper = ends(keys, outliers, dim=0)
    low, high = ends(values, outliers, dim=1)
    return LayerCalibration(
        lower.flatten(),
        upper.flatten(),
        centroids(*between(keys, key_weights, lower, upper), bits, seed),
        centroids(*between(values, value_weights, low, high), bits, seed),
    )


def ends(states: Tensor, outliers: float, dim: int) -> tuple[Tensor, Tensor]:
    """Below and above which states are outliers, along `dim`, which stays."""
    ordered = states.float().movedim(dim, -1).sort(dim=-1).values
    lower, upper = (quantile(ordered, share).movedim(-1, dim) for share in (outliers / 2, 1 - outliers / 2))
    return lower, upper


def quantile(ordered: Tensor, share: float) -> Tensor:
    """The value with `share` of `ordered` below it, `[..., 1]`; `torch.quantile` takes no large tensors."""
    place = share * (ordered.shape[-1] - 1)
    below, above = (ordered[..., end : end + 1] for end in (floor(place), ceil(place)))
    return below.lerp(above, place - floor(place))


def between(states: Tensor, weights: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """States that are no outliers, stretched to [-1, 1], and their weights; a list of either."""
    middle, half = (upper + lower) / 2, (upper - lower) / 2
    stretched = (states.float() - middle) / half.masked_fill(half == 0, 1)
    here = stretched.abs() <= 1
    return stretched[here], weights.float()[here]


def centroids(points: Tensor, weights: Tensor, bits: int, seed: int = 0) -> Tensor:
    """The 2 ** `bits` numbers, rising, that `points` are nearest to: the best of a few weighted k-means."""
    points, order = points.double().sort()
    weights = weights.double()[order]
    weights = weights if bool(weights.any()) else torch.ones_like(weights)
    mass, moment = (torch.cat([part.new_zeros(1), part.cumsum(0)]) for part in (weights, weights * points))
    generator = torch.Generator().manual_seed(seed)
    count = {bits: count for count, bits in BITS.items()}[bits]
    tried = []
    for start in range(STARTS):
        # Quantiles of the weight first; then, as they may be far from the best, draws.
        shares = (torch.arange(count) + 0.5) / count if start == 0 else torch.rand(count, generator=generator)
        found = torch.searchsorted(mass[1:], shares.to(mass) * mass[-1]).clamp(max=len(points) - 1)
        centres = points[found].sort().values
        for _ in range(ROUNDS):
            edges = torch.searchsorted(points, (centres[1:] + centres[:-1]) / 2)
            edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(points))])
            held, sums = mass[edges].diff(), moment[edges].diff()
            centres = torch.where(held > 0, sums / held, centres)
        tried.append(centres)
    return min(tried, key=lambda centres: float(error(points, weights, centres))).float()


def error(points: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    """The weighted mean square of the way from each of `points` to the nearest centre."""
    nearest = centres[torch.bucketize(points, (centres[1:] + centres[:-1]) / 2)]
    return (weights * (points - nearest) ** 2).sum() / weights.sum()
