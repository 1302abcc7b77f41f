"""Ground truth: image by image, every step compares every candidate with every chosen token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def greedy_select(
    tokens: Sequence[Tensor], counts: Sequence[int], pivots: Sequence[Tensor] | None, objective: str
) -> list[Tensor]:
    """Indices `[count]` of each image in order of choice; without a pivot, from the token farthest from all others."""
    firsts = [None] * len(tokens) if pivots is None else [int(pivot) for pivot in pivots]
    return [_select(*image, objective) for image in zip(tokens, counts, firsts, strict=True)]


def _select(tokens: Tensor, count: int, pivot: int | None, objective: str) -> Tensor:
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    similarity = unit @ unit.T
    if pivot is None:
        everyone = range(len(tokens))
        closest = [max((float(similarity[i, j]) for j in everyone if j != i), default=0.0) for i in everyone]
        pivot = closest.index(min(closest))
    chosen = [pivot]
    while len(chosen) < count:
        candidates = [i for i in range(len(tokens)) if i not in chosen]
        to_chosen = similarity[candidates][:, chosen]
        closeness = to_chosen.sum(dim=1) if objective == "max-sum" else to_chosen.max(dim=1).values
        chosen.append(candidates[int(closeness.argmin())])
    return torch.tensor(chosen)
