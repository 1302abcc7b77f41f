"""DivPrune: the tokens whose smallest distance to one another is as large as greedy choice can make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmcompress import ops
from mmcompress.method import VisualMethod
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem


@register(
    "divprune",
    summary="Greedy max-min diversity of the tokens, by cosine distance.",
    family="diversity",
    paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, arXiv:2503.02175",
    licence="CC BY-NC 4.0",
)
@dataclass(frozen=True)
class DivPrune(VisualMethod):
    """Start from the token farthest from its nearest other one, then add the farthest from all chosen (Algorithm 1).

    All tiles of an image, or frames of a clip, are one pool.
    """

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The embeddings, which are compared with one another."""
        return Needs(embeddings=True)

    def selection_orders(self, items: Sequence[VisualItem], budgets: Sequence[int]) -> list[Tensor]:
        """The kept tokens of every item in the order they were chosen, `[budget]`."""
        return ops.greedy_select([item.embeddings for item in items], budgets, None, "k-center")

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the chosen tokens in raster order."""
        return self.select_batch([item], [budget], needs)[0]

    def select_batch(self, items: Sequence[VisualItem], budgets: Sequence[int], needs: Needs) -> list[Selection]:
        """Keep the chosen tokens of every item in raster order."""
        return [Selection(order.sort().values) for order in self.selection_orders(items, budgets)]
