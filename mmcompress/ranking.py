"""Ranking tokens by a score, with the tie rule every method shares: the lower index wins."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.budget import largest_remainder


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of `scores` `[tokens]`, ascending."""
    ranked = torch.argsort(scores, descending=True, stable=True)
    return ranked[:count].sort().values


def top_indices_per_tile(scores: Tensor, tiles: Tensor, count: int) -> Tensor:
    """Like `top_indices`, with `count` shared over the tiles in proportion to their tokens, exactly."""
    sizes = torch.bincount(tiles).tolist()
    kept = []
    for tile, share in enumerate(largest_remainder(count, sizes)):
        members = torch.nonzero(tiles == tile).flatten()
        kept.append(members[top_indices(scores[members], share)])
    return torch.cat(kept).sort().values
