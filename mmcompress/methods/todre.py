"""ToDRE, first stage: tokens as unlike one another as possible, grown from the one CLS attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.method import VisualMethod
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem


@register(
    "todre",
    summary="Greedy max-sum diversity from a CLS pivot (first stage, before the LLM).",
    family="diversity",
    paper="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance, arXiv:2505.18757v2",
)
@dataclass(frozen=True)
class ToDRE(VisualMethod):
    """Greedy diversity over projected tokens (Algorithm 1), starting from a pivot.

    The pivot is the token with the most CLS attention in the last used layer, among the thumbnail's tokens when the
    image is tiled; without a CLS token it is the token farthest from the mean.

    Args:
        objective: "max-sum" minimises the summed similarity to the chosen tokens (paper, v2); "k-center" the largest.
    """

    objective: Literal["max-sum", "k-center"] = "max-sum"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The CLS row of the last used layer, where the encoder has one, and the embeddings."""
        if "cls_rows" in encoder.missing:
            return Needs(embeddings=True)
        return Needs(cls_rows=(encoder.used - 1,), embeddings=True)

    def selection_order(self, item: VisualItem, budget: int, needs: Needs) -> Tensor:
        """The kept tokens in the order they were chosen, `[budget]`, pivot first."""
        return ops.greedy_select(item.embeddings, budget, self._pivot(item, needs), self.objective)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the chosen tokens in raster order."""
        return Selection(self.selection_order(item, budget, needs).sort().values)

    def _pivot(self, item: VisualItem, needs: Needs) -> Tensor:
        if needs.cls_rows:
            attention = item.cls_rows[needs.cls_rows[-1]].mean(dim=-1)
            if item.modality == "image":
                attention = torch.where(item.tiles == 0, attention, -torch.inf)
            return attention.argmax()
        tokens = torch.nn.functional.normalize(item.embeddings.float(), dim=-1)
        return (tokens @ tokens.mean(dim=0)).argmin()
