"""Ground truth: softmax rows of chosen queries, one query and head at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(query: Tensor, key: Tensor, scaling: float, last_key: Tensor | None = None) -> Tensor:
    """Softmax rows `[batch, heads, rows, keys]` of `query` `[batch, heads, rows, dim]` over `key` up to `last_key`."""
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    out = torch.full((batch, heads, rows, key.shape[2]), float("nan"))
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                seen = key.shape[2] if last_key is None else int(last_key[r]) + 1
                logits = key[b, h // group, :seen].float() @ query[b, h, r].float() * scaling
                out[b, h, r] = 0.0
                out[b, h, r, :seen] = logits.softmax(dim=0)
    return out
