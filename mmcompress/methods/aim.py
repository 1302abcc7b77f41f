"""AIM: merge the most similar tokens, half of them at a time; inside the LLM, ever fewer go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmcompress.merging import in_raster_order, merge_by_tile, soft_match
from mmcompress.method import VisualMethod
from mmcompress.methods.aim_pruning import AIMPruning
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, Space, VisualItem


@register(
    "aim",
    summary="Iterative bipartite merging of similar tokens, then pruning layer by layer inside the LLM.",
    family="merging",
    paper="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning, arXiv:2412.03248",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class AIM(VisualMethod):
    """Repeated bipartite soft matching within every tile or frame (Section 3).

    A step merges tokens at even places into their most similar ones at odd places by a plain mean; of N tokens the
    first step removes N // 2, the next N // 4, and so on, the last only as many as the budget asks for. Tiles and
    frames share the budget by size. A merged token has the position of the odd one.

    Args:
        space: "pre_projector" merges the encoder's features, compared by keys of its last layer, as published for
            images; "projected" merges projected tokens, compared by themselves, as published for video.
        parts: "first" leaves out the pruning inside the LLM, `aim-pruning`.
    """

    space: Space = "pre_projector"
    parts: Literal["both", "first"] = "both"

    @property
    def second_part(self) -> AIMPruning | None:
        """Pruning on the authors' schedule."""
        return AIMPruning() if self.parts == "both" else None

    def needs(self, encoder: EncoderFacts) -> Needs:
        """Features, and the keys of the last layer that compare them; or the embeddings alone."""
        if self.space == "projected":
            return Needs(embeddings=True)
        return Needs(keys=(encoder.depth - 1,), features=True)

    def merge(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """The outputs in the authors' order, in which every step leaves them."""
        metric = item.embeddings if self.space == "projected" else item.keys[needs.keys[0]]
        return merge_by_tile(item.tiles, budget, lambda members, share: _merge_tile(metric[members].float(), share))

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Merged and unmerged tokens in raster order."""
        return in_raster_order(self.merge(item, budget, needs))


def halving_steps(tokens: int, budget: int) -> list[int]:
    """How many of `tokens` each step removes until `budget` are left: N // 2, N // 4, ..., the last as is needed."""
    steps: list[int] = []
    while (surplus := tokens - budget - sum(steps)) > 0:
        steps.append(min(surplus, max(1, tokens >> len(steps) + 1)))
    return steps


def _merge_tile(metric: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    # Every token goes into one output, so a step needs no matrix: only where to, and with what weight.
    tokens = len(metric)
    anchor = group = torch.arange(tokens, device=metric.device)
    share = torch.ones(tokens, device=metric.device)
    for count in halving_steps(tokens, budget):
        matching = soft_match(metric, count)
        metric = matching.mean(metric)
        anchor, group = anchor[matching.kept], matching.group[group]
        share = share / matching.counts[group]
    weight = torch.zeros(budget, tokens, device=metric.device)
    weight[group, torch.arange(tokens, device=metric.device)] = share
    return anchor, weight
