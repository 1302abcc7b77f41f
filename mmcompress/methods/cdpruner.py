"""CDPruner: tokens that span the most volume together, each as long as it is relevant to the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress import ops
from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.ranking import tile_shares
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

OFFSET = 1e-6


@register(
    "cdpruner",
    summary="Greedy determinantal point process, conditioned on the question.",
    family="diversity",
    paper="Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, "
    "arXiv:2506.10967",
    licence="Apache-2.0",
    requires=("text_tower", "relevance"),
)
@dataclass(frozen=True)
class CDPruner(VisualMethod):
    """Greedy MAP of a determinantal point process over projected tokens, with the kernel r_i cos(i, j) r_j (Section 3).

    The paper's relevance r needs the text tower of the CLIP that the vision encoder comes from: give `text_tower`, or
    say by `relevance` what to do without. Tiles of one image are treated apart and share the budget by size; their
    relevance is scaled to 0..1 together.

    Args:
        text_tower: folder of a CLIP model. Its similarity of patches to the question counts negatively, since patches
            of CLIP are the less like a text the more they show of it.
        relevance: what r is without a text tower: "constant" drops the condition: r = 1, the question is not
            read; "text" compares tokens with the LLM's own embeddings of the prompt's text, which is not the paper's.
        compat: "official" scales relevance over all items of a batch together.
    """

    text_tower: str | None = None
    relevance: Literal["constant", "text", None] = None
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if self.text_tower is not None and self.relevance is not None:
            raise SpecError(f"cdpruner: text_tower and relevance={self.relevance!r} exclude each other; give one.")

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The embeddings, and what relevance is told by."""
        reads_tower = self.text_tower is not None
        return Needs(features=reads_tower, text=self.relevance == "text", text_tower=self.text_tower, embeddings=True)

    def similarity(self, item: VisualItem) -> Tensor:
        """How much each token has to do with the question, on any scale, `[tokens]`."""
        if self.text_tower is not None:
            assert item.relevance is not None
            return -item.relevance.mean(dim=0)
        if self.relevance == "text":
            assert item.text is not None
            words = normalize(item.text.float(), dim=-1)
            return normalize(item.embeddings.float(), dim=-1) @ words.sum(dim=0) / max(len(words), 1)
        return torch.zeros(len(item), device=item.embeddings.device)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the tokens of the greedy choice, in raster order."""
        return self.select_batch([item], [budget], needs)[0]

    def select_batch(self, items: Sequence[VisualItem], budgets: Sequence[int], needs: Needs) -> list[Selection]:
        """Keep the tokens of the greedy choice within each tile, in raster order."""
        similarities = [self.similarity(item) for item in items]
        scales = [torch.cat(similarities)] * len(items) if self.compat == "official" and items else similarities
        relevance = [_scaled(similarity, scale) for similarity, scale in zip(similarities, scales, strict=True)]
        shares = [tile_shares(item.tiles, budget) for item, budget in zip(items, budgets, strict=True)]
        tiles = [(i, members, share) for i, of_item in enumerate(shares) for members, share in of_item]
        orders = ops.dpp_select(
            [items[i].embeddings[members] for i, members, _ in tiles],
            [relevance[i][members] for i, members, _ in tiles],
            [share for *_, share in tiles],
        )
        kept: list[list[Tensor]] = [[] for _ in items]
        for (i, members, _), order in zip(tiles, orders, strict=True):
            kept[i].append(members[order])
        return [Selection(torch.cat(of_item).sort().values) for of_item in kept]


def _scaled(similarity: Tensor, among: Tensor) -> Tensor:
    """`similarity` on the scale where the lowest and the highest `among` are 0 and 1; 1 if all are alike."""
    low, high = among.aminmax()
    return (similarity - low + OFFSET) / (high - low) if high > low else torch.ones_like(similarity)
