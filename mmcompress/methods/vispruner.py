"""VisPruner: important tokens by attention, and diverse ones left over after duplicates are removed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.methods._attention import Score, attention, attention_needs
from mmcompress.ranking import choose_per_tile
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

NEAREST, ROWS_AT_ONCE = 32, 1024


@register(
    "vispruner",
    summary="Tokens with the most CLS attention, and the least duplicated of the others.",
    family="CLS-guided diversity",
    paper="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, arXiv:2412.01818",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class VisPruner(VisualMethod):
    """Give a part of the budget to the most attended tokens, the rest to tokens unlike one another.

    The others, most attended first, are dealt out in turn to two sets; of the first set those most similar to any
    token of the second, by features before the projector, are removed, and what is left is dealt out again. Each
    removal changes all later ones, so a rounding error may change many diverse tokens. Tiles of one image are
    treated apart and share the budget by size.

    Args:
        important_ratio: fraction in [0, 1] of the budget that goes to important tokens, rounded down (r).
        prune_per_step: duplicates removed before tokens are dealt out again.
        score: "cls" reads the CLS token's row in the last used layer; "received" reads the attention a token receives
            from all tokens, for encoders without CLS.
    """

    important_ratio: float = 0.5
    prune_per_step: int = 8
    score: Score = "cls"

    def __post_init__(self) -> None:
        if not 0 <= self.important_ratio <= 1:
            raise SpecError(f"vispruner: important_ratio={self.important_ratio} must be in [0, 1].")
        if self.prune_per_step < 1:
            raise SpecError(f"vispruner: prune_per_step={self.prune_per_step} must be at least 1.")

    def needs(self, encoder: EncoderFacts) -> Needs:
        """Attention, and the features before the projector."""
        return replace(attention_needs(self.score, encoder), features=True)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep important and diverse tokens of every tile, in raster order."""
        assert item.features is not None, "the engine supplies what needs() names"
        scores, features = attention(item, needs), item.features

        def choose(members: Tensor, share: int) -> Tensor:
            ranked = scores[members].argsort(descending=True, stable=True)
            important = int(share * self.important_ratio)
            unit = normalize(features[members].float(), dim=-1)
            return torch.cat([ranked[:important], self._diverse(unit, ranked[important:], share - important)])

        return Selection(choose_per_tile(item.tiles, budget, choose).sort().values)

    def _diverse(self, unit: Tensor, residual: Tensor, count: int) -> Tensor:
        """Reduce the indices `residual`, most attended first, to `count` by removing duplicates in `unit`."""
        neighbours = None
        while 0 < count < len(residual):
            if neighbours is None or neighbours.missed > len(residual):
                neighbours = Neighbours(unit, residual)
            pruned = min(self.prune_per_step, len(residual) - count)
            even, odd = residual[::2], residual[1::2]
            closeness = neighbours.closeness(even, odd)
            residual = torch.cat([even[closeness.argsort(descending=True, stable=True)[pruned:]], odd])
        return residual[:count]


class Neighbours:
    """The nearest tokens of each one, `NEAREST` of them: mostly one belongs to a half of all tokens, whichever half.

    `missed` counts how often none did, so that all tokens had to be looked at; as tokens are removed, it happens more
    often, and pays to make a new table of those left.

    Args:
        unit: `[tokens, width]` normalised.
        some: indices of the tokens that are compared.
    """

    def __init__(self, unit: Tensor, some: Tensor) -> None:
        self.unit, self.missed = unit, 0
        nearest = min(NEAREST, len(some))
        self.similarity = unit.new_empty(len(unit), nearest)
        self.index = some.new_empty(len(unit), nearest)
        compared = unit[some].T
        for rows in some.split(ROWS_AT_ONCE):
            self.similarity[rows], places = (unit[rows] @ compared).topk(nearest)
            self.index[rows] = some[places]

    def closeness(self, tokens: Tensor, others: Tensor) -> Tensor:
        """How similar each of `tokens` is to the most similar of `others`, of which it is none."""
        is_other = torch.zeros(len(self.unit), dtype=torch.bool, device=tokens.device).index_fill(0, others, True)
        found = is_other[self.index[tokens]]
        closeness = self.similarity[tokens].masked_fill(~found, -torch.inf).amax(dim=1)
        lost = (~found.any(dim=1)).nonzero()[:, 0]
        self.missed += len(lost)
        for missed in lost.split(ROWS_AT_ONCE):
            closeness[missed] = (self.unit[tokens[missed]] @ self.unit.T).masked_fill(~is_other, -torch.inf).amax(dim=1)
        return closeness
