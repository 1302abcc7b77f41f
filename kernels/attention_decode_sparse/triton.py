"""Decode attention split over entries: each program reads some of them for all heads that share them, torch joins."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcompress.kernels.dispatch.triton import multiply, vectors, vectors_across

ENTRIES = 64
PROGRAMS = 512
"""About so many run at once; more splits than that only cost."""


@triton.jit
def absorb(largest, mass, total, logits, value):
    """Add a block of entries to a running softmax: `logits` `[heads, entries]`, `value` `[entries, dim]`."""
    larger = tl.maximum(largest, tl.max(logits, 1))
    origin = tl.where(larger == float("-inf"), 0.0, larger)
    attention, fading = tl.exp(logits - origin[:, None]), tl.exp(largest - origin)
    total = multiply(attention.to(value.dtype), value, total * fading[:, None])
    return larger, mass * fading + tl.sum(attention, 1), total


@triton.jit
def finish(largest, mass, total, out, lse, line, inside, dim, WIDTH: tl.constexpr):
    """Store what a split found; zeros, of no weight, where it saw nothing."""
    total = total / tl.where(mass == 0.0, 1.0, mass)[:, None]
    tl.store(out + line[:, None] * WIDTH + dim[None, :], total, inside[:, None] & (dim < WIDTH)[None, :])
    tl.store(lse + line, largest + tl.log(mass), inside)


@triton.jit
def _rows(
    query,
    key,
    value,
    pages,
    first_key,
    out,
    lse,
    scaling,
    heads,
    group,
    entries,
    listed,
    each,
    query_batch,
    query_head,
    query_dim,
    key_batch,
    key_head,
    key_row,
    key_dim,
    value_batch,
    value_head,
    value_row,
    value_dim,
    HAS_PAGES: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dim, member = tl.arange(0, DIM), tl.arange(0, GROUP)
    head = kv_head * group + member
    rows = vectors(query + batch * query_batch + head * query_head, member < group, dim, query_dim, WIDTH)
    key += batch * key_batch + kv_head * key_head
    value += batch * value_batch + kv_head * value_head
    if HAS_PAGES:
        pages += (batch * tl.num_programs(1) + kv_head) * (listed // PAGE)
    first = tl.load(first_key + batch) if HAS_FIRST else 0
    largest = tl.full([GROUP], float("-inf"), tl.float32)
    mass = tl.zeros([GROUP], tl.float32)
    total = tl.zeros([GROUP, DIM], tl.float32)
    for start in range(split * each, tl.minimum((split + 1) * each, listed), ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        seen = entry < listed
        if HAS_PAGES:
            page = tl.load(pages + entry // PAGE, seen, -1).to(tl.int32)
            entry = tl.where(page < 0, -1, page * PAGE + entry % PAGE)
        seen &= (entry >= first) & (entry >= 0) & (entry < entries)
        keys = vectors_across(key + entry * key_row, seen, dim, key_dim, WIDTH)
        logits = multiply(rows, keys, tl.zeros([GROUP, ENTRIES], tl.float32)) * scaling
        logits = tl.where(seen[None, :], logits, float("-inf"))
        values = vectors(value + entry * value_row, seen, dim, value_dim, WIDTH)
        largest, mass, total = absorb(largest, mass, total, logits, values)
    line = (batch * heads + head) * tl.num_programs(0) + split
    finish(largest, mass, total, out, lse, line, member < group, dim, WIDTH)


@triton.jit
def _bounds(key, low, high, entries, pages, heads, page, width, batch, head, row, channel, DIM: tl.constexpr):
    entry, number, dim = tl.program_id(1), tl.program_id(0), tl.arange(0, DIM)
    key += entry // heads * batch + entry % heads * head + dim * channel
    least, most = tl.full([DIM], float("inf"), tl.float32), tl.full([DIM], float("-inf"), tl.float32)
    for place in range(number * page, tl.minimum((number + 1) * page, entries)):
        values = tl.load(key + place * row, dim < width, 0.0).to(tl.float32)
        least, most = tl.minimum(least, values), tl.maximum(most, values)
    line = (entry * pages + number) * width + dim
    tl.store(low + line, least, dim < width)
    tl.store(high + line, most, dim < width)


def attention_decode_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    page: int,
    scaling: float,
    first_key: Tensor | None = None,
) -> Tensor:
    """See `reference.attention_decode_sparse`."""
    return join([over_rows(query, key, value, scaling, first_key, pages.contiguous(), page)], query)


def over_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    first_key: Tensor | None,
    pages: Tensor | None = None,
    page: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attention over all entries, or those on `pages`, in splits: see `split_out`."""
    batch, heads = query.shape[:2]
    kv_heads, entries = key.shape[1:3]
    listed = entries if pages is None else pages.shape[2] * page
    splits, each = split(listed, batch * kv_heads)
    out, lse = split_out(query, splits)
    _rows[splits, kv_heads, batch](
        query,
        key,
        value,
        pages,
        first_key,
        out,
        lse,
        scaling,
        heads,
        heads // kv_heads,
        entries,
        listed,
        each,
        *(query.stride(dim) for dim in (0, 1, 3)),
        *key.stride(),
        *value.stride(),
        HAS_PAGES=pages is not None,
        HAS_FIRST=first_key is not None,
        PAGE=page,
        GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
        **block(query),
    )
    return out, lse


def block(query: Tensor, entries: int = ENTRIES) -> dict[str, int]:
    """Sizes of a block of `entries`, or as many as fit into 32 KiB."""
    dim = max(16, triton.next_power_of_2(query.shape[3]))
    return {"WIDTH": query.shape[3], "DIM": dim, "ENTRIES": min(entries, 2**15 // (dim * query.element_size()))}


def split(entries: int, programs: int) -> tuple[int, int]:
    """Into how many parts to cut `entries` that so many programs read each, and how many are in one."""
    splits = max(1, min(triton.cdiv(entries, ENTRIES), PROGRAMS // programs))
    each = triton.cdiv(triton.cdiv(entries, splits), ENTRIES) * ENTRIES
    return triton.cdiv(entries, each), each


def split_out(query: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Room for what every split finds: `[batch, heads, splits, dim]`, and log-sum-exps `[batch, heads, splits]`."""
    out = query.new_empty(*query.shape[:2], splits, query.shape[3], dtype=torch.float32)
    return out, query.new_empty(*query.shape[:2], splits, dtype=torch.float32)


def join(found: list[tuple[Tensor, Tensor]], query: Tensor) -> Tensor:
    """The attention over all splits `[batch, heads, 1, dim]`."""
    out, lse = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    return (lse.softmax(dim=-1)[:, :, None] @ out).to(query.dtype)


def page_bounds(key: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """See `reference.page_bounds`."""
    batch, heads, entries, width = key.shape
    pages = triton.cdiv(entries, page)
    low, high = (key.new_empty(batch, heads, pages, width) for _ in range(2))
    _bounds[pages, batch * heads](
        key, low, high, entries, pages, heads, page, width, *key.stride(), DIM=triton.next_power_of_2(width)
    )
    return low, high
