"""SpecPC: keep the tokens that a smaller model attends to when it reads the prompt first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.registry import register
from mmcompress.types import DraftNeeds, EncoderFacts, Needs, Selection, VisualItem


@register(
    "specpc",
    summary="Tokens that a smaller model attends to at the end of the prompt, and their neighbours.",
    family="draft attention",
    paper="Draft-based Approximate Inference for LLMs, arXiv:2506.08373",
    licence="Apache-2.0",
    requires=("draft",),
)
@dataclass(frozen=True)
class SpecPC(VisualMethod):
    """A draft model reads the whole prompt; the last tokens' attention in its upper layers says what matters.

    The paper prunes prompts of text; here text stays, and the tokens of each image compete among themselves.

    Args:
        draft: folder of a smaller model of the same family, with the same tokens for text and pictures.
        window: the prompt's last tokens, which observe, the later ones with more weight.
        skip: share of the draft's first layers that do not count; the paper reads from the 9th of 16 on.
        kernel: tokens in a row of which the highest score counts; the paper's 32 are of text.
        neighbours: tokens around a chosen one that are chosen with it, itself included; likewise.
    """

    draft: str | None = None
    window: int = 64
    skip: float = 0.5
    kernel: int = 3
    neighbours: int = 1

    def __post_init__(self) -> None:
        for option, least in (("window", 2), ("kernel", 1), ("neighbours", 1)):
            if getattr(self, option) < least:
                raise SpecError(f"specpc: {option}={getattr(self, option)} must be at least {least}.")
        if not 0 <= self.skip < 1:
            raise SpecError(f"specpc: skip={self.skip} must be at least 0 and less than 1.")

    def needs(self, encoder: EncoderFacts) -> Needs:
        """What the draft attends to."""
        if self.draft is None:
            return Needs()
        return Needs(draft=DraftNeeds(self.draft, self.window, self.skip, self.observe))

    def observe(self, rows: Tensor) -> Tensor:
        """The highest attention that a token gets in a layer; that of the window's first query does not count."""
        weight = torch.linspace(0, 1, rows.shape[1], device=rows.device)
        return (rows * weight[:, None]).amax(dim=(0, 1))

    def ranked(self, scores: Tensor, count: int) -> Tensor:
        """At least `count` tokens in the order they are taken: the best by pooled score, each with its neighbours."""
        pooled = max_pool1d(pad(scores[None], ((self.kernel - 1) // 2, self.kernel // 2)), self.kernel, stride=1)[0]
        before = (self.neighbours - 1) // 2
        offsets = torch.tensor(sorted(range(-before, self.neighbours - before), key=abs), device=scores.device)
        # Pooling makes many scores equal, and topk takes of these what it takes in the authors' code.
        chosen = (pooled.topk(count).indices[:, None] + offsets).clamp(0, len(scores) - 1).flatten()
        turn = torch.arange(len(chosen), device=scores.device)
        first = torch.full((len(scores),), len(chosen), device=scores.device).scatter_reduce(0, chosen, turn, "amin")
        return first.argsort()[: len(chosen.unique())]

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the first of this order, by the highest score of all layers."""
        assert item.drafted is not None
        return Selection(self.ranked(item.drafted.amax(dim=0), budget)[:budget].sort().values)
