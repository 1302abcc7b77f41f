"""DART: after two layers, keep a few pivots and the visual tokens that duplicate them least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress.budget import largest_remainder
from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts, LLMMethod, LLMNeeds, PromptRow
from mmcompress.registry import register
from mmcompress.types import Selection


@register(
    "dart",
    summary="After two LLM layers, keep the visual tokens least like a few pivots.",
    family="LLM diversity",
    stage="in_llm",
    paper="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, arXiv:2502.11494",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class DART(LLMMethod):
    """Pivots are the tokens whose keys in layer K - 1 have the largest L1 norm (Section 3).

    Visual pivots stay. Then every pivot takes those of the tokens still left over that are least like it, by the cosine
    of hidden states behind the LLM's last normalisation: visual pivots choose first, then those of the text behind the
    images, each kind by falling norm. The budget is shared over the pivots, earlier ones taking the remainder. A budget
    of no more tokens than visual pivots is spent on these; where there is less text than text pivots, all of it are.

    Args:
        layer: K, the layer before which tokens are removed; not scaled to the model's depth.
        image_pivots: how many visual tokens are pivots.
        text_pivots: how many tokens of the text behind the images are pivots.
    """

    layer: int = 2
    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise SpecError(f"dart: layer={self.layer} must be at least 1: keys of the layer before it are read.")
        for name, least in (("image_pivots", 1), ("text_pivots", 0)):
            if getattr(self, name) < least:
                raise SpecError(f"dart: {name}={getattr(self, name)} must be at least {least}.")

    def needs(self, llm: LLMFacts) -> LLMNeeds:
        """The keys of the layer before, and what the last normalisation makes of its output."""
        return LLMNeeds(previous=True, normed=True)

    def layers(self, llm: LLMFacts) -> tuple[int, ...]:
        """Once, before layer K."""
        return (self.layer,)

    def schedule(self, tokens: int, keep: int, ratio: float, llm: LLMFacts) -> list[int]:
        """All at once."""
        return [keep]

    def select(self, row: PromptRow, left: int) -> Selection:
        """Pivots and what they take, in raster order."""
        return self.least_duplicated(row, self.pivots(row, left), left)

    def pivots(self, row: PromptRow, left: int) -> Tensor:
        """Places in the row of visual pivots, at most `left`, and text pivots, each kind by falling norm."""
        assert row.previous is not None
        norms = row.previous.key[:, row.previous.past :].float().abs().sum(dim=(0, 2))

        def largest(places: Tensor, count: int) -> Tensor:
            return places[norms[places].argsort(descending=True, stable=True)[:count]]

        return torch.cat([largest(row.images, min(self.image_pivots, left)), largest(row.question, self.text_pivots)])

    def least_duplicated(self, row: PromptRow, pivots: Tensor, left: int) -> Selection:
        """The visual ones of `pivots` and what each takes in turn, `left` in all."""
        assert row.normed is not None
        unit = normalize(row.normed.float(), dim=-1)
        similarity = unit[pivots] @ unit[row.images].T
        chosen = torch.isin(row.images, pivots)
        budget = left - int(chosen.sum())
        for likeness, share in zip(similarity, largest_remainder(budget, [budget] * len(pivots)), strict=True):
            chosen[likeness.masked_fill(chosen, torch.inf).argsort(stable=True)[:share]] = True
        return Selection(chosen.nonzero()[:, 0])
