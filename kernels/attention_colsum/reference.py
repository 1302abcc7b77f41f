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
    keys = _keys(query, key)
    total = torch.zeros(key.shape[0], key.shape[2], device=key.device)
    for rows in query.float().split(block, dim=2):
        total += (rows @ keys * scaling).softmax(dim=-1).sum(dim=(1, 2))
    return total


def attention_lse(query: Tensor, key: Tensor, scaling: float, last_key: Tensor, block: int = 128) -> Tensor:
    """What normalises the rows of causal attention: log-sum-exp of their logits, `[batch, heads, queries]` in float32.

    Args:
        query: `[batch, heads, queries, dim]`.
        key: `[batch, kv_heads, keys, dim]`; kv_heads divides heads (GQA).
        scaling: factor on the logits.
        last_key: `[queries]`, the last key that each query sees; -1 if none.
        block: queries per step.
    """
    keys = _keys(query, key)
    blocks = zip(query.float().split(block, dim=2), last_key.split(block), strict=True)
    return torch.cat(
        [
            (rows @ keys * scaling).masked_fill(_hidden(keys, last), -torch.inf).logsumexp(dim=-1)
            for rows, last in blocks
        ],
        dim=2,
    )


def weighted_colsum(
    query: Tensor, key: Tensor, scaling: float, last_key: Tensor, lse: Tensor, weight: Tensor, block: int = 128
) -> Tensor:
    """Weighted column sums v' = v P of causal attention, `[batch, heads, keys]` in float32.

    Args:
        query: `[batch, heads, queries, dim]`.
        key: `[batch, kv_heads, keys, dim]`; kv_heads divides heads (GQA).
        scaling: factor on the logits.
        last_key: `[queries]`, the last key that each query sees; -1 if none.
        lse: `[batch, heads, queries]`, of each row's logits, see `attention_lse`.
        weight: `[batch, heads, queries]`, how much each row counts.
        block: queries per step.
    """
    keys = _keys(query, key)
    total = torch.zeros(*query.shape[:2], key.shape[2], device=key.device)
    blocks = zip(
        query.float().split(block, dim=2),
        last_key.split(block),
        lse.split(block, dim=2),
        weight.split(block, dim=2),
        strict=True,
    )
    for rows, last, normaliser, mass in blocks:
        attention = (rows @ keys * scaling - normaliser[..., None]).exp().masked_fill(_hidden(keys, last), 0.0)
        total += (mass[:, :, None] @ attention)[:, :, 0]
    return total


def _keys(query: Tensor, key: Tensor) -> Tensor:
    """The keys of every query head, `[batch, heads, dim, keys]`."""
    return key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2)


def _hidden(keys: Tensor, last_key: Tensor) -> Tensor:
    return torch.arange(keys.shape[-1], device=keys.device) > last_key[:, None]
