"""Ground truth: build the whole attention map and sum its columns; or go through it one query and head at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def attention_colsum(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """Column sums `[batch, keys]` of softmax(Q K^T), over heads and queries."""
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, dim=1)
    attention = (query.float() @ keys.transpose(-1, -2) * scaling).softmax(dim=-1)
    return attention.sum(dim=(1, 2))


def attention_lse(query: Tensor, key: Tensor, scaling: float, last_key: Tensor) -> Tensor:
    """Logarithms `[batch, heads, queries]` of the sums of exponentiated logits."""
    lse = torch.full(query.shape[:3], float("nan"))
    for place, logits in _rows(query, key, scaling, last_key):
        lse[place] = logits.logsumexp(dim=0)
    return lse


def weighted_colsum(
    query: Tensor, key: Tensor, scaling: float, last_key: Tensor, lse: Tensor, weight: Tensor
) -> Tensor:
    """Column sums `[batch, heads, keys]` of rows normalised by `lse` and counted `weight` times."""
    total = torch.zeros(*query.shape[:2], key.shape[2])
    for (b, h, r), logits in _rows(query, key, scaling, last_key):
        total[b, h, : len(logits)] += weight[b, h, r] * (logits - lse[b, h, r]).exp()
    return total


def _rows(
    query: Tensor, key: Tensor, scaling: float, last_key: Tensor
) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """Batch entry, head and number of every query, with the logits of the keys it sees."""
    group = query.shape[1] // key.shape[1]
    for b, h, r in itertools.product(*map(range, query.shape[:3])):
        yield (b, h, r), key[b, h // group, : int(last_key[r]) + 1].float() @ query[b, h, r].float() * scaling
