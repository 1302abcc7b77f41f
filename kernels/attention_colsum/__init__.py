"""Column sums of attention and the normalisers they need, without the attention map."""

from __future__ import annotations

from torch import Tensor

from mmcompress.kernels.attention_colsum import reference
from mmcompress.kernels.dispatch import dispatched, of_one_dtype

WIDEST = 256


def _refuse(query: Tensor, key: Tensor, *_: object, **__: object) -> str:
    return of_one_dtype(query, key) or (f"head size {query.shape[-1]} above {WIDEST}" * (query.shape[-1] > WIDEST))


def _fake_lse(
    query: Tensor, key: Tensor, scaling: float, last_key: Tensor | None = None, first_key: Tensor | None = None
) -> Tensor:
    return query.new_empty(query.shape[:3]).float()


def _fake_weighted(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None,
    lse: Tensor,
    weight: Tensor,
    first_key: Tensor | None = None,
) -> Tensor:
    return query.new_empty(*query.shape[:2], key.shape[2]).float()


def _fake_colsum(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None = None,
    first_key: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    return query.new_empty(query.shape[0], key.shape[2]).float()


attention_lse = dispatched(__name__, reference.attention_lse, _fake_lse, _refuse)
weighted_colsum = dispatched(__name__, reference.weighted_colsum, _fake_weighted, _refuse)
attention_colsum = dispatched(__name__, reference.attention_colsum, _fake_colsum, _refuse)
