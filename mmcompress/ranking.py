"""Ranking tokens by a score, with the tie rule every method shares: the lower index wins."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mmcompress.budget import largest_remainder


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest of `scores` `[..., tokens]`, ascending."""
    ranked = torch.argsort(scores, descending=True, stable=True)
    return ranked[..., :count].sort().values


def tile_shares(tiles: Tensor, budget: int) -> Iterator[tuple[Tensor, int]]:
    """Indices of each tile's tokens, ascending, and its share of `budget`, by size; tiles without one are left out.

    Args:
        tiles: `[tokens]`, the tile of each token.
        budget: tokens to keep in all.
    """
    sizes = torch.bincount(tiles).tolist()
    members = tiles.argsort(stable=True).split(sizes)
    for here, share in zip(members, largest_remainder(budget, sizes), strict=True):
        if share:
            yield here, share


def choose_per_tile(tiles: Tensor, budget: int, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Kept indices, tile after tile.

    Args:
        tiles: `[tokens]`, the tile of each token.
        budget: tokens to keep in all, at least one.
        choose: given the indices of a tile's tokens and its share, the places among them of those it keeps, in the
            order it keeps them.
    """
    return torch.cat([members[choose(members, share)] for members, share in tile_shares(tiles, budget)])


def top_indices_per_tile(scores: Tensor, tiles: Tensor, count: int) -> Tensor:
    """Like `top_indices`, with `count`, at least one, shared over the tiles in proportion to their tokens, exactly."""
    return choose_per_tile(tiles, count, lambda members, share: top_indices(scores[members], share)).sort().values
