"""ToDRE: tokens as unlike one another as possible, dropped inside the LLM once the question no longer needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.method import VisualMethod
from mmcompress.methods.todre_stage2 import ToDREStage2
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem


@register(
    "todre",
    summary="Greedy max-sum diversity from a CLS pivot; late in the LLM, all visual tokens go if little attended to.",
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
        parts: "first" leaves out the stage inside the LLM, `todre-stage2`.
    """

    objective: Literal["max-sum", "k-center"] = "max-sum"
    parts: Literal["both", "first"] = "both"

    @property
    def second_part(self) -> ToDREStage2 | None:
        """Stage 2 with the authors' threshold."""
        return ToDREStage2() if self.parts == "both" else None

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The CLS row of the last used layer, where the encoder has one, and the embeddings."""
        if "cls_rows" in encoder.missing:
            return Needs(embeddings=True)
        return Needs(cls_rows=(encoder.used - 1,), embeddings=True)

    def selection_orders(self, items: Sequence[VisualItem], budgets: Sequence[int], needs: Needs) -> list[Tensor]:
        """The kept tokens of every item in the order they were chosen, `[budget]`, pivot first."""
        pivots = [self._pivot(item, needs) for item in items]
        return ops.greedy_select([item.embeddings for item in items], budgets, pivots, self.objective)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the chosen tokens in raster order."""
        return self.select_batch([item], [budget], needs)[0]

    def select_batch(self, items: Sequence[VisualItem], budgets: Sequence[int], needs: Needs) -> list[Selection]:
        """Keep the chosen tokens of every item in raster order."""
        return [Selection(order.sort().values) for order in self.selection_orders(items, budgets, needs)]

    def _pivot(self, item: VisualItem, needs: Needs) -> Tensor:
        if needs.cls_rows:
            attention = item.cls_rows[needs.cls_rows[-1]].mean(dim=-1)
            if item.modality == "image":
                attention = torch.where(item.tiles == 0, attention, -torch.inf)
            return attention.argmax()
        tokens = torch.nn.functional.normalize(item.embeddings.float(), dim=-1)
        return (tokens @ tokens.mean(dim=0)).argmin()
