"""Keeping a share of its own of every tile of an image cut into a thumbnail and crops.

Shares are worked out on the CPU, where float64 exists whatever the item's device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcompress.types import VisualItem


def tile_sizes(item: VisualItem) -> Tensor:
    """Tokens of the thumbnail and of each crop of a tiled image, `[1 + crops]`; padding may leave none of a crop."""
    assert item.crops is not None
    return torch.bincount(item.tiles.cpu(), minlength=1 + item.crops[0] * item.crops[1])


def plane_grids(item: VisualItem) -> tuple[tuple[int, int], tuple[int, int]]:
    """`(rows, columns)` of a tiled image's thumbnail and of its stitched crops, whichever comes first."""
    thumbnail = int(item.tiles[0] != 0)
    return item.grids[thumbnail], item.grids[1 - thumbnail]


def thumbnail_cells(item: VisualItem) -> tuple[Tensor, Tensor]:
    """Row `[rows, 1]` and column `[1, columns]` of the thumbnail's tokens."""
    rows, columns = plane_grids(item)[0]
    return torch.arange(rows)[:, None], torch.arange(columns)[None]


def top_of_every_tile(scores: Tensor, tiles: Tensor, shares: Tensor) -> Tensor:
    """Indices of the `shares` `[tiles]` highest of `scores` `[tokens]` in each tile, ascending."""
    shares = shares.to(tiles.device)
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(tiles[order], stable=True)]
    sizes = torch.bincount(tiles, minlength=len(shares))
    rank = torch.arange(len(tiles), device=tiles.device) - (sizes.cumsum(0) - sizes)[tiles[order]]
    return order[rank < shares[tiles[order]]].sort().values
