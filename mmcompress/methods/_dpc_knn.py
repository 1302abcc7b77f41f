"""Clustering by density peaks of nearest neighbours (DPC-kNN): a centre is dense, and far from anything denser."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(tokens: Tensor) -> Tensor:
    """Euclidean distances of `tokens` `[tokens, dim]` per square root of their width, float32 `[tokens, tokens]`."""
    # Without matrix products, in which the distance of close tokens is lost to rounding.
    values = tokens.float()
    return torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[1] ** 0.5


def peak_scores(distance: Tensor, neighbours: int) -> Tensor:
    """Local density times distance to the nearest denser token, `[tokens]`; for the densest, the largest distance.

    Args:
        distance: `[tokens, tokens]`.
        neighbours: so many nearest tokens, a token itself among them, make its density.
    """
    nearest = distance.topk(min(neighbours, len(distance)), largest=False).values
    density = (-nearest.square().mean(dim=1)).exp()
    denser = density > density[:, None]
    return density * torch.where(denser, distance, distance.max()).amin(dim=1)
