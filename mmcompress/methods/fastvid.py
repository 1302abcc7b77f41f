"""FastVID: salient tokens of every frame, and density peaks that absorb the rest of their segment."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmcompress.budget import largest_remainder
from mmcompress.errors import SpecError
from mmcompress.frames import as_frames, frame_shape
from mmcompress.method import VisualMethod
from mmcompress.methods._dpc_knn import distances, peak_scores
from mmcompress.ranking import top_indices
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

NEIGHBOURS = 4


@register(
    "fastvid",
    summary="Salient tokens per frame, and density peaks per segment that absorb the tokens left out.",
    family="video merging",
    paper="FastVID: Dynamic Density Pruning for Fast Video Large Language Models, arXiv:2503.11187",
    licence="MIT",
)
@dataclass(frozen=True)
class FastVID(VisualMethod):
    """Cut the clip into segments, keep each frame's most attended tokens, merge the others into density peaks.

    Frames are compared by the mean of their tokens, and salience is received attention in the last global layer (the
    paper's Qwen2.5-VL variant), since checkpoints lack the attention-pooling head that the paper takes both from for
    SigLIP towers. Frames share the budget equally. An image is one frame, or, if its planes have one size, a frame
    per plane.

    Args:
        min_segments: segments a clip is cut into at least (c).
        threshold: similarity of neighbouring frames below which a segment ends (tau).
        context: fraction in [0, 1) of a frame's budget that goes to density peaks (d).
        anchor_step: one frame in so many of a segment holds its peaks, counted from the end (p); fewer where the
            anchor frames would have too few tokens for them.
        beta: least weight in [0, 1] of a peak's own token among what it absorbs.
        compat: "official" shares peaks equally among the anchor frames of a segment and drops the remainder.
    """

    min_segments: int = 8
    threshold: float = 0.9
    context: float = 0.4
    anchor_step: int = 4
    beta: float = 0.6
    compat: Literal["none", "official"] = "none"

    def __post_init__(self) -> None:
        if self.min_segments < 1 or self.anchor_step < 1:
            raise SpecError("fastvid: min_segments and anchor_step must be at least 1.")
        if not (0 <= self.context < 1 and 0 <= self.beta <= 1):
            raise SpecError("fastvid: context must be in [0, 1) and beta in [0, 1].")

    @property
    def exact_count(self) -> bool:
        """Whether the remainders of a segment's peaks are shared out."""
        return self.compat == "none"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The embeddings and the attention received in the last layer that attends to the whole image."""
        return Needs(received_attention=encoder.global_layers[-1:], embeddings=True)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep salient tokens and merge the rest, in raster order."""
        attention = item.received_attention[needs.received_attention[-1]]
        return self.merge(item, budget, as_frames(item).mean(dim=1), attention)

    def merge(self, item: VisualItem, budget: int, frame_features: Tensor, attention: Tensor) -> Selection:
        """Select by given `frame_features` `[frames, width]` and `attention` `[tokens]`."""
        frames, size = frame_shape(item)
        tokens = item.embeddings.float()
        index = torch.arange(len(item), device=tokens.device).view(frames, size)
        shares = largest_remainder(budget, [size] * frames)
        contexts = [int(share * self.context) for share in shares]
        is_salient = torch.zeros_like(index, dtype=torch.bool)
        for frame, scores in enumerate(attention.view(frames, size)):
            is_salient[frame, top_indices(scores, shares[frame] - contexts[frame])] = True
        merges = []  # the peaks of one anchor frame, and the tokens they absorb
        for start, stop in pairwise([*self.segment_starts(frame_features), frames]):
            rooms = [size - shares[frame] + contexts[frame] for frame in range(start, stop)]
            members = index[start:stop][~is_salient[start:stop]]
            for frame, count in self._peaks_per_frame(rooms, sum(contexts[start:stop])):
                candidates = index[start + frame][~is_salient[start + frame]]
                scores = peak_scores(distances(tokens[candidates]), NEIGHBOURS)
                merges.append((candidates[top_indices(scores, count)], members))
        anchor = torch.cat([index[is_salient], *(peaks for peaks, _ in merges)]).sort().values
        weight = torch.zeros(len(anchor), len(item), device=tokens.device)
        weight[torch.arange(len(anchor), device=tokens.device), anchor] = 1
        unit = normalize(tokens, dim=-1)
        for peaks, members in merges:
            nearest = (unit[members] @ unit[peaks].T).argmax(dim=1)
            absorbed = torch.bincount(nearest, minlength=len(peaks))
            own = (1 / (absorbed + 1)).clamp(min=self.beta)
            rows = torch.searchsorted(anchor, peaks)
            weight[rows, peaks] = own
            weight[rows[nearest], members] += ((1 - own) / absorbed)[nearest]
        return Selection(anchor, weight)

    def segment_starts(self, frame_features: Tensor) -> list[int]:
        """First frames of the segments: cuts between the least similar neighbours, and all below the threshold."""
        unit = normalize(frame_features.float(), dim=-1)
        similarity = (unit[1:] * unit[:-1]).sum(dim=-1)
        cut = similarity < self.threshold
        cut[similarity.argsort(stable=True)[: self.min_segments - 1]] = True
        return [0, *(cut.nonzero().flatten() + 1).tolist()]

    def _peaks_per_frame(self, rooms: list[int], total: int) -> list[tuple[int, int]]:
        """The anchor frames of a segment and how many of its `total` peaks each holds, by `rooms` of its frames."""
        for step in range(self.anchor_step, 0, -1):
            anchors = range(len(rooms))[::-step][::-1]
            if total <= sum(rooms[frame] for frame in anchors):
                break
        if self.compat == "official":
            total -= total % len(anchors)
        counts = largest_remainder(total, [rooms[frame] for frame in anchors])
        return [(frame, count) for frame, count in zip(anchors, counts, strict=True) if count]
