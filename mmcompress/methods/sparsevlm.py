"""SparseVLM: question tokens relevant to the image rate its tokens; part of what they rate low is pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mmcompress.llm_method import ROWS_AT_ONCE, LLMFacts, LLMMethod, LLMNeeds, PromptRow
from mmcompress.methods._dpc_knn import distances, peak_scores
from mmcompress.ranking import top_indices
from mmcompress.registry import register
from mmcompress.types import Positions, Selection

IMAGE_TOKENS = 576
TABLES = {
    "1.5": ((66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110)),
    "2.0": ((66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118)),
}
HEADS = 14


@register(
    "sparsevlm",
    summary="Question tokens close to the image rank its tokens at three LLM layers; the best dropped ones are pooled.",
    family="LLM attention",
    stage="in_llm",
    paper="SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, arXiv:2410.04417",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class SparseVLM(LLMMethod):
    """After layers 2, 6 and 15 of 32 (0-based), visual tokens are ranked by the attention of the raters (Section 3).

    Raters are the tokens of the question that are more relevant to the image than the mean. The counts are those of
    the published tables for 576 tokens, the last entry being `keep`; between the tables (and all tokens at keep=1.0)
    they are interpolated linearly, below the smallest they are in its proportions.

    Version 1.5 pools the best 30 % of what it drops into clusters, whose means follow the kept tokens and are not
    counted in `keep`: about 3 % of the tokens dropped at each of the layers, at least one, come on top of it.

    Args:
        version: "1.5" ranks by plain attention; "2.0" (SparseVLM+) divides attention by the logit that positions alone
            make (unstable where that is near zero), listens to the 14 heads (all, where there are fewer) in which
            raters then attend to the image most, pools nothing and leaves positions as they are.
    """

    version: Literal["1.5", "2.0"] = "1.5"

    @property
    def exact_count(self) -> bool:
        """Pooled tokens come on top of the planned ones."""
        return self.version == "2.0"

    @property
    def positions(self) -> Positions:
        """The first version counts anew, the second does not."""
        return "renumber" if self.version == "1.5" else "original"

    def needs(self, llm: LLMFacts) -> LLMNeeds:
        """The attention of the layer before and the embeddings; in version 2.0 positions too."""
        return LLMNeeds(previous=True, inputs=True, rotary=self.version == "2.0")

    def layers(self, llm: LLMFacts) -> tuple[int, ...]:
        """Three, scaled to the model's depth."""
        return llm.scale_layers((3, 7, 16), 32)

    def schedule(self, tokens: int, keep: int, ratio: float, llm: LLMFacts) -> list[int]:
        """The table of the budget, scaled to the row's tokens; no layer has fewer than the next."""
        first, second, _ = _table(TABLES[self.version], keep * IMAGE_TOKENS / tokens)
        middle = max(round(second * tokens / IMAGE_TOKENS), keep)
        return [max(round(first * tokens / IMAGE_TOKENS), middle), middle, keep]

    def raters(self, row: PromptRow) -> Tensor:
        """Where the question's tokens of more than mean relevance are, all of it where none is, ascending `[raters]`.

        Relevance is the softmax over the question of each visual token's products with its embeddings, averaged over
        the visual tokens that entered the LLM.
        """
        assert row.inputs is not None
        inputs, question = row.inputs.float(), row.question
        visual = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        visual[row.source[~row.visual]] = False  # only visual tokens were ever removed
        relevance = (inputs[visual] @ inputs[row.source[question]].T).softmax(dim=-1).mean(dim=0)
        above = question[relevance > relevance.mean()]
        return above if len(above) else question

    def scores(self, row: PromptRow) -> Tensor:
        """What raters give to each visual token, averaged over heads, `[visual]`."""
        assert row.previous is not None
        raters = self.raters(row)
        if self.version == "1.5":
            return row.previous.mean_row(raters)[row.visual]
        given = [_beyond_position(row, block).sum(dim=1) for block in raters.split(ROWS_AT_ONCE)]
        by_head = torch.stack(given).sum(dim=0) / len(raters)
        return by_head[top_indices(by_head.sum(dim=1), HEADS)].mean(dim=0)

    def select(self, row: PromptRow, left: int) -> Selection:
        """The best in raster order; in version 1.5 the pooled ones follow, each behind the image of its centre."""
        scores = self.scores(row)
        kept = top_indices(scores, left)
        if self.version == "2.0":
            return Selection(kept)
        dropped = scores.argsort(descending=True, stable=True)[left:]
        recycled = dropped[: int(0.3 * len(dropped)) + 1]
        centres, cluster = _clusters(row.hidden[row.images[recycled]], len(recycled) // 10 + 1)
        anchor = torch.cat([kept, recycled[centres]])
        weight = torch.zeros(len(anchor), len(scores), device=scores.device)
        weight[torch.arange(left, device=kept.device), kept] = 1
        weight[left + cluster, recycled] = 1 / cluster.bincount()[cluster].float()
        stretch = (row.images.diff(prepend=row.images[:1]) > 1).cumsum(dim=0)
        order = stretch[anchor].argsort(stable=True)
        return Selection(anchor[order], weight[order])


def _table(tables: Sequence[tuple[int, ...]], last: float) -> list[float]:
    """The counts of 576 tokens of which `last` stay in the end, between the nearest of the ascending `tables`."""
    knots = [(0, 0, 0), *tables, (IMAGE_TOKENS,) * 3]
    below, above = next(pair for pair in pairwise(knots) if last <= pair[1][-1])
    along = (last - below[-1]) / (above[-1] - below[-1])
    return [low + along * (high - low) for low, high in zip(below, above, strict=True)]


def _beyond_position(row: PromptRow, raters: Tensor) -> Tensor:
    """Attention over the logits that all-ones queries and keys have at these positions, `[heads, raters, visual]`."""
    assert row.previous is not None and row.rotary is not None
    cosines, sines = (part.float().chunk(2, dim=-1) for part in row.rotary)
    ones = torch.cat([cosines[0] - sines[0], cosines[1] + sines[1]], dim=-1)
    bias = ones[raters] @ ones[row.visual].T / ones.shape[1] ** 0.5
    return row.previous.rows(raters)[:, :, row.visual] / bias


def _clusters(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Centres of `count` clusters of `tokens` `[tokens, dim]`, best first, and the cluster of each token."""
    distance = distances(tokens)
    # Where two nearest make a density, two tokens nearest to each other tie: topk orders them as the published code.
    centres = peak_scores(distance, count).topk(count).indices
    cluster = distance[centres].argmin(dim=0)
    cluster[centres] = torch.arange(count, device=tokens.device)
    return centres, cluster
