"""PyramidDrop: at three depths of the LLM, keep the visual tokens that the last token attends to most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mmcompress.llm_method import LLMFacts, LLMNeeds, PromptRow
from mmcompress.methods._progressive import ProgressiveMethod
from mmcompress.ranking import top_indices
from mmcompress.registry import register
from mmcompress.types import Selection


@register(
    "pyramiddrop",
    summary="At three depths of the LLM, keep the visual tokens the last token attends to most.",
    family="LLM attention",
    stage="in_llm",
    paper="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction, "
    "arXiv:2410.17247",
    licence="MIT",
)
@dataclass(frozen=True)
class PyramidDrop(ProgressiveMethod):
    """Stages of the LLM, each with the same share of the visual tokens of the stage before (Section 3.2).

    Tokens are ranked by the attention of the last token, averaged over heads, in the layer that the removal precedes.

    Args:
        prune_layers: layers before which tokens are removed; None: 8, 16 and 24 of 32, scaled to the model's depth.
        ratios: shares of the tokens left by every removal but the last, which leaves `keep`; shares below `keep` count
            as `keep`. None: geometric.
    """

    paper_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)

    def needs(self, llm: LLMFacts) -> LLMNeeds:
        """The attention of the layer to come."""
        return LLMNeeds(upcoming=True)

    def shares(self, keep: float, times: int) -> Sequence[float]:
        """Powers of the share that every removal leaves of what it meets."""
        return [keep ** (number / times) for number in range(1, times)]

    def select(self, row: PromptRow, left: int) -> Selection:
        """The most attended tokens, in raster order."""
        assert row.upcoming is not None
        return Selection(top_indices(row.upcoming.mean_row(row.last)[row.visual], left))
