"""Rules that act within one encoder tile, over all tiles of an item."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmcompress.budget import largest_remainder


def choose_per_tile(tiles: Tensor, budget: int, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Kept indices, tile after tile, with `budget` shared over the tiles in proportion to their tokens, exactly.

    Args:
        tiles: `[tokens]`, the tile of each token.
        budget: tokens to keep in all.
        choose: given the indices of a tile's tokens, ascending, and its share (at least 1), the places among them of
            those it keeps, in the order it keeps them.
    """
    kept = []
    for tile, share in enumerate(largest_remainder(budget, torch.bincount(tiles).tolist())):
        if share:
            members = torch.nonzero(tiles == tile).flatten()
            kept.append(members[choose(members, share)])
    return torch.cat(kept)
