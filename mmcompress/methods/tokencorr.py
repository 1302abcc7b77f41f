"""TokenCorr: what CLS singles out in a deep layer, and what does not repeat itself in a low one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress.budget import largest_remainder
from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.methods._attention import Score, attention
from mmcompress.methods.prumerge import outlier_ratio
from mmcompress.ranking import choose_per_tile
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

_DEPTH, _LOW_LAYER = 24, 2
_ROWS_AT_ONCE = 1024


@register(
    "tokencorr",
    summary="Experimental: outliers of deep CLS attention, and non-redundant tokens by that of a low layer.",
    family="CLS-guided diversity",
    paper="Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding, "
    "arXiv:2407.14439",
)
@dataclass(frozen=True)
class TokenCorr(VisualMethod):
    """Global tokens and local ones of every tile, side by side.

    Global tokens are those whose attention from CLS in a deep layer lies over 1.5 interquartile ranges above the upper
    quartile. There are as many local ones as the information density of a tile, its share of tokens that repeat no
    other, times its tokens. So far the paper; not its own, but chosen here are:

    - the layers: the last used one as the deep one, layer 2 of 24 as the low one;
    - redundancy: a token is redundant if its key in the low layer, averaged over heads, has a cosine above `threshold`
      with that of one before it;
    - the budget: global and local tokens share it in proportion to their numbers above. First come global ones, most
      attended in the deep layer; then the non-redundant among the others, most attended in the low layer, where the
      paper draws them at random by that attention; where these run out, others most attended in the deep layer;
    - tiles: they share the budget by size, the thumbnail as one of them, which the paper leaves whole.

    Args:
        threshold: cosine above which a token repeats another, between 0 and 1.
        score: "cls" reads the CLS token's rows, averaged over heads; "received" reads the attention a token receives
            from all tokens, for encoders without CLS, in the layers nearest to these that attend to the whole image.
    """

    threshold: float = 0.9
    score: Score = "cls"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise SpecError(f"tokencorr: threshold={self.threshold} must be in [0, 1].")

    def needs(self, encoder: EncoderFacts) -> Needs:
        """Attention in the low and the deep layer (one, if they are the same), and the keys of the low one."""
        low, deep = encoder.scale_layer(_LOW_LAYER, _DEPTH), encoder.used - 1
        if self.score == "cls":
            return Needs(cls_rows=tuple(sorted({low, deep})), key_metric=(low,))
        low = min(encoder.global_layers, key=lambda layer: abs(layer - low))
        return Needs(received_attention=tuple(sorted({low, encoder.global_layers[-1]})), key_metric=(low,))

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep global and local tokens of every tile, in raster order."""
        deep = attention(item, needs)
        low = attention(item, Needs(cls_rows=needs.cls_rows[:1], received_attention=needs.received_attention[:1]))
        unit = normalize(item.key_metric[needs.key_metric[0]].float(), dim=-1)

        def choose(members: Tensor, share: int) -> Tensor:
            redundant = repeats(unit[members], self.threshold)
            return _ranked(deep[members], low[members], redundant, share)[:share]

        return Selection(choose_per_tile(item.tiles, budget, choose).sort().values)


def repeats(unit: Tensor, threshold: float) -> Tensor:
    """Whether a token is like one before it: of `unit` `[tokens, dim]`, their product is above `threshold`."""
    places = torch.arange(len(unit), device=unit.device)
    blocks = [
        (unit[rows] @ unit.T > threshold).logical_and(places < rows[:, None]).any(dim=1)
        for rows in places.split(_ROWS_AT_ONCE)
    ]
    return torch.cat(blocks)


def _ranked(deep: Tensor, low: Tensor, redundant: Tensor, budget: int) -> Tensor:
    """All tokens of a tile: global ones in their share of `budget`, then non-redundant ones, then the rest."""
    numbers = [round(outlier_ratio(deep) * len(deep)), int((~redundant).sum())]
    outliers, _ = largest_remainder(min(budget, sum(numbers)), numbers)
    precedence = (~redundant).long()
    precedence[deep.argsort(descending=True, stable=True)[:outliers]] = 2
    by_attention = torch.where(redundant, deep, low).argsort(descending=True, stable=True)
    return by_attention[precedence[by_attention].argsort(descending=True, stable=True)]
