"""Ground truth: softmax rows of chosen queries, one query and head at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None = None,
    first_key: Tensor | None = None,
    heads: str | None = None,
    rows: str | None = None,
) -> Tensor:
    """Softmax rows `[batch, heads, rows, keys]` of `query` over `key` from `first_key` to `last_key`; then joined."""
    group = query.shape[1] // key.shape[1]
    out = torch.full((*query.shape[:3], key.shape[2]), float("nan"))
    for b, h, r in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).view(-1, 3).tolist():
        first = 0 if first_key is None else int(first_key[r])
        end = key.shape[2] if last_key is None else int(last_key[r]) + 1
        logits = key[b, h // group, first:end].float() @ query[b, h, r].float() * scaling
        out[b, h, r] = 0.0
        out[b, h, r, first:end] = logits.softmax(dim=0)
    for join, dim in ((heads, 1), (rows, -2)):
        if join is not None:
            out = {"mean": out.mean(dim), "sum": out.sum(dim), "max": out.amax(dim)}[join]
    return out
