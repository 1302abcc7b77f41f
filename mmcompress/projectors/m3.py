"""M3: nested average pooling of what the projector made of each tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool2d

from mmcompress.elastic import ElasticProjector, ImageSize
from mmcompress.errors import SpecError
from mmcompress.projectors._anyres import best_resolution, stitch, stitched_tokens


class M3(ElasticProjector):
    """Average pooling of projected tokens; it has no weights, the model around it is trained for all its scales.

    Each scale is a number of tokens per tile. LLaVA-NeXT's tiles are pooled one by one before they are stitched,
    un-padded and given newlines, so that an image's count is no fixed share of the full one.

    Args:
        side: patches along one side of a tile.
        scales: tokens per tile the model was trained for, squares; by default those of halving the side while it is
            even, and one.
        resolutions: `(height, width)` an image may be cut to, of models that see tiles; none if it is one tile.
        tile: pixels along one side of a tile; read only where there are `resolutions`.
        compat: "official" takes any scale and pools by int(sqrt(side^2 / scale)), which may give another count.

    Raises:
        SpecError: a scale is no square of a divisor of the side.

    Source: Matryoshka Multimodal Models, arXiv:2405.17430, section 3.
    """

    def __init__(
        self,
        side: int = 24,
        scales: Sequence[int] = (),
        resolutions: Sequence[ImageSize] = (),
        tile: int = 336,
        compat: Literal["none", "official"] = "none",
    ) -> None:
        super().__init__()
        self.side, self.resolutions, self.tile, self.compat = side, resolutions, tile, compat
        self.scales = tuple(sorted({*scales})) or nested(side)
        possible = [n * n for n in range(1, side + 1) if side % n == 0]
        if wrong := [scale for scale in self.scales if scale not in possible]:
            allowed = ", ".join(map(str, possible))
            raise SpecError(f"m3 cannot pool {side}x{side} tokens evenly to {wrong[0]}: scales can be {allowed}.")

    def budgets(self) -> Sequence[int]:
        return self.scales if self.compat == "none" else range(1, self.side**2 + 1)

    def kernel(self, budget: int) -> int:
        """Side of the square of tokens that is averaged.

        Raises:
            SpecError: `budget` is none of `budgets()`.
        """
        self.require(budget)
        return int((self.side**2 / budget) ** 0.5)

    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        pooled = self.side // self.kernel(budget)
        return stitched_tokens(pooled, self.crops(image_size), image_size) if self.resolutions else pooled**2

    def crops(self, image_size: ImageSize) -> tuple[int, int]:
        """Rows and columns of the crops of an image."""
        height, width = best_resolution(image_size, self.resolutions)
        return height // self.tile, width // self.tile

    def forward(self, features: Tensor, budget: int) -> Tensor:
        """Pool every tile: `[tiles, side * side, hidden]` -> `[tiles, pooled, hidden]`.

        Raises:
            SpecError: `budget` is none of `budgets()`.
        """
        grids = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        return avg_pool2d(grids, self.kernel(budget)).flatten(2).transpose(1, 2)

    def join(self, tiles: Tensor, image_size: ImageSize, newline: Tensor) -> Tensor:
        """One image's pooled `tiles` `[1 + crops, pooled, hidden]` as the LLM reads them `[tokens, hidden]`."""
        return stitch(tiles, self.crops(image_size), image_size, newline)


def nested(side: int) -> tuple[int, ...]:
    """The paper's scales, where the side is 24: 1, 9, 36, 144 and 576."""
    sides = [side]
    while sides[-1] % 2 == 0:
        sides.append(sides[-1] // 2)
    return tuple(sorted({1, *(side * side for side in sides)}))
