"""Random entries: the floor every policy has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.kv_policy import Evictor, KVRow
from mmcompress.registry import register_policy


@register_policy("random", summary="A random subset of entries per head and layer.", family="baseline", stage="kv")
@dataclass(frozen=True)
class Random(Evictor):
    """Keep entries drawn from the seed, the layer and the number of heads and entries alone.

    Args:
        seed: of the draw.
    """

    seed: int = 0

    def score(self, row: KVRow) -> Tensor:
        """A draw for every entry."""
        generator = torch.Generator().manual_seed(self.seed * row.layers + row.layer)
        return torch.rand(row.place.shape, generator=generator).to(row.key.device)
