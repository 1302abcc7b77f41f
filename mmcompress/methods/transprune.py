"""TransPrune: inside the LLM, keep the visual tokens that layers change most and that the text attends to most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmcompress.llm_method import LLMFacts, LLMNeeds, PromptRow
from mmcompress.methods._progressive import ProgressiveMethod
from mmcompress.ranking import top_indices
from mmcompress.registry import register
from mmcompress.types import Selection

SMALLEST_SUM = 1e-8


@register(
    "transprune",
    summary="At three depths of the LLM, keep the visual tokens that layers change most and the text attends to most.",
    family="token transition",
    stage="in_llm",
    paper="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model, arXiv:2507.20630",
    licence="MIT",
)
@dataclass(frozen=True)
class TransPrune(ProgressiveMethod):
    """Token transition variation (TTV) and instruction-guided attention (IGA), each summing to one (Section 3).

    TTV is summed over the layers from the one before the first removal on. IGA is the attention of all text behind the
    last visual token in the layer to come, averaged over heads.

    Args:
        prune_layers: layers before which tokens are removed; None: 7, 9 and 12 of 32, scaled to the model's depth.
        ratios: shares of the tokens left by every removal but the last, which leaves `keep`; shares below `keep` count
            as `keep`. None: every removal takes twice as many as the one before.
        direction: how far a module turns a token: "cos" is 1 - cos, as in the authors' code; "abscos" is 1 - |cos|, as
            in the paper.
    """

    paper_layers: ClassVar[tuple[int, ...]] = (7, 9, 12)

    direction: Literal["cos", "abscos"] = "cos"

    def needs(self, llm: LLMFacts) -> LLMNeeds:
        """The attention of the layer to come, and what the layers between removals do to tokens."""
        layers = self.layers(llm)
        return LLMNeeds(upcoming=True, transitions=tuple(range(layers[0] - 1, layers[-1])))

    def shares(self, keep: float, times: int) -> Sequence[float]:
        """All but 1, 1 + 2, 1 + 2 + 4, ... parts of what is removed in the end."""
        return [1 - (1 - keep) * (2**number - 1) / (2**times - 1) for number in range(1, times)]

    def transition(self, entered: Tensor, left: Tensor) -> Tensor:
        """How much a module changes each token of a row `[tokens]`: its gain times how far it turns the token.

        Args:
            entered: what the module took in `[tokens, width]`.
            left: what it gave out.
        """
        entered, left = entered.float(), left.float()
        cosine = cosine_similarity(entered, left, dim=-1)
        turn = 1 - (cosine.abs() if self.direction == "abscos" else cosine)
        return left.norm(dim=-1) / entered.norm(dim=-1) * turn.softmax(dim=0)

    def observe(self, attention: tuple[Tensor, Tensor], mlp: tuple[Tensor, Tensor]) -> Tensor:
        """TTV of a layer."""
        return self.transition(*attention) + self.transition(*mlp)

    def select(self, row: PromptRow, left: int) -> Selection:
        """The tokens with the highest sum of both scores, in raster order."""
        assert row.upcoming is not None and row.observed is not None
        variation = row.observed.sum(dim=0)[row.visual]
        guided = row.upcoming.mean_row(row.question)[row.visual]
        return Selection(top_indices(_normalised(variation) + _normalised(guided), left))


def _normalised(scores: Tensor) -> Tensor:
    return scores / (scores.sum() + SMALLEST_SUM)
