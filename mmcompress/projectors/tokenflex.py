"""TokenFLEX: tokens resized and pooled to any square, then a gated projection."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, silu

from mmcompress.elastic import ElasticProjector, ImageSize


class TokenFLEX(ElasticProjector):
    """Average pooling to a square of tokens ahead of SwiGLU; the LLM is trained for several of them.

    Where the target does not divide the grid, the grid is first enlarged to the next multiple.

    Args:
        side: patches along one side of a tile.
        width: width of the vision features.
        hidden: width of the LLM.

    Source: TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference, arXiv:2504.03154, section 3.
    """

    def __init__(self, side: int = 27, width: int = 1152, hidden: int = 2048) -> None:
        super().__init__()
        self.side = side
        self.mlp = nn.ModuleDict(
            {
                "layernorm": nn.LayerNorm(width),
                "f1": nn.Linear(width, 3 * width),
                "f2": nn.Linear(width, 3 * width),
                "g": nn.Linear(3 * width, hidden),
            }
        )

    def budgets(self) -> Sequence[int]:
        return tuple(side**2 for side in range(1, self.side + 1))

    def tokens_for(self, image_size: ImageSize, budget: int) -> int:
        self.require(budget)
        return budget

    def forward(self, features: Tensor, budget: int) -> Tensor:
        """`[tiles, side * side, width]` -> `[tiles, budget, hidden]`.

        Raises:
            SpecError: `budget` is no square, or more than there are patches.
        """
        self.require(budget)
        target = math.isqrt(budget)
        size = -(-self.side // target) * target
        grid = features.transpose(1, 2).unflatten(2, (self.side, self.side))
        if size != self.side:
            grid = interpolate(grid, (size, size), mode="bilinear", align_corners=True)
        pooled = avg_pool2d(grid, size // target).flatten(2).transpose(1, 2)
        normed = self.mlp["layernorm"](pooled)
        return self.mlp["g"](silu(self.mlp["f1"](normed)) * self.mlp["f2"](normed))
