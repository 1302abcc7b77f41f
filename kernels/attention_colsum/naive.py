"""Ground truth: one query and head at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def attention_colsum(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None = None,
    first_key: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Column sums `[batch, keys]` of softmax(Q K^T), over heads and queries."""
    if lse is None:
        lse = attention_lse(query, key, scaling, last_key, first_key)
    return weighted_colsum(query, key, scaling, last_key, lse, torch.ones_like(lse), first_key).sum(dim=1)


def attention_lse(
    query: Tensor, key: Tensor, scaling: float, last_key: Tensor | None = None, first_key: Tensor | None = None
) -> Tensor:
    """Logarithms `[batch, heads, queries]` of the sums of exponentiated logits."""
    lse = torch.full(query.shape[:3], float("nan"))
    for place, _, logits in _rows(query, key, scaling, last_key, first_key):
        lse[place] = logits.logsumexp(dim=0)
    return lse


def weighted_colsum(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None,
    lse: Tensor,
    weight: Tensor,
    first_key: Tensor | None = None,
) -> Tensor:
    """Column sums `[batch, heads, keys]` of rows normalised by `lse` and counted `weight` times."""
    total = torch.zeros(*query.shape[:2], key.shape[2])
    for (b, h, r), seen, logits in _rows(query, key, scaling, last_key, first_key):
        total[b, h, seen] += weight[b, h, r] * (logits - lse[b, h, r]).exp()
    return total


def _rows(
    query: Tensor, key: Tensor, scaling: float, last_key: Tensor | None, first_key: Tensor | None
) -> Iterator[tuple[tuple[int, int, int], slice, Tensor]]:
    """Batch entry, head and number of every query, the keys it sees, and their logits."""
    group = query.shape[1] // key.shape[1]
    for b, h, r in itertools.product(*map(range, query.shape[:3])):
        first = 0 if first_key is None else int(first_key[r])
        seen = slice(first, key.shape[2] if last_key is None else max(first, int(last_key[r]) + 1))
        yield (b, h, r), seen, key[b, h // group, seen].float() @ query[b, h, r].float() * scaling
