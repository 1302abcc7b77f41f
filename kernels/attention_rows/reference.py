"""Softmax rows of chosen queries in plain torch."""

from __future__ import annotations

from torch import Tensor


def attention_rows(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Softmax rows `[batch, heads, rows, keys]` in float32.

    Args:
        query: `[batch, heads, rows, dim]`, the few queries whose rows are wanted.
        key: `[batch, kv_heads, keys, dim]`; kv_heads divides heads (GQA).
        scaling: factor on the logits.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    return (query.float() @ keys.transpose(-1, -2) * scaling).softmax(dim=-1)
