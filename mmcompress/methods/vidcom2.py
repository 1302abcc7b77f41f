"""VidCom2: keep what is unlike the clip and unlike its frame, with more tokens for frames unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress.frames import as_frames
from mmcompress.method import VisualMethod
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

BANDWIDTHS = tuple(2.0**k for k in range(-3, 2))
TEMPERATURE = 0.01


@register(
    "vidcom2",
    summary="Tokens least like the centres of their clip and frame, budgets by how much a frame stands out.",
    family="video pruning",
    paper="Video Compression Commander: Plug-and-Play Inference Acceleration for Video LLMs, arXiv:2505.14454",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class VidCom2(VisualMethod):
    """Score tokens by Gaussian similarity to two centres and keep the least similar of each frame.

    Rounded frame budgets need not add up to the budget; what is over is taken from the most similar kept tokens of
    the clip, what is missing from the least similar dropped ones. An image is one frame, or, if its planes have one
    size, a frame per plane.

    Args:
        compat: "official" leaves what rounding falls short of the budget unfilled, as the authors' code does.
    """

    compat: Literal["none", "official"] = "none"

    @property
    def exact_count(self) -> bool:
        """Whether rounded frame budgets are filled up to the budget."""
        return self.compat == "none"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The embeddings, which are compared with their centres."""
        return Needs(embeddings=True)

    def similarities(self, item: VisualItem) -> tuple[Tensor, Tensor]:
        """Similarity of every token to the clip's and to its frame's centre, each `[frames, tokens per frame]`."""
        frames = as_frames(item)
        variance = frames.flatten(0, 1).var(dim=0)
        steady = variance.argsort(stable=True)[: max(1, len(variance) // 2)]
        unit = normalize(frames[..., steady], dim=-1)
        return _gaussian(unit - unit.mean(dim=(0, 1))), _gaussian(unit - unit.mean(dim=1, keepdim=True))

    def frame_scales(self, clip_similarity: Tensor, retention: float) -> Tensor:
        """The share of its tokens that each frame keeps, `[frames]`: `retention`, more for frames that stand out."""
        uniqueness = (-clip_similarity.mean(dim=1) / TEMPERATURE).softmax(dim=0)
        return (retention * (1 + uniqueness - uniqueness.mean())).clamp(max=1)

    def kept(self, similarity: Tensor, scales: Tensor, budget: int) -> Tensor:
        """Kept indices, ascending: each frame's least similar tokens by its scale, then brought to the budget."""
        counts = (scales * similarity.shape[1]).round().clamp(min=1).long()
        rank = similarity.argsort(dim=1, stable=True).argsort(dim=1)
        chosen = (rank < counts[:, None]).flatten()
        order = similarity.flatten().argsort(stable=True)
        order = torch.cat([order[chosen[order]], order[~chosen[order]]])
        count = min(budget, int(counts.sum())) if self.compat == "official" else budget
        return order[:count].sort().values

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the tokens least like both centres, in raster order."""
        clip, frame = self.similarities(item)
        return Selection(self.kept(clip + frame, self.frame_scales(clip, budget / len(item)), budget))


def _gaussian(offset: Tensor) -> Tensor:
    """The sum of Gaussian kernels of all bandwidths at `offset` `[..., dim]`."""
    squared = offset.square().sum(dim=-1)
    return torch.stack([(-squared / (2 * bandwidth)).exp() for bandwidth in BANDWIDTHS]).sum(dim=0)
