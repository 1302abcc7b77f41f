"""Softmax rows of a few queries over all keys; rows and heads may be joined on the way."""

from __future__ import annotations

from torch import Tensor

from mmcompress.kernels.attention_rows import reference
from mmcompress.kernels.dispatch import dispatched, of_one_dtype


def _fake(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None = None,
    first_key: Tensor | None = None,
    heads: str | None = None,
    rows: str | None = None,
) -> Tensor:
    kept = [size for size, joined in zip(query.shape[1:3], (heads, rows), strict=True) if joined is None]
    return query.new_empty(query.shape[0], *kept, key.shape[2]).float()


def _refuse(query: Tensor, key: Tensor, *_: object, **__: object) -> str:
    return of_one_dtype(query, key)


attention_rows = dispatched(__name__, reference.attention_rows, _fake, _refuse)
