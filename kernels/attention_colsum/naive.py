"""Ground truth: build the whole attention map and sum its columns."""

from __future__ import annotations

from torch import Tensor


def attention_colsum(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Column sums `[batch, keys]` of softmax(Q K^T), over heads and queries."""
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    attention = (query.float() @ keys.transpose(-1, -2) * scaling).softmax(dim=-1)
    return attention.sum(dim=(1, 2))
