"""FastV: after two layers, keep the visual tokens that the last token attends to most."""

from __future__ import annotations

from dataclasses import dataclass

from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts, LLMMethod, LLMNeeds, PromptRow
from mmcompress.ranking import top_indices
from mmcompress.registry import register
from mmcompress.types import Selection


@register(
    "fastv",
    summary="After two LLM layers, keep the visual tokens the last token attends to most.",
    family="LLM attention",
    stage="in_llm",
    paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
    "Vision-Language Models, arXiv:2403.06764",
)
@dataclass(frozen=True)
class FastV(LLMMethod):
    """Visual tokens are ranked by the attention of the last token in layer K - 1, averaged over heads (Section 4).

    Args:
        layer: K, the layer before which tokens are removed; not scaled to the model's depth.
    """

    layer: int = 2

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise SpecError(f"fastv: layer={self.layer} must be at least 1: attention of the layer before it is read.")

    def needs(self, llm: LLMFacts) -> LLMNeeds:
        """The attention of the layer before."""
        return LLMNeeds(previous=True)

    def layers(self, llm: LLMFacts) -> tuple[int, ...]:
        """Once, before layer K."""
        return (self.layer,)

    def schedule(self, tokens: int, keep: int, ratio: float, llm: LLMFacts) -> list[int]:
        """All at once."""
        return [keep]

    def select(self, row: PromptRow, left: int) -> Selection:
        """The most attended tokens, in raster order."""
        assert row.previous is not None
        return Selection(top_indices(row.previous.mean_row(row.last)[row.visual], left))
