"""Greedy diversity with one running score per token: O(tokens * count * dim) time, O(tokens) extra memory.

To find a pivot takes O(tokens^2 * dim) time, in blocks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROWS_AT_ONCE = 512


def greedy_select(tokens: Tensor, count: int, pivot: Tensor | int | None, objective: str) -> Tensor:
    """Pick `count` mutually dissimilar tokens, starting from `pivot`; indices `[count]` in order of choice.

    Args:
        tokens: `[tokens, dim]`; similarity is the cosine.
        count: how many to pick.
        pivot: index of the first; None takes the token that is least similar to its most similar other.
        objective: "max-sum" minimises the summed similarity to all chosen ones, "k-center" the largest.
    """
    unit = normalize(tokens.float(), dim=-1)
    order = torch.empty(count, dtype=torch.long, device=tokens.device)
    order[0] = _most_isolated(unit) if pivot is None else pivot
    closeness = unit @ unit[order[0]]
    closeness[order[0]] = torch.inf
    for step in range(1, count):
        order[step] = closeness.argmin()
        to_new = unit @ unit[order[step]]
        closeness = closeness + to_new if objective == "max-sum" else torch.maximum(closeness, to_new)
        closeness[order[step]] = torch.inf
    return order


def _most_isolated(unit: Tensor) -> Tensor:
    """Index of the row of `unit` that is least similar to its most similar other; no square matrix is built."""
    closest = []
    for start in range(0, len(unit), ROWS_AT_ONCE):
        similarity = unit[start : start + ROWS_AT_ONCE] @ unit.T
        similarity.diagonal(start).fill_(-torch.inf)
        closest.append(similarity.amax(dim=1))
    return torch.cat(closest).argmin()
