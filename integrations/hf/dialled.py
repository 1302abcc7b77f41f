"""What stands in the place of a model's projector if that has a dial."""

from __future__ import annotations

import math

from torch import Tensor, nn

from mmcompress.elastic import ElasticProjector
from mmcompress.projectors.mqt import MQT


class DialledProjector(nn.Module):
    """An elastic projector at the budget in force.

    Args:
        projector: what makes the tokens.
        norm: what normalises the features first, if anything.
    """

    def __init__(self, projector: ElasticProjector, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.projector = projector
        self.norm = nn.Identity() if norm is None else norm
        self.budget = projector.budgets()[-1]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens; queries have no place in the image, and stand in one row."""
        if isinstance(self.projector, MQT):
            return 1, self.budget
        side = math.isqrt(self.budget)
        return side, side

    def forward(self, features: Tensor) -> Tensor:
        """`[images, patches, width]` -> `[images, budget, hidden]`."""
        return self.projector(self.norm(features), self.budget)
