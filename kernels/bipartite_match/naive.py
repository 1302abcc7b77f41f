"""Ground truth: one token at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def bipartite_match(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of each even token with an odd one, and which one that is."""
    *lead, tokens, _ = metric.shape
    best = torch.full((*lead, (tokens + 1) // 2), float("nan"))
    nearest = torch.full(best.shape, -1)
    for entry in itertools.product(*map(range, lead)):
        unit = torch.nn.functional.normalize(metric[entry].float(), dim=-1)
        for place in range(0, tokens, 2):
            cosines = [float(unit[place] @ other) for other in unit[1::2]]
            best[(*entry, place // 2)] = max(cosines)
            nearest[(*entry, place // 2)] = cosines.index(max(cosines))
    return best, nearest


def merge_tokens(values: Tensor, group: Tensor, outputs: int) -> Tensor:
    """Each output is the sum of the tokens in its group."""
    exact = torch.float32 if values.is_floating_point() else values.dtype
    merged = torch.zeros(*values.shape[:-2], outputs, values.shape[-1], dtype=exact)
    for place in itertools.product(*map(range, group.shape)):
        merged[(*place[:-1], int(group[place]))] += values[place]
    return merged.to(values.dtype)
