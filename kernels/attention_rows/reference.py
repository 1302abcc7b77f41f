"""Softmax rows of chosen queries in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

JOIN: dict[str, Callable[..., Tensor]] = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}


def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None = None,
    first_key: Tensor | None = None,
    heads: str | None = None,
    rows: str | None = None,
) -> Tensor:
    """Softmax rows `[batch, heads, rows, keys]` in float32.

    With `first_key` and `last_key` a packed batch is one entry: each row sees the keys of its own sequence.

    Args:
        query: `[batch, heads, rows, dim]`, the few queries whose rows are wanted.
        key: `[batch, kv_heads, keys, dim]`; kv_heads divides heads (GQA).
        scaling: factor on the logits.
        last_key: `[rows]`, the last key that each row sees, for causal attention; all see all keys if it is None.
        first_key: `[rows]`, the first one, likewise.
        heads: "mean", "sum" or "max" over heads, which are then no dimension of the result.
        rows: likewise over rows, after heads.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    logits = query.float() @ keys.transpose(-1, -2) * scaling
    for hidden in hidden_keys(key, last_key, first_key):
        logits = logits.masked_fill(hidden, -torch.inf)
    attention = logits.softmax(dim=-1)
    if heads is not None:
        attention = JOIN[heads](attention, dim=1)
    return attention if rows is None else JOIN[rows](attention, dim=-2)


def hidden_keys(key: Tensor, last_key: Tensor | None, first_key: Tensor | None) -> list[Tensor]:
    """Which keys are behind the last one that each row sees, and before the first, `[rows, keys]` each."""
    places = torch.arange(key.shape[2], device=key.device)
    behind = [] if last_key is None else [places > last_key[:, None]]
    return behind if first_key is None else [*behind, places < first_key[:, None]]
