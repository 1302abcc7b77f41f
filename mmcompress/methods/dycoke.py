"""DyCoke, first stage: of every four frames one stays whole, the others keep what differs from a frame before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cosine_similarity

from mmcompress.budget import largest_remainder
from mmcompress.frames import as_frames
from mmcompress.method import VisualMethod
from mmcompress.methods.uniform import Uniform
from mmcompress.registry import register
from mmcompress.types import EncoderFacts, Needs, Selection, VisualItem

GROUP = 4

# Frame -> the frame it is compared with; a frame compared with itself stays whole.
Plan = dict[int, int]


@register(
    "dycoke",
    summary="Temporal token merging: frames keep what differs from their group's earlier frames (first stage).",
    family="video pruning",
    paper="DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models, arXiv:2411.15024",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class DyCoke(VisualMethod):
    """Compare frames position by position in groups of four (token temporal merging) and keep what differs.

    Frames 1 and 3 of a group are compared with the frame before them, frame 2 with frame 0, which stays whole; the
    last group may be short. The compared frames share equally what the whole frames leave of the budget, which is
    the paper's merging ratio solved for the budget. A budget too small for the whole frames is met by the same rule
    on every fourth frame, every sixteenth, and so on; one too small for a single frame has no frame to compare with
    and keeps evenly spaced tokens of the item. The latter holds for every image, which is one frame unless its planes
    have one size: then each is a frame.

    Args:
        compat: "official" follows the authors' code, which never compares frame 2 of the last group, drops an odd
            last frame, truncates the frames' shares and orders a frame's tokens by ascending similarity. A budget
            its whole frames do not fit into is met on every fourth frame, as by default.
    """

    compat: Literal["none", "official"] = "none"

    @property
    def exact_count(self) -> bool:
        """Whether the frames' shares use up the budget."""
        return self.compat == "none"

    def needs(self, encoder: EncoderFacts) -> Needs:
        """The embeddings, which are compared between frames."""
        return Needs(embeddings=True)

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the whole frames and the least similar tokens of the compared ones."""
        frames = as_frames(item)
        size = frames.shape[1]
        plan = next((plan for plan in self._plans(len(frames)) if _whole(plan) * size <= budget), None)
        if plan is None:
            return Uniform().select(item, budget, needs)
        compared = len(plan) - _whole(plan)
        left = min(budget - _whole(plan) * size, compared * size)
        if self.compat == "official":
            left -= left % compared
        shares = iter(largest_remainder(left, [size] * compared))
        kept = []
        for frame, reference in plan.items():
            order = torch.arange(size, device=frames.device)
            if frame != reference:
                similarity = cosine_similarity(frames[frame], frames[reference], dim=-1)
                order = similarity.argsort(stable=True)[: next(shares)]
            kept.append(frame * size + order)
        anchor = torch.cat(kept)
        return Selection(anchor if self.compat == "official" else anchor.sort().values)

    def _plans(self, frames: int) -> Iterator[Plan]:
        """The plans to try, from most whole frames to least; none for a single frame."""
        if self.compat == "official" and frames > 1:
            pairs = {frame: frame - frame % 2 for frame in range(frames - frames % 2)}
            yield pairs | {frame + 2: frame for frame in range(0, frames - GROUP, GROUP)}
        stride = 1
        while stride < frames:
            yield {frame: _reference(frame // stride) * stride for frame in range(0, frames, stride)}
            stride *= GROUP


def _reference(frame: int) -> int:
    return frame - frame % GROUP + (0, 0, 0, 2)[frame % GROUP]


def _whole(plan: Plan) -> int:
    return sum(frame == reference for frame, reference in plan.items())
