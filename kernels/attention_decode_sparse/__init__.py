"""Attention of the newest token over some pages of a cache, and the bounds by which pages are chosen."""

from __future__ import annotations

from torch import Tensor

from mmcompress.kernels.attention_decode_sparse import reference
from mmcompress.kernels.dispatch import FLOATS, dispatched, of_one_dtype

WIDEST = 256


def _fake_decode(query: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_empty(query.shape)


def _refuse_decode(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> str:
    return of_one_dtype(query, key, value) or refuse_head_size(query)


def refuse_head_size(query: Tensor) -> str:
    """What is wrong where heads are too wide to be held at once."""
    return f"head size {query.shape[-1]} above {WIDEST}" if query.shape[-1] > WIDEST else ""


def _fake_bounds(key: Tensor, page: int) -> tuple[Tensor, Tensor]:
    shape = (*key.shape[:2], (key.shape[2] + page - 1) // page, key.shape[3])
    return key.new_empty(shape), key.new_empty(shape)


def _refuse_bounds(key: Tensor, page: int) -> str:
    return "" if key.dtype in FLOATS else f"dtype {key.dtype}"


attention_decode_sparse = dispatched(__name__, reference.attention_decode_sparse, _fake_decode, _refuse_decode)
page_bounds = dispatched(__name__, reference.page_bounds, _fake_bounds, _refuse_bounds)
