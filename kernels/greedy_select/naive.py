"""Ground truth: every step compares every candidate with every chosen token."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_select(tokens: Tensor, count: int, pivot: int, objective: str) -> Tensor:
    """Indices `[count]` in order of choice, `pivot` first."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=-1)
    similarity = unit @ unit.T
    chosen = [pivot]
    while len(chosen) < count:
        candidates = [i for i in range(len(tokens)) if i not in chosen]
        to_chosen = similarity[candidates][:, chosen]
        closeness = to_chosen.sum(dim=1) if objective == "max-sum" else to_chosen.max(dim=1).values
        chosen.append(candidates[int(closeness.argmin())])
    return torch.tensor(chosen)
