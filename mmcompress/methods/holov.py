"""HoloV: share the budget over stretches of the image by attention and context, then keep the most attended."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.methods._attention import Score, attention, attention_needs
from mmcompress.ranking import choose_per_tile
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

EPSILON, ATTENTION_SCALE, ROWS_AT_ONCE = 1e-6, 1000.0, 64


@register(
    "holov",
    summary="Budgets over stretches of the image by attention and similarity variance, then the most attended.",
    family="CLS-guided with spatial coverage",
    paper='Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention, '
    "arXiv:2510.02912",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class HoloV(VisualMethod):
    """Cut a tile's raster into chunks of equal length and share its budget over them by their mean token score.

    A token's score is its attention plus the variance of its similarity to the other tokens of its chunk. As in the
    authors' code the variance is scaled to the mean attention of the chunk, and so tells chunks apart only where it
    all but vanishes. Within a chunk attention alone decides. Tiles of one image are treated apart and share the
    budget by size.

    Args:
        chunks: chunks of a tile, at most one per token; default: 16 where 64 of 576 tokens stay, more in proportion
            to the tokens and fewer in proportion to the budget, rounded down.
        alpha: weight of the variance, at least 0, once it is scaled to the mean of the attention.
        score: "cls" reads the CLS token's row in the last used layer; "received" reads the attention a token receives
            from all tokens, for encoders without CLS.
        compat: "official" leaves unfilled what a chunk is allotted beyond its size, instead of sharing it over the
            others, and keeps the tokens of a chunk in descending attention, unless all stay, instead of raster order.
    """

    chunks: int | None = None
    alpha: float = 0.09
    score: Score = "cls"
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if self.chunks is not None and self.chunks < 1:
            raise SpecError(f"holov: chunks={self.chunks} must be at least 1.")
        if self.alpha < 0:
            raise SpecError(f"holov: alpha={self.alpha} must be at least 0.")

    @property
    def exact_count(self) -> bool:
        """Whether what does not fit a chunk goes to others."""
        return self.compat == "none"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """Attention, and the embeddings, whose similarities vary."""
        return replace(attention_needs(self.score, encoder), embeddings=True)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the most attended tokens of every chunk."""
        scores = attention(item, needs)

        def choose(members: Tensor, share: int) -> Tensor:
            return self._choose(item.embeddings[members].float(), scores[members], share)

        kept = choose_per_tile(item.tiles, budget, choose)
        return Selection(kept if self.compat == "official" else kept.sort().values)

    def _choose(self, tokens: Tensor, attention: Tensor, budget: int) -> Tensor:
        """Kept indices of one tile, chunk after chunk, each by descending attention; whole chunks in raster order."""
        chunks = min(self.chunks or max(1, 16 * len(tokens) // (9 * budget)), len(tokens))
        size, longer = divmod(len(tokens), chunks)
        sizes = torch.full((chunks,), size, device=tokens.device)
        sizes[:longer] += 1
        counts, parts = (longer, chunks - longer), [longer * (size + 1), (chunks - longer) * size]
        scores = [
            self._chunk_scores(part.unflatten(0, (count, -1)), its_attention.unflatten(0, (count, -1)))
            for part, its_attention, count in zip(tokens.split(parts), attention.split(parts), counts, strict=True)
            if count
        ]
        shares = self._shares(torch.cat(scores), sizes, budget)
        chunk = torch.arange(chunks, device=sizes.device).repeat_interleave(sizes)
        order = torch.where((shares == sizes)[chunk], 0, attention).argsort(descending=True, stable=True)
        order = order[chunk[order].argsort(stable=True)]
        rank = torch.arange(len(tokens), device=sizes.device) - (sizes.cumsum(0) - sizes)[chunk]
        return order[rank < shares[chunk]]

    def _chunk_scores(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """Mean token score of chunks of one size, `[chunks]`, from `[chunks, size, dim]` and `[chunks, size]`."""
        attention = ATTENTION_SCALE * attention
        variance = _similarity_variance(tokens / (tokens.norm(dim=-1, keepdim=True) + EPSILON))
        scale = attention.abs().mean(dim=1) / (variance.abs().mean(dim=1) + EPSILON)
        return (attention + self.alpha * variance * scale[:, None]).mean(dim=1)

    def _shares(self, scores: Tensor, sizes: Tensor, budget: int) -> Tensor:
        """Tokens kept per chunk: in proportion to `scores`, rounded down, and one more for each of the best."""
        shares = torch.zeros_like(sizes)
        while (left := budget - int(shares.sum())) > 0:
            has_room = shares < sizes
            weights = torch.where(has_room, scores, 0)
            extra = (weights / (weights.sum() + EPSILON) * left).long()
            best = torch.where(has_room, scores, -1).argsort(descending=True, stable=True)
            extra[best[: left - int(extra.sum())]] += 1
            shares = torch.minimum(shares + extra, sizes)
            if self.compat == "official":
                break
        return shares


def _similarity_variance(unit: Tensor) -> Tensor:
    """Variance of each token's similarity to the others of its chunk, `[chunks, size]`, its own counting as zero."""
    others = max(unit.shape[1] - 1, 1)
    variance = []
    for start in range(0, unit.shape[1], ROWS_AT_ONCE):
        similarity = unit[:, start : start + ROWS_AT_ONCE] @ unit.transpose(1, 2)
        similarity.diagonal(start, 1, 2).zero_()
        mean = similarity.sum(dim=-1, keepdim=True) / others
        variance.append((similarity - mean).square().sum(dim=-1) / others)
    return torch.cat(variance, dim=1)
