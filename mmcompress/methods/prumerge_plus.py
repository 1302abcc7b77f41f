"""LLaVA-PruMerge+: PruMerge with tokens sampled evenly over the image beside those that CLS attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.methods.prumerge import PruMerge, outlier_ratio
from mmcompress.registry import register

OFFICIAL_END = 575


@register(
    "prumerge-plus",
    summary="PruMerge with tokens sampled evenly over the image beside the most attended ones.",
    family="merging",
    paper="LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, arXiv:2403.15388",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge whose kept tokens are in part sampled at even distances (Section 3).

    Of a budget of K, `sampled` K tokens are sampled, one is the pooled token, and the rest, at least one where there is
    room, are those with the most CLS attention among the others. Merging is PruMerge's.

    Args:
        sampled: share of the budget that is sampled. The authors sample three times as many tokens as they find
            outliers, which is 96 of 128 and 192 of 256 at their fixed budgets.
        neighbours: how many tokens each kept one absorbs, fewer where there are fewer.
        space: "pre_projector" merges the encoder's features, as published; "projected" merges projected tokens.
        compat: "official" keeps as many tokens as have outlying attention by the interquartile rule and samples with a
            step that follows from their share, never the tokens from the 576th on; in all at most the budget, most
            attended first.
    """

    sampled: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sampled <= 1:
            raise SpecError(f"prumerge-plus: sampled={self.sampled} is out of range; use a share in [0, 1].")

    def kept(self, attention: Tensor, budget: int) -> Tensor:
        """The tokens of a tile that are kept beside the pooled one: most attended first, then sampled."""
        tokens, device = len(attention), attention.device
        ranked = attention.argsort(descending=True, stable=True)
        if self.compat == "official":
            ratio = outlier_ratio(attention)
            step = int(1 / ratio) // 3 if ratio else tokens
            top, grid = ranked[: int(tokens * ratio)], torch.arange(0, min(OFFICIAL_END, tokens), step, device=device)
            return torch.cat([top, grid[~torch.isin(grid, top)]])[: budget - 1]
        count = min(int(budget * self.sampled), max(0, budget - 2))
        grid = torch.arange(count, device=device) * tokens // max(1, count)
        top = ranked[~torch.isin(ranked, grid)][: max(0, budget - 1 - count)]
        return torch.cat([top, grid])
