"""Evenly spaced tokens: the strong baseline that sees nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmcompress.method import VisualMethod
from mmcompress.registry import register
from mmcompress.types import Needs, Selection, VisualItem


@register("uniform", summary="Evenly spaced tokens in raster order.", family="baseline")
@dataclass(frozen=True)
class Uniform(VisualMethod):
    """Keep token floor((i + 1/2) N / K) for i = 0..K-1."""

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Space `budget` tokens evenly over the item's raster order."""
        steps = torch.arange(budget, device=item.embeddings.device)
        return Selection((2 * steps + 1) * len(item) // (2 * budget))
