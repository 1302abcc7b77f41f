"""LLaVA-PruMerge: keep what CLS attends to, each kept token absorbing its most similar neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress.errors import SpecError
from mmcompress.merging import in_raster_order, merge_by_tile
from mmcompress.method import VisualMethod
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, Space, VisualItem


@register(
    "prumerge",
    summary="Tokens with the most CLS attention, each absorbing its nearest neighbours, and one pooled token.",
    family="merging",
    paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, arXiv:2403.15388",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class PruMerge(VisualMethod):
    """Prune by the attention `a` of CLS in the last encoder layer, then merge (Section 3).

    A kept token becomes `x_i + sum of a_j x_j` over the tokens with the most similar keys; one more output pools what
    was dropped, `sum of a_j x_j`, at the place of the most attended of these. A budget of K is K - 1 kept tokens and
    the pooled one (K = 1 pools everything). Tiles of one image are treated apart and share the budget by size.

    Args:
        neighbours: how many tokens each kept one absorbs, fewer where there are fewer.
        space: "pre_projector" merges the encoder's features, as published; "projected" merges projected tokens.
        compat: "official" keeps as many tokens as have outlying attention by the interquartile rule, at most the
            budget, most attended first.
    """

    neighbours: int = 32
    space: Space = "pre_projector"
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise SpecError(f"{self.info.name}: neighbours={self.neighbours} is out of range; use a count >= 0.")

    @property
    def exact_count(self) -> bool:
        """False for the authors' adaptive count."""
        return self.compat == "none"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The full-width CLS row and the keys of the last layer, and the features or embeddings that are merged."""
        last = (encoder.depth - 1,)
        before = self.space == "pre_projector"
        return Needs(cls_rows_full_width=last, keys=last, features=before, embeddings=not before)

    def kept(self, attention: Tensor, budget: int) -> Tensor:
        """The tokens of a tile that are kept beside the pooled one, most attended first, `[at most budget - 1]`."""
        count = budget - 1
        if self.compat == "official":
            count = min(count, int(len(attention) * outlier_ratio(attention)))
        return attention.argsort(descending=True, stable=True)[:count]

    def merge(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """The outputs in the authors' order: of every tile the kept ones, then the pooled one."""
        attention = item.cls_rows_full_width[needs.cls_rows_full_width[0]].float()
        keys = normalize(item.keys[needs.keys[0]].float(), dim=-1)
        return merge_by_tile(
            item.tiles, budget, lambda members, share: self._merge_tile(attention[members], keys[members], share)
        )

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Kept and pooled tokens in raster order, or as the authors' code leaves them."""
        merged = self.merge(item, budget, needs)
        return merged if self.compat == "official" else in_raster_order(merged)

    def _merge_tile(self, attention: Tensor, keys: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        kept = self.kept(attention, budget)
        rows = torch.arange(len(kept), device=kept.device)
        closeness = keys[kept] @ keys.T
        closeness[rows, kept] = -torch.inf
        near = closeness.argsort(dim=-1, descending=True, stable=True)[:, : min(self.neighbours, len(attention) - 1)]
        absorbed = torch.zeros_like(closeness).scatter(-1, near, attention[near])
        absorbed[rows, kept] = 1
        dropped = torch.ones_like(attention).index_fill(0, kept, 0)
        pooled = attention.masked_fill(dropped == 0, -torch.inf).argmax()
        return torch.cat([kept, pooled[None]]), torch.cat([absorbed, (attention * dropped)[None]])


def outlier_ratio(attention: Tensor) -> float:
    """The share of tokens whose `attention` `[tokens]` is over 1.5 interquartile ranges above the upper quartile."""
    first, third = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    return int((attention > third + 1.5 * (third - first)).sum()) / len(attention)
