"""EVS: keep what changed since the frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mmcompress.frames import as_frames
from mmcompress.method import VisualMethod
from mmcompress.ranking import top_indices
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem


@register(
    "evs",
    summary="Tokens least like the token at their position in the frame before.",
    family="video pruning",
    paper="Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, arXiv:2510.14624",
    licence="Apache-2.0 with an additional NVIDIA proprietary notice (vLLM's evs.py)",
)
@dataclass(frozen=True)
class EVS(VisualMethod):
    """Rank all tokens of a clip by dissimilarity to the previous frame; the first frame comes before all others.

    The budget is exact, so the first frame stays whole only where the budget holds it; a smaller budget keeps its
    first tokens in raster order. An image is one frame, or, if its planes have one size, a frame per plane.
    """

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The embeddings, which are compared between frames."""
        return Needs(embeddings=True)

    def dissimilarity(self, item: VisualItem) -> Tensor:
        """One minus the cosine to the previous frame, `[frames, tokens per frame]`; infinite in the first frame."""
        frames = as_frames(item)
        unlike = 1 - cosine_similarity(frames[1:], frames[:-1], dim=-1)
        return torch.cat([torch.full_like(frames[:1, :, 0], torch.inf), unlike])

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the most dissimilar tokens of the clip, in raster order."""
        return Selection(top_indices(self.dissimilarity(item).flatten(), budget))
