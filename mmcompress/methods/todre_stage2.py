"""ToDRE, second stage: late in the LLM, visual tokens go as soon as the question hardly attends to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts, LLMMethod, LLMNeeds, PromptRow
from mmcompress.registry import register
from mmcompress.types import Selection


@register(
    "todre-stage2",
    summary="At 7/8 of the LLM's depth, drop all visual tokens if the question hardly attends to them.",
    family="LLM attention",
    stage="in_llm",
    takes_keep=False,
    paper="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance, arXiv:2505.18757v2",
)
@dataclass(frozen=True)
class ToDREStage2(LLMMethod):
    """All visual tokens go where text and image attend to each other with less than `threshold` of their attention.

    Attention is that of the last layer before 7/8 of the depth, averaged over heads and rows (Equation 8). Images never
    attend to the question behind them, so the question's attention alone decides.

    Args:
        threshold: tau, the share of the question's attention from which on visual tokens stay.
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise SpecError(f"todre-stage2: threshold={self.threshold} must be a share of attention, 0 to 1.")

    @property
    def exact_count(self) -> bool:
        """All tokens stay, or none."""
        return False

    def needs(self, llm: LLMFacts) -> LLMNeeds:
        """The attention of the layer before."""
        return LLMNeeds(previous=True)

    def layers(self, llm: LLMFacts) -> tuple[int, ...]:
        """Once, when 28 of 32 layers have run."""
        return llm.scale_layers((28,), 32)

    def schedule(self, tokens: int, keep: int, ratio: float, llm: LLMFacts) -> list[int]:
        """Possibly all go."""
        return [0]

    def attention_to_image(self, row: PromptRow) -> Tensor:
        """The share of the question's attention that visual tokens get, float32 scalar."""
        assert row.previous is not None
        return row.previous.rows(row.question)[:, :, row.visual].sum(dim=-1).mean()

    def select(self, row: PromptRow, left: int) -> Selection:
        """All visual tokens or none."""
        kept = int(row.visual.sum()) if self.attention_to_image(row) >= self.threshold else 0
        return Selection(torch.arange(kept, device=row.visual.device))
