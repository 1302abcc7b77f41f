"""What several policies make of attention rows: one score per entry and KV head, smoothed along the sequence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

GroupReduction = Literal["mean", "max", "sum"]
Pooling = Literal["avg", "max"]


def reduce_group(scores: Tensor, reduction: GroupReduction) -> Tensor:
    """`[kv_heads, group, ...]` over the query heads that share a KV head (GQA), `[kv_heads, ...]`."""
    if reduction == "max":
        return scores.amax(dim=1)
    return scores.mean(dim=1) if reduction == "mean" else scores.sum(dim=1)


def pool(scores: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """`[kv_heads, entries]` over the `kernel`, an odd number, nearest entries; beyond the ends there are zeros."""
    if pooling == "max":
        return max_pool1d(scores[None], kernel, stride=1, padding=kernel // 2)[0]
    return avg_pool1d(scores[None], kernel, stride=1, padding=kernel // 2)[0]


def text_first(scores: Tensor, visual: Tensor) -> Tensor:
    """Scores at least 0 `[kv_heads, entries]`, those of text raised above all that are `visual`."""
    return torch.where(visual, scores, scores + scores.where(visual, 0.0).amax(dim=1, keepdim=True))
