"""Column sums of attention in blocks of queries: the map never exists."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_colsum(query: Tensor, key: Tensor, scaling: float, block: int = 128) -> Tensor:
    """Column sums `[batch, keys]` of softmax(Q K^T) over heads and queries, in float32.

    Memory is `batch * heads * block * keys`.

    Args:
        query: `[batch, heads, queries, dim]`.
        key: `[batch, kv_heads, keys, dim]`; kv_heads divides heads (GQA).
        scaling: factor on the logits.
        block: queries per step.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1).transpose(-1, -2)
    total = torch.zeros(key.shape[0], key.shape[2], device=key.device)
    for rows in query.float().split(block, dim=2):
        total += (rows @ keys * scaling).softmax(dim=-1).sum(dim=(1, 2))
    return total
