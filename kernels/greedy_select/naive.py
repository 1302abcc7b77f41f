"""Ground truth: every step compares every candidate with every chosen token."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_select(tokens: Tensor, count: int, pivot: int | None, objective: str) -> Tensor:
    """Indices `[count]` in order of choice, `pivot` first; without one, the token farthest from all others."""
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
