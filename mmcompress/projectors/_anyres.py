"""Images cut into tiles behind an overview, as LLaVA-NeXT lays them out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcompress.elastic import ImageSize


def best_resolution(image_size: ImageSize, resolutions: Sequence[ImageSize]) -> ImageSize:
    """The resolution that holds most of the image's pixels, then the one that wastes least; the first of equals."""
    height, width = image_size

    def fit(resolution: ImageSize) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        held = min(int(width * scale) * int(height * scale), width * height)
        return held, held - resolution[0] * resolution[1]

    return max(resolutions, key=fit)


def unpadded(grid: tuple[int, int], image_size: ImageSize) -> tuple[slice, slice]:
    """The rows and columns of `grid` that an image of `image_size` fills when it is centred there, aspect kept."""
    (rows, columns), (height, width) = grid, image_size
    if width / height > columns / rows:
        padding = (rows - _whole(height * (columns / width))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - _whole(width * (rows / height))) // 2
    return slice(0, rows), slice(padding, columns - padding)


def _whole(length: float) -> int:
    return int(round(length, 7))  # as transformers counts: 32.9999999999 is 33


def stitch(tiles: Tensor, crops: tuple[int, int], image_size: ImageSize, newline: Tensor) -> Tensor:
    """One image's tokens in the order the LLM reads them.

    Args:
        tiles: `[1 + crops, side * side, hidden]`, the overview first.
        crops: `(rows, columns)` of the crops.
        image_size: what they were cut from.
        newline: `[hidden]`, which ends every row of the stitched crops.

    Returns:
        `[tokens, hidden]`: the overview, then the stitched crops without padding, row by row.
    """
    rows, columns = crops
    side, hidden = round(tiles.shape[1] ** 0.5), tiles.shape[2]
    mosaic = tiles[1:].view(rows, columns, side, side, hidden).transpose(1, 2)
    mosaic = mosaic.reshape(rows * side, columns * side, hidden)
    mosaic = mosaic[unpadded((rows * side, columns * side), image_size)]
    ends = newline.to(mosaic).expand(len(mosaic), 1, hidden)
    return torch.cat([tiles[0], torch.cat([mosaic, ends], dim=1).flatten(0, 1)])


def stitched_tokens(side: int, crops: tuple[int, int], image_size: ImageSize) -> int:
    """How many tokens `stitch` gives for tiles of `side` by `side`."""
    grid = (side * crops[0], side * crops[1])
    rows, columns = unpadded(grid, image_size)
    return side**2 + len(range(grid[0])[rows]) * (len(range(grid[1])[columns]) + 1)
