"""Entries that go merge into entries that stay."""

from __future__ import annotations

import torch
from torch import Tensor


def others(kept: Tensor, entries: int) -> Tensor:
    """Those of `entries` that are not among `kept`, ascending."""
    return torch.ones(entries, dtype=torch.bool, device=kept.device).index_fill(0, kept, False).nonzero()[:, 0]


def absorb(centres: Tensor, sources: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of every centre, which weighs one, and the sources that merge into it, in float32.

    Args:
        centres: `[centres, dim]`.
        sources: `[sources, dim]`.
        target: `[sources]`, the centre that each merges into.
        weight: `[sources]`, how much each weighs.
    """
    total = centres.float().index_add(0, target, sources.float() * weight[:, None])
    weights = torch.ones(len(centres), device=centres.device).index_add(0, target, weight)
    return total / weights[:, None]
