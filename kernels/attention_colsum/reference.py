"""Column sums of attention in blocks of queries: the map never exists."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 128
"""Queries per step; memory is `batch * heads * BLOCK * keys`."""


def attention_colsum(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None = None,
    first_key: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Column sums `[batch, keys]` of softmax(Q K^T) over heads and queries, in float32.

    Args:
        query: `[batch, heads, queries, dim]`.
        key: `[batch, kv_heads, keys, dim]`; kv_heads divides heads (GQA).
        scaling: factor on the logits.
        last_key: `[queries]`, the last key that each query sees, -1 if none; all see all keys if it is None.
        first_key: `[queries]`, the first one, likewise.
        lse: `[batch, heads, queries]`, of each row's logits, where the attention call returned it.
    """
    total = torch.zeros(key.shape[0], key.shape[2], device=key.device)
    for block, logits, hidden in _blocks(query, key, scaling, last_key, first_key):
        if lse is None:
            attention = _filled(logits, hidden, -torch.inf).softmax(dim=-1)
        else:
            attention = (logits - lse[:, :, block, None]).exp()
        total += _filled(attention, hidden, 0.0).sum(dim=(1, 2))
    return total


def attention_lse(
    query: Tensor, key: Tensor, scaling: float, last_key: Tensor | None = None, first_key: Tensor | None = None
) -> Tensor:
    """What normalises the rows of attention: log-sum-exp of their logits, `[batch, heads, queries]` in float32.

    Args:
        query: `[batch, heads, queries, dim]`.
        key: `[batch, kv_heads, keys, dim]`; kv_heads divides heads (GQA).
        scaling: factor on the logits.
        last_key: `[queries]`, the last key that each query sees, -1 if none; all see all keys if it is None.
        first_key: `[queries]`, the first one, likewise.
    """
    blocks = _blocks(query, key, scaling, last_key, first_key)
    return torch.cat([_filled(logits, hidden, -torch.inf).logsumexp(dim=-1) for _, logits, hidden in blocks], dim=2)


def weighted_colsum(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None,
    lse: Tensor,
    weight: Tensor,
    first_key: Tensor | None = None,
) -> Tensor:
    """Weighted column sums v' = v P of attention, `[batch, heads, keys]` in float32.

    Args:
        query: `[batch, heads, queries, dim]`.
        key: `[batch, kv_heads, keys, dim]`; kv_heads divides heads (GQA).
        scaling: factor on the logits.
        last_key: `[queries]`, the last key that each query sees, -1 if none; all see all keys if it is None.
        lse: `[batch, heads, queries]`, of each row's logits, see `attention_lse`.
        weight: `[batch, heads, queries]`, how much each row counts.
        first_key: `[queries]`, the first key that each query sees, likewise.
    """
    total = torch.zeros(*query.shape[:2], key.shape[2], device=key.device)
    for block, logits, hidden in _blocks(query, key, scaling, last_key, first_key):
        attention = _filled((logits - lse[:, :, block, None]).exp(), hidden, 0.0)
        total += (weight[:, :, None, block] @ attention)[:, :, 0]
    return total


def _blocks(
    query: Tensor, key: Tensor, scaling: float, last_key: Tensor | None, first_key: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Some queries at a time, their logits `[batch, heads, queries, keys]`, and the keys they do not see, if any."""
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2)
    places = torch.arange(key.shape[2], device=key.device)
    for start in range(0, query.shape[2], BLOCK):
        block, hidden = slice(start, start + BLOCK), None
        if last_key is not None:
            hidden = places > last_key[block, None]
        if first_key is not None:
            before = places < first_key[block, None]
            hidden = before if hidden is None else hidden | before
        yield block, query[:, :, block].float() @ keys * scaling, hidden


def _filled(values: Tensor, hidden: Tensor | None, value: float) -> Tensor:
    return values if hidden is None else values.masked_fill(hidden, value)
