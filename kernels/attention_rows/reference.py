"""Softmax rows of chosen queries in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(query: Tensor, key: Tensor, scaling: float, last_key: Tensor | None = None) -> Tensor:
    """Softmax rows `[batch, heads, rows, keys]` in float32.

    Args:
        query: `[batch, heads, rows, dim]`, the few queries whose rows are wanted.
        key: `[batch, kv_heads, keys, dim]`; kv_heads divides heads (GQA).
        scaling: factor on the logits.
        last_key: `[rows]`, the last key that each row sees, for causal attention; all see all keys if it is None.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    logits = query.float() @ keys.transpose(-1, -2) * scaling
    if last_key is not None:
        hidden = torch.arange(key.shape[2], device=key.device) > last_key[:, None]
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(dim=-1)
