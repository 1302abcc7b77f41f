"""Softmax rows in two launches: logits with what normalises each block of keys, then rows, joined as they are read.

Heads that share keys are rows of one product, so that keys are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompress.kernels.dispatch.triton import keys_seen, multiply, vectors, vectors_across

KEYS, DIM = 128, 64
APART, ADDED, LARGEST = 0, 1, 2


@triton.jit
def _logits(
    query,
    key,
    last_key,
    first_key,
    logits,
    lse,
    scaling,
    kv_heads,
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    entry, block = tl.program_id(0), tl.program_id(1)
    batch, kv_head = entry // kv_heads, entry % kv_heads
    member = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    there = member < group * rows
    head, row = kv_head * group + member // rows, member % rows
    column = block * KEYS + tl.arange(0, KEYS)
    query += batch * query_batch + head * query_head + row * query_row
    key += batch * key_batch + kv_head * key_head + column * key_row
    product = tl.zeros([ROWS, KEYS], tl.float32)
    for start in tl.static_range(0, WIDTH, DIM):
        dim = start + tl.arange(0, DIM)
        left = vectors(query, there, dim, query_dim, WIDTH)
        right = vectors_across(key, column < keys, dim, key_dim, WIDTH)
        product = multiply(left, right, product)
    seen = keys_seen(row, there, column, keys, last_key, first_key, HAS_LAST, HAS_FIRST)
    product = tl.where(seen, product * scaling, float("-inf"))
    largest = tl.max(product, 1)
    mass = tl.sum(tl.exp(product - tl.where(largest == float("-inf"), 0.0, largest)[:, None]), 1)
    line = (batch * kv_heads * group + head) * rows + row
    tl.store(logits + line[:, None] * keys + column[None, :], product, there[:, None] & (column < keys)[None, :])
    tl.store(lse + line * tl.num_programs(1) + block, largest + tl.log(mass), there)


@triton.jit
def _join(
    logits,
    lse,
    out,
    factor,
    heads,
    rows,
    keys,
    heads_out,
    rows_out,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    line, column = tl.program_id(0), tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    batch, first_head, first_row = line // (heads_out * rows_out), line // rows_out % heads_out, line % rows_out
    of_rows = tl.zeros([KEYS], tl.float32)
    for r in range(rows if ROWS != 0 else 1):
        of_heads = tl.zeros([KEYS], tl.float32)
        for h in range(heads if HEADS != 0 else 1):
            source = (batch * heads + first_head + h) * rows + first_row + r
            logit = tl.load(logits + source * keys + column, column < keys, float("-inf"))
            attention = tl.where(logit == float("-inf"), 0.0, tl.exp(logit - tl.load(lse + source)))
            of_heads = tl.maximum(of_heads, attention) if HEADS == 2 else of_heads + attention
        of_rows = tl.maximum(of_rows, of_heads) if ROWS == 2 else of_rows + of_heads
    tl.store(out + line * keys + column, of_rows * factor, column < keys)


def attention_rows(
    query: Tensor,
    key: Tensor,
    scaling: float,
    last_key: Tensor | None = None,
    first_key: Tensor | None = None,
    heads: str | None = None,
    rows: str | None = None,
) -> Tensor:
    """See `reference.attention_rows`; a row that sees no key is zero."""
    (batch, queries, count, width), (kv_heads, keys) = query.shape, key.shape[1:3]
    group = queries // kv_heads
    block_rows = min(64, max(16, triton.next_power_of_2(group * count)))
    blocks = triton.cdiv(keys, KEYS)
    logits = query.new_empty(batch, queries, count, keys, dtype=torch.float32)
    lse = query.new_empty(batch, queries, count, blocks, dtype=torch.float32)
    _logits[batch * kv_heads, blocks, triton.cdiv(group * count, block_rows)](
        query,
        key,
        last_key,
        first_key,
        logits,
        lse,
        scaling,
        kv_heads,
        group,
        count,
        keys,
        *query.stride(),
        *key.stride(),
        HAS_LAST=last_key is not None,
        HAS_FIRST=first_key is not None,
        WIDTH=width,
        ROWS=block_rows,
        KEYS=KEYS,
        DIM=min(DIM, max(16, triton.next_power_of_2(width))),
    )
    kept_heads, kept_rows = (queries if heads is None else 1), (count if rows is None else 1)
    out = query.new_empty(batch, kept_heads, kept_rows, keys, dtype=torch.float32)
    _join[batch * kept_heads * kept_rows, blocks](
        logits,
        lse.logsumexp(dim=-1),
        out,
        1 / ((queries if heads == "mean" else 1) * (count if rows == "mean" else 1)),
        queries,
        count,
        keys,
        kept_heads,
        kept_rows,
        HEADS=_JOIN[heads],
        ROWS=_JOIN[rows],
        KEYS=KEYS,
    )
    kept = [size for size, joined in zip((kept_heads, kept_rows), (heads, rows), strict=True) if joined is None]
    return out.view(batch, *kept, keys)


_JOIN = {None: APART, "sum": ADDED, "mean": ADDED, "max": LARGEST}
