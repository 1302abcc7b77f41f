"""FasterVLM: keep what the CLS token attends to in the layer whose output the LLM sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmcompress.method import VisualMethod
from mmcompress.methods._attention import Score, attention, attention_needs
from mmcompress.ranking import top_indices_per_tile
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem


@register(
    "fastervlm",
    summary="Tokens with the most CLS attention in the last used encoder layer.",
    family="CLS-guided",
    paper="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster, "
    "arXiv:2412.01818v1",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class FasterVLM(VisualMethod):
    """Rank tokens by the CLS token's attention, averaged over heads.

    Tiles of one image are ranked apart and share the budget by size.

    Args:
        score: "cls" reads the CLS token's row; "received" reads the attention a token receives from all tokens, for
            encoders without CLS.
        compat: "official" lets no newline token into the LLM, as the authors' code does. In transformers padding is
            removed in any case, so what of the budget goes to padding in their code is not lost.
    """

    score: Score = "cls"
    compat: Literal["none", "official"] = "none"

    @property
    def newlines(self) -> bool:
        """Whether newline tokens stay."""
        return self.compat == "none"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The CLS row of the last used layer (or received attention of the last global one)."""
        return attention_needs(self.score, encoder)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the most attended tokens of every tile, in raster order."""
        return Selection(top_indices_per_tile(attention(item, needs), item.tiles, budget))
