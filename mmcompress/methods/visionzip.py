"""VisionZip: keep what CLS attends to, and merge the rest into evenly spread contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from mmcompress.errors import SpecError
from mmcompress.merging import in_order, in_raster_order, merge_by_tile
from mmcompress.method import VisualMethod
from mmcompress.methods._attention import Score, attention, attention_needs
from mmcompress.ranking import tile_shares, top_indices
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, Space, VisualItem


@register(
    "visionzip",
    summary="Tokens with the most CLS attention, and contextual tokens into which the others merge.",
    family="merging",
    paper="VisionZip: Longer is Better but Not Necessary in Vision Language Models, arXiv:2412.04467",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class VisionZip(VisualMethod):
    """Dominant tokens by attention, contextual tokens by merging (Section 3).

    Dominant tokens have the most CLS attention in the layer whose output the LLM sees. Of the others, evenly spread
    ones become contextual tokens; each that is left joins the one with the most similar keys. A contextual token is
    the sum of its own features and the mean of what joined it, as in the authors' code. Tiles of one image are
    treated apart and share the budget by size. The authors let the CLS token through as one of the dominant tokens;
    here it is none.

    Args:
        score: "cls" reads the CLS token's row; "received" reads the attention a token receives from all tokens, for
            encoders without CLS.
        contextual: share of the budget that is contextual; default: 10 of 64, as in the paper.
        space: "pre_projector" merges the encoder's features, as published; "projected" merges projected tokens.
        compat: "official" orders tokens as the authors' code does: of a tile the dominant ones, then the contextual
            ones; of tiled images first all of the thumbnail, then all dominant ones of the crops in raster order, then
            the contextual ones crop by crop. No newline token enters the LLM. In transformers padding is removed in any
            case, so what of the budget goes to padding in the authors' code is not lost.
    """

    score: Score = "cls"
    contextual: float = 10 / 64
    space: Space = "pre_projector"
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.contextual <= 1:
            raise SpecError(f"visionzip: contextual={self.contextual} is out of range; use a share in [0, 1].")

    @property
    def newlines(self) -> bool:
        """Whether newline tokens stay."""
        return self.compat == "none"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """Attention and keys of the layer whose output is used, and the features or embeddings that are merged."""
        before = self.space == "pre_projector"
        scores = attention_needs(self.score, encoder)
        return replace(scores, key_metric=(encoder.used - 1,), features=before, embeddings=not before)

    def contextual_count(self, tokens: int) -> int:
        """How many of `tokens` outputs are contextual."""
        return round(tokens * self.contextual)

    def merge(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """The outputs in the authors' order: of every tile the dominant ones, then the contextual ones."""
        scores = attention(item, needs)
        keys = normalize(item.key_metric[needs.key_metric[0]].float(), dim=-1)
        return merge_by_tile(
            item.tiles, budget, lambda members, share: self._merge_tile(scores[members], keys[members], share)
        )

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Dominant and contextual tokens in raster order."""
        merged = self.merge(item, budget, needs)
        return self._in_official_order(merged, item, budget) if self.compat == "official" else in_raster_order(merged)

    def _in_official_order(self, merged: Selection, item: VisualItem, budget: int) -> Selection:
        """Dominant tokens of the crops of a tiled image by their places, before all contextual ones of the crops."""
        if item.crops is None:
            return merged
        shares = [share for _, share in tile_shares(item.tiles, budget)]
        dominant = torch.cat([torch.arange(share) < share - self.contextual_count(share) for share in shares])
        places = torch.where(dominant.to(merged.anchor.device), merged.anchor, len(item))
        return in_order(merged, places.masked_fill(item.tiles[merged.anchor] == 0, -1).argsort(stable=True))

    def _merge_tile(self, scores: Tensor, keys: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        contextual = self.contextual_count(budget)
        dominant = top_indices(scores, budget - contextual)
        left = torch.ones_like(scores, dtype=torch.bool)
        left[dominant] = False
        rest = torch.nonzero(left).flatten()
        targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
        anchor = torch.cat([dominant, targets])
        weight = torch.zeros(budget, len(scores), device=scores.device)
        weight[torch.arange(budget, device=scores.device), anchor] = 1
        if contextual:
            left[targets] = False
            others = torch.nonzero(left).flatten()
            joins = one_hot((keys[others] @ keys[targets].T).argmax(dim=-1), contextual).T.float()
            weight[len(dominant) :, others] = joins / joins.sum(dim=-1, keepdim=True).clamp(min=1)
        return anchor, weight
