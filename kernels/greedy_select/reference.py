"""Greedy diversity with one running score per token: O(tokens * count * dim) time, O(tokens) extra memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def greedy_select(tokens: Tensor, count: int, pivot: Tensor | int, objective: str) -> Tensor:
    """Pick `count` mutually dissimilar tokens, starting from `pivot`; indices `[count]` in order of choice.

    Args:
        tokens: `[tokens, dim]`; similarity is the cosine.
        count: how many to pick.
        pivot: index of the first.
        objective: "max-sum" minimises the summed similarity to all chosen ones, "k-center" the largest.
    """
    unit = normalize(tokens.float(), dim=-1)
    order = torch.empty(count, dtype=torch.long, device=tokens.device)
    order[0] = pivot
    closeness = unit @ unit[order[0]]
    closeness[order[0]] = torch.inf
    for step in range(1, count):
        order[step] = closeness.argmin()
        to_new = unit @ unit[order[step]]
        closeness = closeness + to_new if objective == "max-sum" else torch.maximum(closeness, to_new)
        closeness[order[step]] = torch.inf
    return order
