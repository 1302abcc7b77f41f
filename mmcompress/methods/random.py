"""Random tokens: the floor every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmcompress.method import VisualMethod
from mmcompress.registry import register
from mmcompress.types import Needs, Selection, VisualItem


@register("random", summary="A random subset, the same for every item of a size.", family="baseline")
@dataclass(frozen=True)
class Random(VisualMethod):
    """Keep a random subset drawn from the seed and the token count alone, so that batches cannot change it."""

    seed: int = 0

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Take the head of one fixed permutation, so that a smaller budget keeps a subset of a larger one."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(item), generator=generator)[:budget].sort().values
        return Selection(chosen.to(item.embeddings.device))
