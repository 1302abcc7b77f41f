"""AIM, second part: layer by layer, prune the visual tokens that rank lowest on the LLM's attention graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmcompress import ops
from mmcompress.errors import SpecError
from mmcompress.llm_method import LLMFacts, LLMMethod, LLMNeeds, PromptRow, RowAttention
from mmcompress.ranking import top_indices
from mmcompress.registry import register
from mmcompress.types import Selection

_DEPTH, _BEGIN_AND_END, _STEPS = 28, (15, 22), 8
_TEMPERATURE, _ITERATIONS = 0.1, 5


@register(
    "aim-pruning",
    summary="PageRank pruning in LLM layers until no visual token is left (second part of aim).",
    family="LLM attention",
    stage="in_llm",
    takes_keep=False,
    paper="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning, arXiv:2412.03248",
    licence="Apache-2.0",
)
@dataclass(frozen=True)
class AIMPruning(LLMMethod):
    """From layer l1 on, an equal share of the visual tokens that entered goes after every layer (Section 3).

    After 8 layers none is left: in Qwen2 the first ones are removed before layer 15 of 28, the last before layer 22.
    Other depths begin and end in proportion, still in at most 8 layers on end; with fewer, shares are larger. What
    ranks lowest on the attention graph of a layer is removed before the next one, where the authors' code only masks
    it; see `importance`.

    Args:
        first: l1, numbered from 0: 14 in Qwen2, in others in proportion unless given. For Vicuna the authors take 13.
        steps: before how many layers tokens are removed.
    """

    first: int | None = None
    steps: int | None = None

    def needs(self, llm: LLMFacts) -> LLMNeeds:
        """The attention of the layer before."""
        return LLMNeeds(previous=True)

    def layers(self, llm: LLMFacts) -> tuple[int, ...]:
        """Those behind layer l1, one after the other."""
        begin, end = llm.scale_layers(_BEGIN_AND_END, _DEPTH)
        first = begin - 1 if self.first is None else self.first
        steps = min(_STEPS, end - first) if self.steps is None else self.steps
        if first < 0 or not 0 < steps < llm.layers - first:
            raise SpecError(
                f"aim-pruning: first={first} and steps={steps} do not fit an LLM of {llm.layers} layers; tokens can be "
                f"removed before layers 1..{llm.layers - 1}."
            )
        return tuple(range(first + 1, first + 1 + steps))

    def schedule(self, tokens: int, keep: int, ratio: float, llm: LLMFacts) -> list[int]:
        """An equal share less every time, down to none."""
        steps = len(self.layers(llm))
        return [tokens * (steps - step) // steps for step in range(1, steps + 1)]

    def select(self, row: PromptRow, left: int) -> Selection:
        """The most important tokens, in raster order."""
        assert row.previous is not None
        return Selection(top_indices(importance(row.previous)[row.visual], left))


def importance(attention: RowAttention, visible: Tensor | None = None) -> Tensor:
    """PageRank on the causal attention of a row at a low temperature, heads joined by the root of their mean square.

    All tokens begin alike; what flows to keys of earlier turns is lost.

    Args:
        attention: queries and keys of all the row's tokens.
        visible: `[tokens]` bool, the tokens that are seen, for the authors' form, in which tokens that were pruned
            before are only masked: nobody sees them, yet their own rows count. All unless given.

    Returns:
        `[tokens]` in float32.
    """
    query, past, tokens = attention.query[None], attention.past, attention.query.shape[1]
    if visible is None:
        visible = torch.ones(tokens, dtype=torch.bool, device=query.device)
    seen = torch.cat([visible.new_ones(past), visible])
    key, last_key = attention.key[None, :, seen], seen.cumsum(dim=0)[past:] - 1
    scaling = attention.scaling / _TEMPERATURE
    lse = ops.attention_lse(query, key, scaling, last_key)
    scores = torch.full_like(lse, 1 / tokens)
    for _ in range(_ITERATIONS):
        received = ops.weighted_colsum(query, key, scaling, last_key, lse, scores)
        scores = torch.zeros_like(scores)
        scores[..., visible] = received[..., past:]
    return scores[0].square().mean(dim=0).sqrt()
