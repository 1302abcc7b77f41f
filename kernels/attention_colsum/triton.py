"""One pass over the keys per block of queries for the normalisers, one over the queries per block of keys for the sums.

Blocks that causality or packing hides are left out. Heads are summed by torch, so that the order is always the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompress.kernels.dispatch.triton import keys_seen, multiply, vectors, vectors_across


@triton.jit
def _lse(
    query,
    key,
    last_key,
    first_key,
    lse,
    scaling,
    heads,
    group,
    rows,
    keys,
    query_batch,
    query_head,
    query_row,
    query_dim,
    key_batch,
    key_head,
    key_row,
    key_dim,
    HAS_LAST: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    entry, row = tl.program_id(1), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, head, dim = entry // heads, entry % heads, tl.arange(0, DIM)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    left = vectors(query + row * query_row, row < rows, dim, query_dim, WIDTH)
    first, end = 0, keys
    if HAS_LAST:
        end = tl.max(tl.load(last_key + row, row < rows, -1)).to(tl.int32) + 1
    if HAS_FIRST:
        first = tl.min(tl.load(first_key + row, row < rows, keys)).to(tl.int32) // KEYS * KEYS
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for start in range(first, end, KEYS):
        column = start + tl.arange(0, KEYS)
        right = vectors_across(key + column * key_row, column < keys, dim, key_dim, WIDTH)
        logits = multiply(left, right, tl.zeros([ROWS, KEYS], tl.float32)) * scaling
        seen = keys_seen(row, row < rows, column, keys, last_key, first_key, HAS_LAST, HAS_FIRST)
        logits = tl.where(seen, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        mass = mass * tl.exp(largest - origin) + tl.sum(tl.exp(logits - origin[:, None]), 1)
        largest = larger
    tl.store(lse + entry * rows + row, largest + tl.log(mass), row < rows)


@triton.jit
def _colsum(
    query,
    key,
    last_key,
    first_key,
    lse,
    weight,
    out,
    scaling,
    heads,
    group,
    rows,
    keys,
    query_batch,
    query_head,
    query_row,
    query_dim,
    key_batch,
    key_head,
    key_row,
    key_dim,
    HAS_LAST: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    entry, first = tl.program_id(1), tl.program_id(0) * KEYS
    batch, head, dim = entry // heads, entry % heads, tl.arange(0, DIM)
    column = first + tl.arange(0, KEYS)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    right = vectors_across(key + column * key_row, column < keys, dim, key_dim, WIDTH)
    total = tl.zeros([KEYS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        some = True
        if HAS_LAST:
            some = tl.max(tl.load(last_key + row, row < rows, -1)) >= first
        if HAS_FIRST:
            some = some & (tl.min(tl.load(first_key + row, row < rows, keys)) < first + KEYS)
        if some:
            left = vectors(query + row * query_row, row < rows, dim, query_dim, WIDTH)
            logits = multiply(left, right, tl.zeros([ROWS, KEYS], tl.float32)) * scaling
            seen = keys_seen(row, row < rows, column, keys, last_key, first_key, HAS_LAST, HAS_FIRST)
            normaliser = tl.load(lse + entry * rows + row, row < rows, 0.0)
            attention = tl.where(seen, tl.exp(logits - normaliser[:, None]), 0.0)
            if WEIGHTED:
                attention *= tl.load(weight + entry * rows + row, row < rows, 0.0)[:, None]
            total += tl.sum(attention, 0)
    tl.store(out + entry * keys + column, total, column < keys)


def attention_lse(
    query: Tensor, key: Tensor, scaling: float, last_key: Tensor | None = None, first_key: Tensor | None = None
) -> Tensor:
    """See `reference.attention_lse`."""
    batch, heads, rows, _ = query.shape
    lse = query.new_empty(batch, heads, rows, dtype=torch.float32)
    sizes = _sizes(query, key, last_key, first_key)
    _lse[triton.cdiv(rows, sizes["ROWS"]), batch * heads](
        query, key, last_key, first_key, lse, scaling, *_shape(query, key), **sizes
    )
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
    """See `reference.weighted_colsum`."""
    return _sums(query, key, scaling, last_key, first_key, lse, weight.float().contiguous())


def attention_colsum(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None = None,
    first_key: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """See `reference.attention_colsum`."""
    if lse is None:
        lse = attention_lse(query, key, scaling, last_key, first_key)
    return _sums(query, key, scaling, last_key, first_key, lse, None).sum(dim=1)


def _sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None,
    first_key: Tensor | None,
    lse: Tensor,
    weight: Tensor | None,
) -> Tensor:
    batch, heads, keys = *query.shape[:2], key.shape[2]
    out = query.new_empty(batch, heads, keys, dtype=torch.float32)
    sizes = _sizes(query, key, last_key, first_key)
    _colsum[triton.cdiv(keys, sizes["KEYS"]), batch * heads](
        query,
        key,
        last_key,
        first_key,
        lse.float().contiguous(),
        weight,
        out,
        scaling,
        *_shape(query, key),
        WEIGHTED=weight is not None,
        **sizes,
    )
    return out


def _shape(query: Tensor, key: Tensor) -> tuple[int, ...]:
    heads, rows, keys = query.shape[1], query.shape[2], key.shape[2]
    return heads, heads // key.shape[1], rows, keys, *query.stride(), *key.stride()


def _sizes(query: Tensor, key: Tensor, last_key: Tensor | None, first_key: Tensor | None) -> dict[str, int]:
    width = query.shape[3]
    dim = max(16, triton.next_power_of_2(width))
    block = min(128, 2**15 // (dim * query.element_size()))  # 32 KiB of keys
    return {
        "HAS_LAST": last_key is not None,
        "HAS_FIRST": first_key is not None,
        "WIDTH": width,
        "DIM": dim,
        "ROWS": min(64, block),
        "KEYS": block,
    }
