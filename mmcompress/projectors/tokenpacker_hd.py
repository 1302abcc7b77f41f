"""TokenPacker-HD: how a large image is cut into tiles, and how their tokens are read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from mmcompress.elastic import Elastic, ImageSize
from mmcompress.errors import SpecError
from mmcompress.projectors.tokenpacker import TokenPacker

# Grids with more than nine tiles, by the largest number of tiles a checkpoint was trained for; both orders are allowed.
_LARGER = {
    9: (),
    16: ((2, 5), (2, 6), (3, 4), (2, 7), (3, 5), (2, 8), (4, 4)),
    25: ((3, 6), (2, 9), (4, 5), (2, 10), (3, 7), (2, 11), (4, 6), (2, 12), (3, 8), (5, 5)),
}


class TokenPackerHD(Elastic):
    """Tiles in a grid of the image's aspect and an overview of them all, each of them packed like an image.

    Rows of tiles end with a newline and their tiles are parted by commas, in tokens of the prompt.

    Args:
        packer: what packs a tile.
        tiles: the largest number of tiles the checkpoint was trained for: 9, 16 or 25.
        pixels: side of a tile in pixels.

    Raises:
        SpecError: there is no such number of tiles.

    Source: TokenPacker: Efficient Visual Projector for Multimodal LLM, arXiv:2407.02392, section 3.3.
    """

    def __init__(self, packer: TokenPacker, tiles: int = 9, pixels: int = 336) -> None:
        if tiles not in _LARGER:
            raise SpecError(f"tokenpacker: tiles={tiles} must be one of {', '.join(map(str, _LARGER))}.")
        self.packer, self.pixels = packer, pixels
        self._grids = _grids(tiles)

    def budgets(self) -> Sequence[int]:
        return self.packer.budgets()

    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        self.require(budget)
        rows, columns = self.grid(image_size)
        tokens = rows * columns * budget + rows * (columns - 1) + rows
        return tokens + (budget + 1 if rows * columns > 1 else 0)

    def grid(self, image_size: ImageSize) -> tuple[int, int]:
        """Rows and columns of tiles: most of the canvas filled, then the best overlap with an enlarged image."""
        height, width = image_size
        side = self.pixels

        def score(grid: tuple[int, int]) -> float:
            rows, columns = grid
            ratio = min(side * rows / height, side * columns / width)
            filled = round(height * ratio) * round(width * ratio) / (side**2 * rows * columns)
            overlap = min(side * rows, 1.4 * height) * min(side * columns, 1.4 * width)
            union = side**2 * rows * columns + 1.96 * height * width - overlap + 1e-5
            return filled + 0.1 * overlap / union

        return max(self._grids, key=score)

    def cut(self, image: Tensor) -> Tensor:
        """Tiles of a normalised image `[channels, height, width]`: `[tiles, channels, pixels, pixels]`, overview last.

        The overview shows the canvas with its padding, squeezed to the aspect of the image, as models are trained to
        see it; a single tile has none.
        """
        size = (image.shape[1], image.shape[2])
        rows, columns = self.grid(size)
        canvas = self._fit(image, size, rows, columns)
        cells = canvas.unflatten(2, (columns, self.pixels)).unflatten(1, (rows, self.pixels))
        tiles = cells.permute(1, 3, 0, 2, 4).flatten(0, 1)
        return tiles if len(tiles) == 1 else torch.cat([tiles, self._fit(canvas, size, 1, 1)[None]])

    def join(self, tokens: Tensor, image_size: ImageSize, comma: Tensor, newline: Tensor) -> Tensor:
        """One image's tokens `[tiles, packed, hidden]` as the LLM reads them, with the separators `[hidden]`."""
        rows, columns = self.grid(image_size)
        parts: list[Tensor] = []
        for row in range(rows):
            for column in range(columns):
                last = column == columns - 1
                parts += [tokens[row * columns + column], (newline if last else comma)[None]]
        if rows * columns > 1:
            parts += [tokens[-1], newline[None]]
        return torch.cat(parts)

    def _fit(self, image: Tensor, size: ImageSize, rows: int, columns: int) -> Tensor:
        """`image` at the largest extent with the aspect of `size` in the canvas, at its top left, zeros elsewhere."""
        height, width = self.pixels * rows, self.pixels * columns
        ratio = min(height / size[0], width / size[1])
        fitted = (min(height, round(size[0] * ratio)), min(width, round(size[1] * ratio)))
        scaled = interpolate(image[None].float(), fitted, mode="bilinear", align_corners=False)[0].to(image.dtype)
        return pad(scaled, (0, width - fitted[1], 0, height - fitted[0]))


def _grids(tiles: int) -> list[tuple[int, int]]:
    """All `(rows, columns)` that are tried, fewest tiles first."""
    small = [(rows, columns) for rows in range(1, 10) for columns in range(1, 10) if rows * columns <= 9]
    larger = [grid for most, grids in _LARGER.items() if most <= tiles for grid in grids]
    both = {*small, *larger, *((columns, rows) for rows, columns in larger)}
    return sorted(both, key=lambda grid: (math.prod(grid), grid))
