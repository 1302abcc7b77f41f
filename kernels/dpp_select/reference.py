"""Greedy MAP of a determinantal point process by an incremental Cholesky factor.

O(tokens * count * (dim + count)) time and O(tokens * count) memory; the kernel of all pairs is never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

_FLOOR = 1e-12


def dpp_select(tokens: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Pick `count` tokens that span as much volume as possible; indices `[count]` in order of choice.

    Beyond the rank of the tokens nothing is left to span, and what is picked is a matter of rounding.

    Args:
        tokens: `[tokens, dim]`; similarity is the cosine.
        relevance: `[tokens]`, not negative; scales the vector of each token.
        count: how many to pick.
    """
    unit = normalize(tokens.float(), dim=-1)
    vectors = relevance.float()[:, None] * unit
    order = torch.empty(count, dtype=torch.long, device=tokens.device)
    explained = vectors.new_zeros(count, len(vectors))  # row s: each vector's part along the s-th chosen direction
    # Squared length that the chosen ones do not explain; a sum of squares would break ties by its rounding.
    left = (unit.any(dim=-1) * relevance.float().square()).clamp(min=_FLOOR)
    for step in range(count):
        order[step] = chosen = left.argmax()
        along = vectors @ vectors[chosen] - explained[:step, chosen] @ explained[:step]
        # No part is longer than what is left: past the rank, rounding errors would otherwise grow without bound.
        longest = left.clamp(min=0).sqrt()
        explained[step] = torch.clamp(along / longest[chosen], -longest, longest)
        left = (left - explained[step].square()).clamp(min=_FLOOR)
        left[order[: step + 1]] = -torch.inf
    return order
